"""Sentence pairs in a few fixed shapes: batches of about equal token counts, bucketed by length.

A pair goes to the smallest bucket that holds both of its sides with their eos; a bucket of length L has as many rows as
``batch_tokens`` allows. Each bucket is one shape, so the step compiles once a bucket.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.batch import Batch
from jaxlm.data.batches.buckets import EpochPlan, bucket_rows, plan_epoch
from jaxlm.data.batches.encoding import EncodedDocuments
from jaxlm.data.batches.token_cache import hash_texts, load_or_build, write_arrays
from jaxlm.data.sources.types import Bitext
from jaxlm.data.tokenizers.tokenizer import Tokenizer

_AT_A_TIME = 1 << 14  # sentences encoded


class SentencePairs:
    """Encoded pairs, their buckets, and the batches made of them."""

    def __init__(
        self, source: Bitext, tokenizer: Tokenizer, buckets: tuple[int, ...], batch_tokens: int, *,
        keep_all: bool, multiple: int = 1, source_language: str | None = None, target_language: str | None = None,
        start_id: int | None = None, cache: str = "",
    ):
        """
        Args:
            source: the text.
            tokenizer: has pad and eos.
            buckets: padded lengths.
            batch_tokens: padded tokens of a batch on its larger side.
            keep_all: longer buckets (each twice the last) take pairs that fit none; otherwise those are left out.
            multiple: the number of rows is one of this (devices, processes).
            source_language, target_language: see ``Tokenizer.encode_source`` and ``encode_target``.
            start_id: what decoder inputs start with; None: the bos token of the tokenizer.
            cache: where tokenized text is kept (``data.batches.token_cache``).

        Raises:
            UserError: no buckets, a tokenizer without the special tokens, or no pair that fits.
        """
        roles = ("pad", "bos", "eos") if start_id is None else ("pad", "eos")
        missing = [role for role in roles if getattr(tokenizer, f"{role}_id") is None]
        if missing:
            raise UserError(f"the tokenizer has no {' or '.join(missing)} token, which translation needs; use another")
        if not buckets or min(buckets) < 2:
            raise UserError(f"data.buckets is {buckets}; give padded lengths of at least 2, such as (16, 32, 64)")
        self._pad, self._start = tokenizer.pad_id, tokenizer.bos_id if start_id is None else start_id
        made_by = tokenizer.fingerprint() if cache else ""
        self._src = _Side(
            source.src, partial(tokenizer.encode_source, language=source_language), cache,
            f"source {source_language} {made_by}",
        )
        self._tgt = _Side(
            source.tgt, partial(tokenizer.encode_target, language=target_language), cache,
            f"target {target_language} {made_by}",
        )
        length = np.maximum(self._src.lengths, self._tgt.lengths)[:-1]
        self._buckets = sorted(set(buckets))
        while keep_all and self._buckets[-1] < length.max():
            self._buckets.append(2 * self._buckets[-1])
        self._bucket_of = np.searchsorted(self._buckets, length)
        self._kept = np.flatnonzero(self._bucket_of < len(self._buckets))
        self._longest = int(length.max())
        if not len(self._kept):
            raise UserError(
                f"no pair of {source.spec!r} fits the longest bucket, {self._buckets[-1]} tokens; raise data.buckets"
            )
        self._rows = [bucket_rows(length, batch_tokens, multiple) for length in self._buckets]

    def __len__(self) -> int:
        """Pairs in an epoch."""
        return len(self._kept)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, length) of the batches that occur, shortest first."""
        used = np.unique(self._bucket_of[self._kept])
        return [(self._rows[b], self._buckets[b]) for b in used]

    def plan(self, seed: int | None, epoch: int) -> EpochPlan:
        return plan_epoch(self._bucket_of, self._kept, self._rows, seed, epoch)

    def take(self, plan: EpochPlan, k: int, part: int = 0, parts: int = 1) -> Batch:
        """Rows ``part`` of ``parts`` of batch k: ``src``, ``inputs`` (start + target), ``targets`` (target + eos) int32
        and ``weights`` float32, each [rows, length].

        Rows beyond the last pair have weight 0 and hold an empty pair, so that no row is without a token to attend to.
        """
        bucket = plan.bucket[k]
        length, rows = self._buckets[bucket], self._rows[bucket] // parts
        pairs_B = np.full(rows, len(self._bucket_of))  # the empty pair
        chosen = plan.order[plan.starts[k]:plan.starts[k + 1]][part * rows:(part + 1) * rows]
        pairs_B[:len(chosen)] = chosen
        src_BxS, _ = self._src.take(pairs_B, length, self._pad)
        targets_BxT, mask_BxT = self._tgt.take(pairs_B, length, self._pad)
        inputs_BxT = np.full_like(targets_BxT, self._start)
        inputs_BxT[:, 1:] = np.where(mask_BxT[:, 1:], targets_BxT[:, :-1], self._pad)
        mask_BxT[len(chosen):] = False
        return {"src": src_BxS, "inputs": inputs_BxT, "targets": targets_BxT, "weights": mask_BxT.astype(np.float32)}

    def report(self) -> dict[str, int | float]:
        """``too_long`` pairs were left out; ``efficiency`` is the real part of the padded tokens of an epoch."""
        plan = self.plan(None, 0)
        padded = 2 * sum(self._rows[b] * self._buckets[b] for b in plan.bucket)
        src, tgt = (int(side.lengths[self._kept].sum()) for side in (self._src, self._tgt))
        return {
            "pairs": len(self._kept), "too_long": len(self._bucket_of) - len(self._kept), "longest": self._longest,
            "source_tokens": src, "target_tokens": tgt, "batches": len(plan.bucket), "efficiency": (src + tgt) / padded,
        }

    def documents(self) -> Iterator[EncodedDocuments]:
        """Each pair as one document, some at a time, those that are left out of batches too."""
        for at in range(0, len(self._bucket_of), _AT_A_TIME):
            stop = min(at + _AT_A_TIME, len(self._bucket_of))
            yield join_pairs(side.some(at, stop) for side in (self._src, self._tgt))

    def notes(self) -> list[str]:
        total, kept = len(self._bucket_of), len(self._kept)
        if total == kept:
            return []
        return [
            f"{total - kept:,} of {total:,} pairs are longer than {self._buckets[-1]} tokens (the longest: "
            f"{self._longest}) and are left out of training; raise data.buckets to keep them"
        ]


class _Side:
    """One language: sentences with their eos, end to end, and an empty one at the end."""

    def __init__(self, texts: list[str], encode: Callable[[list[str]], list[list[int]]], cache: str, name: str):
        """``name`` says how ``encode`` encodes, for the ``cache``."""
        texts = [*texts, ""]

        def parts() -> Iterator[EncodedDocuments]:
            for at in range(0, len(texts), _AT_A_TIME):  # Python's numbers take ten times the room
                rows = encode(texts[at : at + _AT_A_TIME])
                ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
                yield EncodedDocuments(ids, np.array([*map(len, rows)]))

        encoded = (
            load_or_build(cache, f"{name} {hash_texts(texts)}", lambda new: write_arrays(parts(), new)) if cache
            else EncodedDocuments.joined(parts())
        )
        self.ids, self.lengths = encoded.ids, encoded.lengths
        self._starts = np.cumsum(self.lengths) - self.lengths

    def some(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """ids of some sentences, end to end, and their lengths."""
        return self.ids[self._starts[start] : self._starts[stop]], self.lengths[start:stop]

    def take(self, rows_B: np.ndarray, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [B, length] int32, and where they are not padding, bool."""
        offset_L = np.arange(length)
        mask_BxL = offset_L < self.lengths[rows_B][:, None]
        at_BxL = np.minimum(self._starts[rows_B][:, None] + offset_L, len(self.ids) - 1)
        return np.where(mask_BxL, self.ids[at_BxL], pad).astype(np.int32), mask_BxL


def join_pairs(sides: Iterable[tuple[np.ndarray, np.ndarray]]) -> EncodedDocuments:
    """Sentences and their translations as one document each; a side is ids end to end and lengths."""
    sides = list(sides)
    order = np.argsort(np.concatenate([np.arange(len(lengths)) for _, lengths in sides]), kind="stable")
    lengths = np.concatenate([lengths for _, lengths in sides])
    starts = np.cumsum(lengths) - lengths
    sizes = lengths[order]
    at = np.repeat(starts[order] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    return EncodedDocuments(np.concatenate([ids for ids, _ in sides])[at], lengths.reshape(len(sides), -1).sum(0))
