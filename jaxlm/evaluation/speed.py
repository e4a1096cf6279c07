"""How fast models score text, measured so that the figures may be compared."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from typing import TypeVar

import jax
import numpy as np

from jaxlm.data.batches.encoding import EncodedDocuments, encode_documents
from jaxlm.data.sources.types import Bitext, Dialogues, Source
from jaxlm.evaluation.likelihood import StreamWindows, pair_batches, row_nll, stream

Name = TypeVar("Name", bound=Hashable)


def tokens_per_second(
    lms: Mapping[Name, object], source: Source, *, context: int = 0, rows: int = 16, rounds: int = 7,
    **languages: str | None,
) -> dict[Name, float]:
    """Target tokens a second of the forward pass with loss, on one batch, after compilation.

    The models must share a tokenizer. They take turns, ``rounds`` times, and the best time of each counts: whatever
    else the machine does then hits all of them alike. The batch holds ``rows`` windows of ``context`` tokens (0: 256),
    or of a bitext (in the ``languages`` of ``pair_batches``) the bucket with most tokens to predict.
    """
    first = next(iter(lms.values()))
    if isinstance(source, Bitext):
        batch = max(pair_batches(first, source, rows, **languages), key=lambda batch: batch["weights"].sum())
    else:
        context = context or 256
        dialogues = isinstance(source, Dialogues)
        text = encode_documents(source, first.tokenizer) if dialogues else stream(first, source)
        ids_N = np.resize(text.ids, rows * context)
        text = EncodedDocuments(ids_N, np.array([len(ids_N)]), first_token=text.first_token)
        batch = next(StreamWindows(text, context).batches(rows))
    batch = jax.device_put(batch)
    best = dict.fromkeys(lms, float("inf"))
    for turn in range(rounds + 1):
        for name, lm in lms.items():
            begin = time.perf_counter()
            row_nll(lm.graphdef, lm.params, batch).block_until_ready()
            if turn > 0:  # the first one compiles
                best[name] = min(best[name], time.perf_counter() - begin)
    tokens = float(batch["weights"].sum())
    return {name: tokens / seconds for name, seconds in best.items()}
