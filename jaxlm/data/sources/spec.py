"""Where data comes from: ``open_source(SPEC)`` reads it, checks it, and says precisely what is wrong with it.

    text:PATH            one stream of text, kept to the character
    jsonl:PATH           one document a line, in its field "text"
    chat:PATH            one conversation a line (``data.sources.dialogues`` says in which forms); replies are learned
    instruct:PATH        one prompt with its completion a line; completions are learned
    preference:PATH      one prompt with two replies a line, of which one is preferred
    tokens:PATH.npy      token ids made elsewhere: a one-dimensional integer array, memory-mapped
    bitext:SRC,TGT       line i of SRC translates to line i of TGT; lines end in "\\n" only
    wmt14:FOLDER/en-de   the archives of WMT14 in a folder; ``:train``, ``:valid`` or ``:test`` (``data.sources.wmt14``)
    tfds:NAME/CONFIG:SPLIT
                         text or translations of tensorflow-datasets (``data.sources.tfds``)
    builtin:phrasebook   synthetic English-German pairs made here; ``:train``, ``:valid`` or ``:test`` picks the part
    mix:2x SPEC + 1x SPEC, or mix:70% SPEC + 30% SPEC
                         several of them: so many times each in an epoch, or so much of the rows from each

Text files are UTF-8, plain or compressed (.gz, .xz). Any SPEC may end in a slice ``[a:b]`` with Python's meaning; the
bounds are integers or percentages (``text:x.txt[:90%]``, rounded down) of characters (text), lines (of files of rows,
bitext), ids (tokens) or pairs (builtin).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.sources.dialogues import Dialogue, chat_row, instruct_row, preference_row
from jaxlm.data.sources.jsonl import BadRows, RowError, Rows
from jaxlm.data.sources.text_files import read_lines, read_text

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
_FORMS = {
    "text": "text:PATH",
    "jsonl": "jsonl:PATH",
    "chat": "chat:PATH",
    "instruct": "instruct:PATH",
    "preference": "preference:PATH",
    "tokens": "tokens:PATH.npy",
    "bitext": "bitext:SRC,TGT",
    "wmt14": "wmt14:FOLDER/en-de:train",
    "tfds": "tfds:NAME/CONFIG:SPLIT",
    "builtin": "builtin:phrasebook",
    "mix": "mix:70% SPEC + 30% SPEC",
}
_PIECE = 1 << 16  # characters


@dataclass(frozen=True)
class Documents:
    """Texts for a language model. ``ends`` tells whether each text is a document with an end the model should learn;
    a text file is not: it is a stretch of one stream."""

    spec: str
    texts: Iterable[str]
    ends: bool
    synthetic: str = ""  # says so, where the text was made up


@dataclass(frozen=True)
class Dialogues:
    """Texts and conversations of which a language model is to learn the replies."""

    spec: str
    rows: Rows[Dialogue]
    synthetic: str = ""


@dataclass(frozen=True)
class Preferences:
    """Dialogues in twos: the same prompt, with a reply that is preferred to another, and the other."""

    spec: str
    rows: Rows[tuple[Dialogue, Dialogue]]
    synthetic: str = ""


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


Plain = Documents | Dialogues | Preferences | Tokens | Bitext


@dataclass(frozen=True)
class Mixture:
    """Sources that language models read, with their ``weights``: shares that add up to 1, or epochs."""

    spec: str
    sources: tuple[Documents | Dialogues | Tokens, ...]
    weights: tuple[float, ...]
    shares: bool

    @property
    def texts(self) -> Iterator[str]:
        """Of those that have plain text."""
        return itertools.chain.from_iterable(getattr(source, "texts", ()) for source in self.sources)

    @property
    def synthetic(self) -> str:
        return "; ".join(dict.fromkeys(source.synthetic for source in self.sources if source.synthetic))


Source = Plain | Mixture


def open_source(spec: str, split: Split = "train", bad_rows: BadRows = "fail") -> Source:
    """Opens a SPEC (see the module). Rows are read when asked for, all else into memory.

    Args:
        spec: what to read.
        split: the part of a builtin corpus meant when the SPEC names none.
        bad_rows: what rows that are no good are: a mistake, or left out and counted (``Rows``).

    Raises:
        UserError: the SPEC, a file or a line in it is not what it should be; the message names it.
    """
    if not spec:
        raise UserError(f"no data given; name a source: {', '.join(_FORMS.values())}")
    scheme, colon, rest = spec.partition(":")
    if not colon or scheme not in _FORMS:
        hint = f"; did you mean text:{spec}?" if Path(spec).expanduser().is_file() else ""
        raise UserError(f"unknown data source {spec!r}: write {', '.join(_FORMS.values())}{hint}")
    if scheme == "mix":
        return _mixture(spec, rest, split, bad_rows)
    body, cut = _parse_slice(spec, rest)
    if not body:
        raise UserError(f"{spec!r} names no file; write {_FORMS[scheme]}")
    if scheme in _PARTED:
        return _PARTED[scheme](spec, body, split, cut)
    if scheme in _ROWS:
        kind, read = _ROWS[scheme]
        rows = Rows(body, read, cut, bad_rows)
        return Documents(spec, rows, ends=True) if kind is Documents else kind(spec, rows)
    return {"text": _text, "tokens": _tokens, "bitext": _bitext}[scheme](spec, body, cut)


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


def text_size(texts: Iterable[str]) -> tuple[int, int]:
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


# --- schemes


def _text(spec: str, path: str, cut: Cut) -> Documents:
    text = read_text(path)
    return Documents(spec, (text[cut(len(text))],), ends=False)


def text_row(row: Mapping[str, Any]) -> str:
    if not isinstance(row.get("text"), str):
        raise RowError('no string under "text"', 'write {"text": "..."} on each line')
    return row["text"]


_ROWS = {
    "jsonl": (Documents, text_row), "chat": (Dialogues, chat_row), "instruct": (Dialogues, instruct_row),
    "preference": (Preferences, preference_row),
}


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
    src, tgt = map(read_lines, names)
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


def _wmt14(spec: str, body: str, split: Split, cut: Cut) -> Bitext:
    from jaxlm.data.sources.wmt14 import read

    src, tgt = read(body, split)
    chosen = cut(len(src))
    return Bitext(spec, src[chosen], tgt[chosen])


def _tfds(spec: str, body: str, split: Split, cut: Cut) -> Bitext | Documents:
    from jaxlm.data.sources.tfds import read

    features = read(body, split)
    chosen = cut(len(features[0]))
    whole = chosen == slice(0, len(features[0]))
    if len(features) == 1:
        return Documents(spec, features[0] if whole else features[0][chosen], ends=True)
    return Bitext(spec, *(feature[chosen] for feature in features))


_PARTED = {"builtin": _builtin, "wmt14": _wmt14, "tfds": _tfds}


def _mixture(spec: str, rest: str, split: Split, bad_rows: BadRows) -> Mixture | Bitext:
    parts = [re.fullmatch(r"\s*(\d+(?:\.\d+)?)(x|%)\s+(\S.*?)\s*", part) for part in rest.split(" + ")]
    units = {part[2] for part in parts if part}
    if not all(parts) or len(units) > 1:
        raise UserError(f"{spec!r} is no mixture; write mix:70% SPEC + 30% SPEC, or mix:2x SPEC + 1x SPEC")
    weights, shares = [float(part[1]) for part in parts], units == {"%"}
    if not all(weights):
        raise UserError(f"{spec!r} gives a source no weight; leave it out")
    sources = [open_source(part[3], split, bad_rows) for part in parts]
    if all(isinstance(source, Bitext) for source in sources):
        if shares or not all(weight.is_integer() for weight in weights):
            raise UserError(f"{spec!r} mixes sentence pairs, which come in whole epochs; write 2x SPEC + 1x SPEC")
        repeated = [source for source, times in zip(sources, weights, strict=True) for _ in range(int(times))]
        src, tgt = ([text for source in repeated for text in getattr(source, side)] for side in ("src", "tgt"))
        return Bitext(spec, src, tgt, "; ".join({source.synthetic for source in sources} - {""}))
    if not all(isinstance(source, Documents | Dialogues | Tokens) for source in sources):
        raise UserError(f"{spec!r} mixes what no model reads together; mix text with dialogues, or pairs with pairs")
    if shares and abs(sum(weights) - 100) > 0.01:
        raise UserError(f"the shares in {spec!r} add up to {sum(weights):g}%; make that 100%")
    total = sum(weights) if shares else 1
    return Mixture(spec, tuple(sources), tuple(weight / total for weight in weights), shares)
