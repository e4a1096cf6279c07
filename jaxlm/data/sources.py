"""Where data comes from: ``open_source(SPEC)`` reads it, checks it, and says precisely what is wrong with it.

    text:PATH            one stream of text, kept to the character
    jsonl:PATH           one document a line, in its field "text"
    tokens:PATH.npy      token ids made elsewhere: a one-dimensional integer array, memory-mapped
    bitext:SRC,TGT       line i of SRC translates to line i of TGT; lines end in "\\n" only
    builtin:phrasebook   synthetic English-German pairs made here; ``:train``, ``:valid`` or ``:test`` picks the part

Text files are UTF-8, plain or compressed (.gz, .xz). Any SPEC may end in a slice ``[a:b]`` with Python's meaning; the
bounds are integers or percentages (``text:x.txt[:90%]``, rounded down) of characters (text), lines (jsonl, bitext),
ids (tokens) or pairs (builtin).
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from jaxlm.core.errors import UserError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
_FORMS = {
    "text": "text:PATH",
    "jsonl": "jsonl:PATH",
    "tokens": "tokens:PATH.npy",
    "bitext": "bitext:SRC,TGT",
    "builtin": "builtin:phrasebook",
}
_PIECE = 1 << 16  # characters


@dataclass(frozen=True)
class Documents:
    """Texts for a language model. ``ends`` tells whether each text is a document with an end the model should learn;
    a text file is not: it is a stretch of one stream."""

    spec: str
    texts: Sequence[str]
    ends: bool
    synthetic: str = ""  # says so, where the text was made up


@dataclass(frozen=True)
class Tokens:
    """One stream of token ids, integers of any width [N]."""

    spec: str
    ids: np.ndarray
    synthetic: str = ""


@dataclass(frozen=True)
class Bitext:
    """Sentence pairs: ``tgt[i]`` translates ``src[i]``."""

    spec: str
    src: Sequence[str]
    tgt: Sequence[str]
    synthetic: str = ""

    @property
    def texts(self) -> list[str]:
        """Both sides: what a joint tokenizer is trained on."""
        return [*self.src, *self.tgt]


Source = Documents | Tokens | Bitext


def open_source(spec: str, split: Split = "train") -> Source:
    """Reads a SPEC (see the module) into memory.

    Args:
        spec: what to read.
        split: the part of a builtin corpus meant when the SPEC names none.

    Raises:
        UserError: the SPEC, a file or a line in it is not what it should be; the message names it.
    """
    if not spec:
        raise UserError(f"no data given; name a source: {', '.join(_FORMS.values())}")
    scheme, colon, rest = spec.partition(":")
    if not colon or scheme not in _FORMS:
        hint = f"; did you mean text:{spec}?" if Path(spec).expanduser().is_file() else ""
        raise UserError(f"unknown data source {spec!r}: write {', '.join(_FORMS.values())}{hint}")
    body, cut = _parse_slice(spec, rest)
    if not body:
        raise UserError(f"{spec!r} names no file; write {_FORMS[scheme]}")
    if scheme == "builtin":
        return _builtin(spec, body, split, cut)
    return {"text": _text, "jsonl": _jsonl, "tokens": _tokens, "bitext": _bitext}[scheme](spec, body, cut)


def pieces(text: str, size: int = _PIECE) -> Iterator[str]:
    """Cuts a text into consecutive pieces of at least ``size`` characters, always just before a newline that follows
    something other than white space.

    There every word ends, and so does every match of GPT-2's pre-tokenizer: its pattern takes white space only at the
    start of a word, and looks ahead only from white space. Encoding or counting piece by piece changes nothing.
    """
    start = 0
    while start < len(text):
        end = text.find("\n", start + size)
        while end > 0 and text[end - 1].isspace():
            end = text.find("\n", end + 1)
        if end < 0:
            end = len(text)
        yield text[start:end]
        start = end


def text_size(texts: Sequence[str]) -> tuple[int, int]:
    """(words, bytes) of some texts, for perplexity a word or byte: runs of non-white-space, and UTF-8 length."""
    words = n_bytes = 0
    for text in texts:
        for piece in pieces(text):
            words += len(piece.split())
            n_bytes += len(piece.encode())
    return words, n_bytes


# --- slices


Cut = Callable[[int], slice]


def _parse_slice(spec: str, rest: str) -> tuple[str, Cut]:
    """Splits ``x.txt[:90%]`` into ``x.txt`` and the function from a length to the slice that is meant."""
    if not rest.endswith("]"):
        return rest, lambda n: slice(0, n)
    body, _, inside = rest[:-1].rpartition("[")
    bound = r"\s*(-?\d+|\d+(?:\.\d+)?%)?\s*"
    match = re.fullmatch(f"{bound}:{bound}", inside)
    if not match:
        raise UserError(f"bad slice [{inside}] in {spec!r}; write [a:b] with integers or percentages, such as [:90%]")

    def resolve(n: int) -> slice:
        def at(written: str | None) -> int | None:
            if written is None:
                return None
            return int(n * Fraction(written[:-1]) / 100) if written.endswith("%") else int(written)

        start, stop, _ = slice(at(match[1]), at(match[2])).indices(n)
        if start >= stop:
            raise UserError(f"the slice [{inside}] of {spec!r} is empty: there are {n:,} to choose from")
        return slice(start, stop)

    return body, resolve


# --- files


def _read_bytes(name: str) -> bytes:
    path = Path(name).expanduser()
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; name a file in it") from None
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise UserError(f"{path} is damaged or not a {path.suffix} file ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if not data:
        raise UserError(f"{path} is empty; name a file with text in it")
    return data


def _read_text(name: str) -> str:
    data = _read_bytes(name)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}:{line}: invalid UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from None


def _read_lines(name: str) -> list[str]:
    """Lines end in "\\n" and nothing else: other separators that Unicode knows occur inside sentences. A "\\r" before
    it belongs to the line end of files from Windows."""
    lines = _read_text(name).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


# --- schemes


def _text(spec: str, path: str, cut: Cut) -> Documents:
    text = _read_text(path)
    return Documents(spec, (text[cut(len(text))],), ends=False)


def _jsonl(spec: str, path: str, cut: Cut) -> Documents:
    lines = _read_lines(path)
    chosen = cut(len(lines))
    texts = []
    for number, line in enumerate(lines[chosen], chosen.start + 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg}); write one object a line") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(f'{path}:{number}: no string under "text"; write {{"text": "..."}} on each line')
        texts.append(record["text"])
    if not any(texts):
        raise UserError(f"{spec!r} holds no text; name a file with documents in it")
    return Documents(spec, texts, ends=True)


def _tokens(spec: str, path: str, cut: Cut) -> Tokens:
    try:
        ids = np.load(Path(path).expanduser(), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a plain .npy file of numbers ({error}); save it with numpy.save") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        what = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise UserError(f"{path} holds {what}; token ids are a one-dimensional integer array")
    if not ids.size:
        raise UserError(f"{path} is empty; name a file with token ids in it")
    return Tokens(spec, ids[cut(len(ids))])


def _bitext(spec: str, paths: str, cut: Cut) -> Bitext:
    names = paths.split(",")
    if len(names) != 2 or not all(names):
        raise UserError(f"{spec!r} names {sum(map(bool, names))} files; write bitext:SRC,TGT")
    src, tgt = map(_read_lines, names)
    if len(src) != len(tgt):
        raise UserError(
            f"{names[0]} has {len(src):,} lines and {names[1]} has {len(tgt):,}; line i of one must translate line i "
            "of the other"
        )
    chosen = cut(len(src))
    return Bitext(spec, src[chosen], tgt[chosen])


def _builtin(spec: str, body: str, split: Split, cut: Cut) -> Bitext:
    name, _, part = body.partition(":")
    if name != "phrasebook":
        raise UserError(f"no builtin data {name!r}; there is builtin:phrasebook")
    if (part or split) not in SPLITS:
        raise UserError(f"builtin:phrasebook has no part {part or split!r}; choose from {', '.join(SPLITS)}")
    from jaxlm.data.phrasebook import generate  # only those who ask for it pay for it

    pairs = generate()[part or split]
    src, tgt = zip(*pairs[cut(len(pairs))], strict=True)
    return Bitext(spec, src, tgt, synthetic="synthetic sentences from jaxlm's phrasebook generator, not natural text")
