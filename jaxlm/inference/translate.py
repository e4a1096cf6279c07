"""Sentences through an encoder-decoder: sorted by length, batched, beam search."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.inference.batching import batches_by_length, bucket, pad_rows, power_of_two
from jaxlm.inference.beam import Hypotheses, search_seq2seq


def translate_tokens(
    lm,
    sources: Sequence[Sequence[int]],
    *,
    beam: int = 5,
    length_penalty: float = 1.0,
    max_length: int = 128,
    exact: bool = False,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[list[int]], np.ndarray]:
    """Best translations of token rows that end with the end token; returned without it, with their scores.

    A translation has at most ``min(max_length, 2 * len(source) + 10)`` tokens, the end token included. ``progress`` is
    called with the number of sentences done so far.
    """
    config = lm.config
    out: list[list[int]] = [[] for _ in sources]
    scores = np.zeros(len(sources), np.float32)
    done = 0

    def finish(rows: list[int], found: Hypotheses) -> None:
        nonlocal done
        best, lengths, score = (np.asarray(x)[:, 0] for x in (found.tokens, found.length, found.score))
        for r, i in enumerate(rows):
            out[i] = [token for token in best[r, : lengths[r]].tolist() if token != config.eos_id]
            scores[i] = score[r]
        done += len(rows)
        if progress is not None:
            progress(done)

    if config.positions == "learned":
        max_length = min(max_length, config.max_positions)
    running: deque[tuple[list[int], Hypotheses]] = deque()  # the next batch is under way before one is read
    for rows in batches_by_length([len(source) for source in sources], batch_size):
        length = bucket(len(sources[rows[0]]))
        batch = power_of_two(len(rows))
        limits = np.zeros(batch, np.int32)
        limits[: len(rows)] = [min(max_length, 2 * len(sources[i]) + 10) for i in rows]
        src_BxS = pad_rows([sources[i] for i in rows], (batch, length), config.pad_id)
        found = search_seq2seq(
            lm.graphdef, lm.params, src_BxS, limits, np.float32(length_penalty), exact, beams=beam,
            size=min(bucket(max_length), bucket(2 * length + 10)),
        )
        running.append((rows, found))
        if len(running) > 1:
            finish(*running.popleft())
    for rows, found in running:
        finish(rows, found)
    return out, scores


def encode_sources(lm, sentences: Sequence[str]) -> list[list[int]]:
    """Token rows with the end token; UserError where a sentence does not fit a model with learned positions."""
    rows = [[*ids, lm.config.eos_id] for ids in lm.tokenizer.encode_batch(list(sentences))]
    if lm.config.positions == "learned":
        for number, row in enumerate(rows, 1):
            if len(row) > lm.config.max_positions:
                raise UserError(
                    f"sentence {number} has {len(row)} tokens and the model reads {lm.config.max_positions}: split it"
                )
    return rows


def translate(
    lm,
    sentences: str | Sequence[str],
    *,
    beam: int = 5,
    length_penalty: float = 1.0,
    max_length: int = 128,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One translation a sentence, in order; a blank sentence gives an empty one.

    ``lm`` has ``config``, ``graphdef``, ``params`` and ``tokenizer``; ``beam`` 1 is greedy. See ``translate_tokens``.
    """
    sentences = [sentences] if isinstance(sentences, str) else list(sentences)
    if lm.config.kind != "seq2seq":
        raise UserError("this is a language model, not a translation model: use generate instead of translate")
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer: put a tokenizer.json beside its config.json")
    if beam < 1 or max_length < 1 or batch_size < 1:
        raise UserError("beam, max_length and batch_size must be at least 1")
    told = [i for i, sentence in enumerate(sentences) if sentence.strip()]
    sources = encode_sources(lm, sentences)
    found, _ = translate_tokens(
        lm, [sources[i] for i in told], beam=beam, length_penalty=length_penalty, max_length=max_length,
        batch_size=batch_size, progress=progress,
    )
    out = [""] * len(sentences)
    for i, tokens in zip(told, found, strict=True):
        out[i] = lm.tokenizer.decode(tokens)
    return out
