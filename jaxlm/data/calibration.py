"""A little data for compression to calibrate with: windows of text, or sentence pairs."""

from __future__ import annotations

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.bitext import SentencePairs
from jaxlm.data.batches.packing import token_stream
from jaxlm.data.batches.shuffle import random_state
from jaxlm.data.sources.spec import open_source
from jaxlm.data.sources.types import Bitext, Tokens
from jaxlm.data.tokenizers.tokenizer import Tokenizer

__all__ = ["calibration_batches", "hold_out"]

_BATCH_TOKENS = 4096
_PAIRS_A_WINDOW = 16
_BUCKETS = (16, 32, 64, 128)


def calibration_batches(
    spec: str, tokenizer: Tokenizer | None, *, pairs: bool, samples: int, context: int, seed: int
) -> list[tuple[np.ndarray, ...]]:
    """Batches of the training part of a SPEC: ``(tokens [B, context],)``, or ``(sources [B, S], inputs [B, T])``.

    Args:
        spec: text, or for a model that translates sentence pairs (``pairs``).
        tokenizer: the model's; None takes token ids only.
        samples: windows of ``context`` tokens, none overlapping another; there are 16 pairs for each. Where there is
            more they are drawn with ``seed``, in the order of the text.

    UserError where there is no whole window, or the SPEC does not fit the model.
    """
    source = open_source(spec, "train")
    if isinstance(source, Bitext) != pairs:
        wanted = "bitext:SRC,TGT" if pairs else "text:, jsonl: or tokens:"
        raise UserError(f"{spec!r} does not fit this model: calibrate it with {wanted}")
    if tokenizer is None and not isinstance(source, Tokens):
        raise UserError("the model has no tokenizer: calibrate it with tokens:PATH.npy")
    if samples < 1 or context < 2:
        raise UserError(f"{samples} samples of {context} tokens: give 1 or more of 2 or more")
    return _pairs(source, tokenizer, samples, seed) if pairs else _windows(source, tokenizer, samples, context, seed)


def hold_out(batches: list[tuple[np.ndarray, ...]]) -> tuple[list, list]:
    """Batches to calibrate with, and about a fifth to judge by: of each batch, or where rows are few, of the batches.

    UserError where there is too little for both.
    """
    kept, held = [], []
    for number, batch in enumerate(batches):
        rows = np.arange(len(batch[0]))
        out = rows % 5 == 2 if len(rows) >= 5 else np.full(len(rows), number % 5 == 2)
        kept.append(tuple(part[~out] for part in batch))
        held.append(tuple(part[out] for part in batch))
    kept, held = ([batch for batch in part if len(batch[0])] for part in (kept, held))
    if not kept or not held:
        raise UserError("the calibration data is too little to judge by a part of it; give more")
    return kept, held


def _windows(source, tokenizer: Tokenizer | None, samples: int, context: int, seed: int) -> list[tuple[np.ndarray]]:
    ids_N = source.ids if tokenizer is None else token_stream(source, tokenizer)
    total = len(ids_N) // context
    if not total:
        raise UserError(f"{source.spec!r} is {len(ids_N)} tokens, less than one window of {context}; give more")
    chosen = np.arange(total)
    if total > samples:
        chosen = np.sort(random_state(seed, 0).choice(total, samples, replace=False))
    windows_NxT = np.stack([ids_N[i * context : (i + 1) * context] for i in chosen]).astype(np.int32)
    rows = max(1, _BATCH_TOKENS // context)
    return [(windows_NxT[i : i + rows],) for i in range(0, len(windows_NxT), rows)]


def _pairs(source: Bitext, tokenizer: Tokenizer, samples: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    wanted = samples * _PAIRS_A_WINDOW
    if len(source.src) > wanted:
        chosen = np.sort(random_state(seed, 0).choice(len(source.src), wanted, replace=False))
        source = Bitext(source.spec, [source.src[i] for i in chosen], [source.tgt[i] for i in chosen])
    pairs = SentencePairs(source, tokenizer, _BUCKETS, _BATCH_TOKENS, keep_all=True)
    plan = pairs.plan(None, 0)
    batches = (pairs.take(plan, k) for k in range(len(plan.bucket)))
    return [(batch["src"], batch["inputs"]) for batch in batches]
