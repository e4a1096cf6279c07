"""Calibration data for compression: a few windows of text, or sentence pairs."""

from __future__ import annotations

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.bitext import SentencePairs
from jaxlm.data.batches.buckets import BucketShapes
from jaxlm.data.batches.encoding import EncodedDocuments
from jaxlm.data.batches.first_token import FirstToken
from jaxlm.data.batches.packing import token_stream
from jaxlm.data.batches.shuffle import random_state
from jaxlm.data.config import FirstTokenOption, SpecialTokens
from jaxlm.data.sources.spec import open_source
from jaxlm.data.sources.types import Bitext, Source, Tokens
from jaxlm.data.tokenizers.tokenizer import Tokenizer

__all__ = ["calibration_batches", "hold_out"]

Arrays = tuple[np.ndarray, ...]  # a batch
_BATCH_TOKENS = 4096
_PAIRS_PER_WINDOW = 16
_BUCKETS = (16, 32, 64, 128)


def calibration_batches(
    spec: str, tokenizer: Tokenizer | None, *, pairs: bool, samples: int, context: int, seed: int,
    special_tokens: SpecialTokens = "text", first_token: FirstTokenOption = "auto",
) -> list[Arrays]:
    """Calibration batches from the training split of a SPEC.

    Args:
        spec: text; sentence pairs for a model that translates.
        tokenizer: of the model; None: the SPEC must be token ids.
        pairs: whether the model translates.
        samples: the number of windows, which do not overlap; 16 sentence pairs count as a window. From more data they
            are drawn at random, and stay in the order of the text.
        context: tokens of a window, with the first token that the tokenizer puts before a text.
        seed: of the draw.
        special_tokens, first_token: see ``open_source``.

    Returns:
        batches ``(tokens [B, context],)``, or ``(sources [B, S], inputs [B, T])`` if ``pairs``; all int32.

    Raises:
        UserError: when the data is less than one window, or when the SPEC does not fit the model.
    """
    source = open_source(spec, "train", special_tokens=special_tokens, first_token=first_token)
    if isinstance(source, Bitext) != pairs:
        wanted = "bitext:SRC,TGT" if pairs else "text:, jsonl: or tokens:"
        raise UserError(f"{spec!r} does not fit this model: calibrate it with {wanted}")
    if tokenizer is None and not isinstance(source, Tokens):
        raise UserError("the model has no tokenizer: calibrate it with tokens:PATH.npy")
    if samples < 1 or context < 2:
        raise UserError(f"{samples} samples of {context} tokens: give 1 or more of 2 or more")
    return _pairs(source, tokenizer, samples, seed) if pairs else _windows(source, tokenizer, samples, context, seed)


def hold_out(batches: list[Arrays]) -> tuple[list[Arrays], list[Arrays]]:
    """Splits batches into those to calibrate with, and about a fifth held out to measure the result with: a fifth of
    the rows of each batch, or a fifth of the batches if these have fewer than 5 rows.

    Raises:
        UserError: when there is too little data for both.
    """
    calibration, held_out = [], []
    for number, batch in enumerate(batches):
        rows = np.arange(len(batch[0]))
        out = rows % 5 == 2 if len(rows) >= 5 else np.full(len(rows), number % 5 == 2)
        calibration.append(tuple(array[~out] for array in batch))
        held_out.append(tuple(array[out] for array in batch))
    calibration, held_out = ([batch for batch in part if len(batch[0])] for part in (calibration, held_out))
    if not calibration or not held_out:
        raise UserError("the calibration data is too little to hold out a part of it; give more")
    return calibration, held_out


def _windows(
    source: Source, tokenizer: Tokenizer | None, samples: int, context: int, seed: int
) -> list[tuple[np.ndarray]]:
    stream = EncodedDocuments(source.ids, np.array([len(source.ids)])) if tokenizer is None else (
        token_stream(source, tokenizer)
    )
    first = FirstToken(stream.first_token, stream.ids, stream.lengths)
    length = context - len(first)
    total = (len(stream.ids) - first.leading) // length if length > 0 else 0
    if not total:
        raise UserError(
            f"{source.spec!r} is {len(stream.ids)} tokens, less than one window of {context} with {len(first)} before "
            "the text; give more, or a longer context"
        )
    drawn = np.arange(total)
    if total > samples:
        drawn = np.sort(random_state(seed, 0).choice(total, samples, replace=False))
    begin_N = first.skip(first.leading + drawn * length)
    windows_NxT = stream.ids[np.minimum(begin_N[:, None] + np.arange(length), len(stream.ids) - 1)].astype(np.int32)
    windows_NxT = np.concatenate([np.tile(first.ids, (len(drawn), 1)), windows_NxT], axis=1)
    rows = max(1, _BATCH_TOKENS // context)
    return [(windows_NxT[i : i + rows],) for i in range(0, len(windows_NxT), rows)]


def _pairs(source: Bitext, tokenizer: Tokenizer, samples: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    wanted = samples * _PAIRS_PER_WINDOW
    if len(source.src) > wanted:
        drawn = np.sort(random_state(seed, 0).choice(len(source.src), wanted, replace=False))
        source = Bitext(source.spec, [source.src[i] for i in drawn], [source.tgt[i] for i in drawn])
    pairs = SentencePairs(source, tokenizer, BucketShapes(_BUCKETS, _BATCH_TOKENS, extend=True))
    plan = pairs.plan(None, 0)
    batches = (pairs.batch(plan, k) for k in range(len(plan.bucket)))
    return [(batch["src"], batch["inputs"]) for batch in batches]
