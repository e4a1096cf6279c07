"""What keeps damaged or hostile tokenizer files from filling the memory or ending the process."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxlm.core.errors import UserError, shown

_MOST_HOLES = 1 << 16  # ids without a token


def check_ids(vocabulary: Mapping[str, int]) -> None:
    """Raises UserError where an id is far above the number of tokens. Lists of all ids, which this code and the library
    make, would fill the memory. Some published vocabularies leave ids out, though not many."""
    if not vocabulary:
        raise UserError("the tokenizer has no tokens; copy it again")
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] > 4 * len(vocabulary) + _MOST_HOLES:
        raise UserError(
            f"the tokenizer gives {shown(token)} the id {vocabulary[token]}, and has {len(vocabulary)} tokens; copy it "
            "again"
        )


@contextmanager
def library_errors(what: str = "the tokenizer fails") -> Iterator[None]:
    """Turns errors of the library ``tokenizers`` into a UserError. Some are no ``Exception``: where its Rust code
    panics, such as at an expression that takes too long to match."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UserError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} ({reason}); copy it again, or save it with transformers") from None


def check_charsmaps(spec: Any) -> None:
    """Raises ValueError where the table of a SentencePiece normaliser in a tokenizer.json is shorter than it says. The
    library would take as much memory as it says."""
    parts = [spec.get("normalizer")] if isinstance(spec, dict) else []
    for part in parts:
        if isinstance(part, dict):
            more = part.get("normalizers")
            parts += more if isinstance(more, list) else []
            table = part.get("precompiled_charsmap")
            table = base64.b64decode(table) if isinstance(table, str) else b""
            if table and not 4 <= int.from_bytes(table[:4], "little") <= len(table) - 4:
                raise ValueError("its precompiled_charsmap is damaged")
