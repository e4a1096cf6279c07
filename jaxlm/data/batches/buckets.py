"""Batches of examples in a few fixed lengths: each bucket is one shape, so the step compiles once a bucket."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jaxlm.data.batches.shuffle import random_state


def bucket_rows(length: int, batch_tokens: int, multiple: int) -> int:
    """Rows of a bucket: ``batch_tokens // length``, rounded down to a multiple of both 8 and ``multiple``, or of
    ``multiple`` alone where that leaves nothing, and at least ``multiple``."""
    for unit in (math.lcm(8, multiple), multiple):
        if rows := batch_tokens // length // unit * unit:
            return rows
    return multiple


@dataclass(frozen=True)
class EpochPlan:
    """An epoch: batch k holds the examples ``order[starts[k]:starts[k + 1]]``, in bucket ``bucket[k]``."""

    order: np.ndarray  # [examples]
    starts: np.ndarray  # [batches + 1]
    bucket: np.ndarray  # [batches]


def plan_epoch(bucket_of: np.ndarray, order: np.ndarray, rows: list[int], seed: int | None, epoch: int) -> EpochPlan:
    """The batches of an epoch: shuffled examples in shuffled batches, or all in order, bucket by bucket, without
    ``seed``. The last batch of a bucket may be partial. The number of batches is the same in every epoch.

    Args:
        bucket_of: of every example.
        order: the examples that take part.
        rows: of a batch of each bucket.
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
