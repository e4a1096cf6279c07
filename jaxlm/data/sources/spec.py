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

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.sources.dialogues import chat_row, instruct_row, preference_row
from jaxlm.data.sources.jsonl import BadRows, JsonlRows, RowError
from jaxlm.data.sources.slices import Slicer, parse_slice
from jaxlm.data.sources.text_files import read_lines, read_text
from jaxlm.data.sources.types import Bitext, Dialogues, Documents, Mixture, Preferences, Source, Tokens

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


def open_source(spec: str, split: Split = "train", bad_rows: BadRows = "fail") -> Source:
    """Opens a SPEC (see the module). Rows are read when asked for, all else into memory.

    Args:
        spec: what to read.
        split: the part of a builtin corpus meant when the SPEC names none.
        bad_rows: what rows that are no good are: a mistake, or left out and counted (``JsonlRows``).

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
    body, cut = parse_slice(spec, rest)
    if not body:
        raise UserError(f"{spec!r} names no file; write {_FORMS[scheme]}")
    if scheme in _PARTED:
        return _PARTED[scheme](spec, body, split, cut)
    if scheme in _ROWS:
        kind, read = _ROWS[scheme]
        rows = JsonlRows(body, read, cut, bad_rows)
        return Documents(spec, rows, ends=True) if kind is Documents else kind(spec, rows)
    return {"text": _text, "tokens": _tokens, "bitext": _bitext}[scheme](spec, body, cut)


def _text(spec: str, path: str, cut: Slicer) -> Documents:
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


def _tokens(spec: str, path: str, cut: Slicer) -> Tokens:
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


def _bitext(spec: str, paths: str, cut: Slicer) -> Bitext:
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


def _builtin(spec: str, body: str, split: Split, cut: Slicer) -> Bitext:
    name, _, part = body.partition(":")
    if name != "phrasebook":
        raise UserError(f"no builtin data {name!r}; there is builtin:phrasebook")
    if (part or split) not in SPLITS:
        raise UserError(f"builtin:phrasebook has no part {part or split!r}; choose from {', '.join(SPLITS)}")
    from jaxlm.data.phrasebook import generate  # only those who ask for it pay for it

    pairs = generate()[part or split]
    src, tgt = zip(*pairs[cut(len(pairs))], strict=True)
    return Bitext(spec, src, tgt, synthetic="synthetic sentences from jaxlm's phrasebook generator, not natural text")


def _wmt14(spec: str, body: str, split: Split, cut: Slicer) -> Bitext:
    from jaxlm.data.sources.wmt14 import read

    src, tgt = read(body, split)
    chosen = cut(len(src))
    return Bitext(spec, src[chosen], tgt[chosen])


def _tfds(spec: str, body: str, split: Split, cut: Slicer) -> Bitext | Documents:
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
