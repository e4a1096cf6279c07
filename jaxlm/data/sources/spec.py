"""Opens data: ``open_source(SPEC)`` reads a source, checks it, and reports mistakes by file and line.

    text:PATH            one stream of text, unchanged
    jsonl:PATH           one document a line, in its field "text"
    chat:PATH            one conversation a line, in one of the formats of ``data.sources.dialogues``; the model is
                         trained on the replies
    instruct:PATH        one prompt with its completion a line; the model is trained on the completions
    preference:PATH      one prompt with two replies a line: one preferred, one rejected
    tokens:PATH.npy      token ids made elsewhere: a one-dimensional integer array, memory-mapped
    bitext:SRC,TGT       line i of SRC translates to line i of TGT; only "\\n" ends a line
    wmt14:FOLDER/en-de   the archives of WMT14 in a folder; ``:train``, ``:valid`` or ``:test`` (``data.sources.wmt14``)
    tfds:NAME/CONFIG:SPLIT
                         text or translations of tensorflow-datasets (``data.sources.tfds``)
    builtin:phrasebook   synthetic English-German pairs; ``:train``, ``:valid`` or ``:test`` names the split
    mix:2x SPEC + 1x SPEC, or mix:70% SPEC + 30% SPEC
                         several sources: how many times an epoch goes through each, or the share of rows from each

Text files are UTF-8, plain or compressed (.gz, .xz). Every SPEC except ``mix:`` may end in a slice ``[a:b]`` with
Python's meaning. The bounds are integers or percentages (``text:x.txt[:90%]``, rounded down), and count characters
(text), lines (files of rows, bitext), ids (tokens) or pairs (builtin).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.config import FirstTokenOption, SpecialTokens
from jaxlm.data.sources.dialogues import chat_row, instruct_row, preference_row
from jaxlm.data.sources.jsonl import BadRows, JsonlRows, RowError
from jaxlm.data.sources.slices import Slicer, parse_slice
from jaxlm.data.sources.text_files import read_lines, read_text
from jaxlm.data.sources.types import Bitext, Dialogues, Documents, Mixture, Preferences, Source, Tokens

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
_FORMATS = {
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


def open_source(
    spec: str, split: Split = "train", bad_rows: BadRows = "fail", *, special_tokens: SpecialTokens = "text",
    prompt_special_tokens: SpecialTokens = "text", first_token: FirstTokenOption = "auto",
) -> Source:
    """Opens a SPEC (see the module's docstring). Files of rows are read row by row when iterated; everything else is
    read into memory at once.

    Args:
        spec: what to read.
        split: the split of a corpus that has several, if the SPEC names none.
        bad_rows: what to do about rows that cannot be used (``JsonlRows``).
        special_tokens: whether special tokens that documents spell are characters ("text") or special tokens ("parse").
        prompt_special_tokens: the same for prompts and completions that are texts, as in ``instruct:``. Messages never
            have special tokens.
        first_token: whether each document and each window of a stream begins with what the tokenizer puts before a text
            ("auto"), or "never".

    Raises:
        UserError: when the SPEC, a file or a line is not as it should be; the message names it.
    """
    if not spec:
        raise UserError(f"no data given; name a source: {', '.join(_FORMATS.values())}")
    scheme, colon, rest = spec.partition(":")
    if not colon or scheme not in _FORMATS:
        hint = f"; did you mean text:{spec}?" if Path(spec).expanduser().is_file() else ""
        raise UserError(f"unknown data source {spec!r}: write {', '.join(_FORMATS.values())}{hint}")
    if scheme == "mix":
        parts = partial(open_source, split=split, bad_rows=bad_rows, special_tokens=special_tokens,
                        prompt_special_tokens=prompt_special_tokens, first_token=first_token)
        return _mixture(spec, rest, parts)
    source = _open_one(spec, scheme, rest, split, bad_rows)
    if isinstance(source, Documents | Tokens):
        source = dataclasses.replace(source, first_token=first_token)
    if isinstance(source, Documents | Dialogues | Preferences):
        parse = special_tokens if isinstance(source, Documents) else prompt_special_tokens
        return dataclasses.replace(source, parse_special=parse == "parse")
    return source


def _open_one(spec: str, scheme: str, rest: str, split: Split, bad_rows: BadRows) -> Source:
    body, slicer = parse_slice(spec, rest)
    if not body:
        raise UserError(f"{spec!r} names no file; write {_FORMATS[scheme]}")
    if scheme in _WITH_SPLITS:
        return _WITH_SPLITS[scheme](spec, body, split, slicer)
    if scheme in _ROW_FORMATS:
        kind, parse = _ROW_FORMATS[scheme]
        rows = JsonlRows(body, parse, slicer, bad_rows)
        return Documents(spec, rows, append_eos=True) if kind is Documents else kind(spec, rows)
    return {"text": _text, "tokens": _tokens, "bitext": _bitext}[scheme](spec, body, slicer)


def _text(spec: str, path: str, slicer: Slicer) -> Documents:
    text = read_text(path)
    return Documents(spec, (text[slicer(len(text))],), append_eos=False)


def text_row(row: Mapping[str, Any]) -> str:
    """A row of ``jsonl:``. Raises RowError when it has no text."""
    if not isinstance(row.get("text"), str):
        raise RowError('no string under "text"', 'write {"text": "..."} on each line')
    return row["text"]


_ROW_FORMATS = {
    "jsonl": (Documents, text_row), "chat": (Dialogues, chat_row), "instruct": (Dialogues, instruct_row),
    "preference": (Preferences, preference_row),
}


def _tokens(spec: str, path: str, slicer: Slicer) -> Tokens:
    try:
        ids = np.load(Path(path).expanduser(), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except Exception as error:  # NumPy raises all kinds
        raise UserError(f"{path} is not a plain .npy file of numbers ({error}); save it with numpy.save") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        what = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise UserError(f"{path} holds {what}; token ids are a one-dimensional integer array")
    if not ids.size:
        raise UserError(f"{path} is empty; name a file with token ids in it")
    return Tokens(spec, ids[slicer(len(ids))])


def _bitext(spec: str, paths: str, slicer: Slicer) -> Bitext:
    names = paths.split(",")
    if len(names) != 2 or not all(names):
        raise UserError(f"{spec!r} names {sum(map(bool, names))} files; write bitext:SRC,TGT")
    src, tgt = map(read_lines, names)
    if len(src) != len(tgt):
        raise UserError(
            f"{names[0]} has {len(src):,} lines and {names[1]} has {len(tgt):,}; line i of one must translate line i "
            "of the other"
        )
    selected = slicer(len(src))
    return Bitext(spec, src[selected], tgt[selected])


def _builtin(spec: str, body: str, split: Split, slicer: Slicer) -> Bitext:
    name, _, named = body.partition(":")
    split = named or split
    if name != "phrasebook":
        raise UserError(f"no builtin data {name!r}; the only one is builtin:phrasebook")
    if split not in SPLITS:
        raise UserError(f"builtin:phrasebook has no split {split!r}; choose from {', '.join(SPLITS)}")
    from jaxlm.data.phrasebook import generate  # not imported unless it is used

    pairs = generate()[split]
    src, tgt = zip(*pairs[slicer(len(pairs))], strict=True)
    return Bitext(spec, src, tgt, synthetic="synthetic sentences from jaxlm's phrasebook generator, not natural text")


def _wmt14(spec: str, body: str, split: Split, slicer: Slicer) -> Bitext:
    from jaxlm.data.sources.wmt14 import read

    src, tgt = read(body, split)
    selected = slicer(len(src))
    return Bitext(spec, src[selected], tgt[selected])


def _tfds(spec: str, body: str, split: Split, slicer: Slicer) -> Bitext | Documents:
    from jaxlm.data.sources.tfds import read

    features = read(body, split)
    selected = slicer(len(features[0]))
    whole = selected == slice(0, len(features[0]))
    if len(features) == 1:
        return Documents(spec, features[0] if whole else features[0][selected], append_eos=True)
    return Bitext(spec, *(feature[selected] for feature in features))


_WITH_SPLITS = {"builtin": _builtin, "wmt14": _wmt14, "tfds": _tfds}


def _mixture(spec: str, rest: str, open_part: Callable[[str], Source]) -> Mixture | Bitext:
    parts = [re.fullmatch(r"\s*(\d+(?:\.\d+)?)(x|%)\s+(\S.*?)\s*", part) for part in rest.split(" + ")]
    units = {part[2] for part in parts if part}
    if not all(parts) or len(units) > 1:
        raise UserError(f"{spec!r} is not a mixture; write mix:70% SPEC + 30% SPEC, or mix:2x SPEC + 1x SPEC")
    weights, shares = [float(part[1]) for part in parts], units == {"%"}
    if not all(weights):
        raise UserError(f"{spec!r} gives a source the weight 0; leave it out")
    sources = [open_part(part[3]) for part in parts]
    if all(isinstance(source, Bitext) for source in sources):
        if shares or not all(weight.is_integer() for weight in weights):
            raise UserError(f"{spec!r} mixes sentence pairs, whose weights are whole epochs; write 2x SPEC + 1x SPEC")
        repeated = [source for source, times in zip(sources, weights, strict=True) for _ in range(int(times))]
        src, tgt = ([text for source in repeated for text in getattr(source, side)] for side in ("src", "tgt"))
        return Bitext(spec, src, tgt, "; ".join({source.synthetic for source in sources} - {""}))
    if not all(isinstance(source, Documents | Dialogues | Tokens) for source in sources):
        raise UserError(
            f"{spec!r} mixes sources that no model reads together; mix text with dialogues, or pairs with pairs"
        )
    if shares and abs(sum(weights) - 100) > 0.01:
        raise UserError(f"the shares in {spec!r} add up to {sum(weights):g}%; make that 100%")
    total = sum(weights) if shares else 1
    return Mixture(spec, tuple(sources), tuple(weight / total for weight in weights), shares)
