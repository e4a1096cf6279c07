"""Sentence pairs in batches of about equal token counts, bucketed by length.

A pair goes to the smallest bucket that holds both of its sides with their eos. A bucket of length L has as many rows as
``batch_tokens`` allows. Each bucket is one shape, so the training step compiles once for each bucket.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.batch import Batch
from jaxlm.data.batches.buckets import BucketShapes, EpochPlan, plan_epoch
from jaxlm.data.batches.encoding import EncodedDocuments
from jaxlm.data.batches.token_cache import hash_texts, load_or_build, write_arrays
from jaxlm.data.sources.types import Bitext
from jaxlm.data.tokenizers.tokenizer import Tokenizer

_SENTENCES = 1 << 14  # encoded at a time


class SentencePairs:
    """Encoded sentence pairs, their buckets, and batches of them."""

    def __init__(
        self, source: Bitext, tokenizer: Tokenizer, shapes: BucketShapes, *, source_language: str | None = None,
        target_language: str | None = None, start_id: int | None = None, cache: str = "",
    ):
        """
        Args:
            source: the sentence pairs.
            tokenizer: must have pad and eos tokens.
            shapes: of the batches.
            source_language, target_language: see ``Tokenizer.encode_source`` and ``encode_target``.
            start_id: the first decoder input; None: the bos token of the tokenizer.
            cache: the directory of the token cache (``data.batches.token_cache``); "": none.

        Raises:
            UserError: when the tokenizer lacks a special token, or when no pair fits a bucket.
        """
        roles = ("pad", "bos", "eos") if start_id is None else ("pad", "eos")
        missing = [role for role in roles if getattr(tokenizer, f"{role}_id") is None]
        if missing:
            raise UserError(f"the tokenizer has no {' or '.join(missing)} token, which translation needs; use another")
        self._pad, self._start = tokenizer.pad_id, tokenizer.bos_id if start_id is None else start_id
        fingerprint = tokenizer.fingerprint() if cache else ""
        self._src = _Sentences(
            source.src, partial(tokenizer.encode_source, language=source_language), cache,
            f"source {source_language} {fingerprint}",
        )
        self._tgt = _Sentences(
            source.tgt, partial(tokenizer.encode_target, language=target_language), cache,
            f"target {target_language} {fingerprint}",
        )
        length = np.maximum(self._src.lengths, self._tgt.lengths)[:-1]
        self._lengths = shapes.up_to(length.max())
        self._bucket_of = np.searchsorted(self._lengths, length)
        self._used = np.flatnonzero(self._bucket_of < len(self._lengths))
        self._longest = int(length.max())
        if not len(self._used):
            raise UserError(
                f"no pair of {source.spec!r} fits the longest bucket, {self._lengths[-1]} tokens; raise data.buckets"
            )
        self._rows = [shapes.rows(length) for length in self._lengths]

    def __len__(self) -> int:
        """The number of pairs in an epoch."""
        return len(self._used)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes (rows, length) of the batches that occur, shortest first."""
        occurring = np.unique(self._bucket_of[self._used])
        return [(self._rows[bucket], self._lengths[bucket]) for bucket in occurring]

    def plan(self, seed: int | None, epoch: int) -> EpochPlan:
        """The batches of an epoch; see ``plan_epoch``."""
        return plan_epoch(self._bucket_of, self._used, self._rows, seed, epoch)

    def batch(self, plan: EpochPlan, k: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """A shard of the rows of batch k: ``src``, ``inputs`` (start + target), ``targets`` (target + eos) int32 and
        ``weights`` float32, each [rows, length].

        Rows beyond the last pair have weight 0 and hold an empty pair, because each row needs a token to attend to.
        """
        bucket = plan.bucket[k]
        length, rows = self._lengths[bucket], self._rows[bucket] // num_shards
        pairs_B = np.full(rows, len(self._bucket_of))  # the empty pair
        pairs = plan.examples(k)[shard * rows:(shard + 1) * rows]
        pairs_B[:len(pairs)] = pairs
        src_BxS, _ = self._src.padded(pairs_B, length, self._pad)
        targets_BxT, mask_BxT = self._tgt.padded(pairs_B, length, self._pad)
        inputs_BxT = np.full_like(targets_BxT, self._start)
        inputs_BxT[:, 1:] = np.where(mask_BxT[:, 1:], targets_BxT[:, :-1], self._pad)
        mask_BxT[len(pairs):] = False
        return {"src": src_BxS, "inputs": inputs_BxT, "targets": targets_BxT, "weights": mask_BxT.astype(np.float32)}

    def report(self) -> dict[str, int | float]:
        """Figures of an epoch: ``too_long`` counts the pairs that are left out; ``efficiency`` is the share of tokens
        that are not padding."""
        plan = self.plan(None, 0)
        padded = 2 * sum(self._rows[bucket] * self._lengths[bucket] for bucket in plan.bucket)
        src, tgt = (int(side.lengths[self._used].sum()) for side in (self._src, self._tgt))
        return {
            "pairs": len(self._used), "too_long": len(self._bucket_of) - len(self._used), "longest": self._longest,
            "source_tokens": src, "target_tokens": tgt, "batches": len(plan.bucket), "efficiency": (src + tgt) / padded,
        }

    def documents(self) -> Iterator[EncodedDocuments]:
        """Each pair as one document, some at a time, including the pairs that are left out of batches."""
        for start in range(0, len(self._bucket_of), _SENTENCES):
            stop = min(start + _SENTENCES, len(self._bucket_of))
            yield join_pairs(side.span(start, stop) for side in (self._src, self._tgt))

    def notes(self) -> list[str]:
        """A sentence about the pairs that are left out, if any."""
        total, used = len(self._bucket_of), len(self._used)
        if total == used:
            return []
        return [
            f"{total - used:,} of {total:,} pairs are longer than {self._lengths[-1]} tokens (the longest: "
            f"{self._longest}) and are left out of training; raise data.buckets to keep them"
        ]


class _Sentences:
    """The sentences of one language with their eos, end to end, and an empty sentence after the last."""

    def __init__(self, texts: list[str], encode: Callable[[list[str]], list[list[int]]], cache: str, name: str):
        """``name`` distinguishes how ``encode`` encodes, for the key of the ``cache``."""
        texts = [*texts, ""]

        def parts() -> Iterator[EncodedDocuments]:
            for start in range(0, len(texts), _SENTENCES):  # lists of Python's integers take ten times the memory
                rows = encode(texts[start : start + _SENTENCES])
                ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
                yield EncodedDocuments(ids, np.array([*map(len, rows)]))

        encoded = (
            load_or_build(cache, f"{name} {hash_texts(texts)}", lambda new: write_arrays(parts(), new)) if cache
            else EncodedDocuments.concatenate(parts())
        )
        self.ids, self.lengths = encoded.ids, encoded.lengths
        self._starts = np.cumsum(self.lengths) - self.lengths

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of consecutive sentences, end to end, and their lengths."""
        return self.ids[self._starts[start] : self._starts[stop]], self.lengths[start:stop]

    def padded(self, rows_B: np.ndarray, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
        """Some sentences: ids [B, length] int32, and a mask [B, length] bool of what is not padding."""
        offset_L = np.arange(length)
        mask_BxL = offset_L < self.lengths[rows_B][:, None]
        at_BxL = np.minimum(self._starts[rows_B][:, None] + offset_L, len(self.ids) - 1)
        return np.where(mask_BxL, self.ids[at_BxL], pad).astype(np.int32), mask_BxL


def join_pairs(sides: Iterable[tuple[np.ndarray, np.ndarray]]) -> EncodedDocuments:
    """Each sentence with its translation as one document. A side is (ids end to end, lengths of the sentences)."""
    sides = list(sides)
    order = np.argsort(np.concatenate([np.arange(len(lengths)) for _, lengths in sides]), kind="stable")
    lengths = np.concatenate([lengths for _, lengths in sides])
    starts = np.cumsum(lengths) - lengths
    sizes = lengths[order]
    at = np.repeat(starts[order] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    return EncodedDocuments(np.concatenate([ids for ids, _ in sides])[at], lengths.reshape(len(sides), -1).sum(0))
