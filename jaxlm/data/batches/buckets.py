"""Buckets: batches of examples in a few fixed lengths, so that the training step compiles once for each length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.shuffle import random_state


def bucket_rows(length: int, batch_tokens: int, multiple: int) -> int:
    """The rows of a batch of a bucket: ``batch_tokens // length``, rounded down to a multiple of both 8 and
    ``multiple``; if that gives 0, to a multiple of ``multiple``; and at least ``multiple``."""
    for unit in (math.lcm(8, multiple), multiple):
        if rows := batch_tokens // length // unit * unit:
            return rows
    return multiple


@dataclass(frozen=True)
class BucketShapes:
    """The shapes of the batches of sentence pairs.

    Attributes:
        lengths: padded lengths.
        batch_tokens: padded tokens of a batch, counted on one side.
        extend: whether pairs that fit no length get longer buckets (each twice as long as the one before); otherwise
            they are left out.
        multiple: the number of rows of a batch is a multiple of it (devices, processes).
    """

    lengths: tuple[int, ...]
    batch_tokens: int
    extend: bool
    multiple: int = 1

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 2:
            raise UserError(f"data.buckets is {self.lengths}; give padded lengths of at least 2, such as (16, 32, 64)")

    def up_to(self, longest: int) -> list[int]:
        """The lengths of the buckets, shortest first, for examples of up to ``longest`` tokens."""
        lengths = sorted(set(self.lengths))
        while self.extend and lengths[-1] < longest:
            lengths.append(2 * lengths[-1])
        return lengths

    def rows(self, length: int) -> int:
        """The rows of a batch of a bucket; see ``bucket_rows``."""
        return bucket_rows(length, self.batch_tokens, self.multiple)


@dataclass(frozen=True)
class EpochPlan:
    """The batches of an epoch. Batch k holds the examples ``order[starts[k]:starts[k + 1]]``, padded to the length of
    bucket ``bucket[k]``."""

    order: np.ndarray  # [examples]
    starts: np.ndarray  # [batches + 1]
    bucket: np.ndarray  # [batches]

    def examples(self, k: int) -> np.ndarray:
        """The examples of batch k."""
        return self.order[self.starts[k] : self.starts[k + 1]]


def plan_epoch(bucket_of: np.ndarray, order: np.ndarray, rows: list[int], seed: int | None, epoch: int) -> EpochPlan:
    """Plans the batches of an epoch. The last batch of a bucket may be partial. The number of batches is the same in
    every epoch.

    Args:
        bucket_of: the bucket of every example.
        order: the examples that take part.
        rows: the rows of a batch, of every bucket.
        seed: shuffles the examples and the batches, differently in each epoch; None: examples in order, bucket by
            bucket.
    """
    random = None if seed is None else random_state(seed, epoch)
    if random:
        order = random.permutation(order)
    of = bucket_of[order]
    order = order[np.argsort(of, kind="stable")]
    starts, buckets, begin = [], [], 0
    for bucket, count in enumerate(np.bincount(of, minlength=len(rows))):
        starts.append(np.arange(begin, begin + count, rows[bucket]))
        buckets.append(np.full(len(starts[-1]), bucket))
        begin += count
    start, bucket = np.concatenate(starts), np.concatenate(buckets)
    if random:
        shuffle = random.permutation(len(start))
        size = np.diff(start, append=begin)[shuffle]
        order = order[np.repeat(start[shuffle] - (np.cumsum(size) - size), size) + np.arange(begin)]
        start, bucket = np.cumsum(size) - size, bucket[shuffle]
    return EpochPlan(order, np.append(start, begin), bucket)
