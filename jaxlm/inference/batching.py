"""Pads rows of tokens to a few shapes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bucket(n: int, smallest: int = 16) -> int:
    """The first of 16, 24, 32, 48, 64, 96, ... (powers of two and the points halfway) that is at least ``n``."""
    size = smallest
    while size < n:
        size = size // 3 * 4 if size % 3 == 0 else size * 3 // 2
    return size


def power_of_two(n: int) -> int:
    """The first power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def pad_rows(rows: Sequence[Sequence[int]], shape: tuple[int, int], pad_id: int, *, left: bool = False) -> np.ndarray:
    """An int32 array of ``shape`` with each row at its left edge; with ``left``, the padding is on the left instead."""
    out = np.full(shape, pad_id, np.int32)
    for i, row in enumerate(rows):
        begin = shape[1] - len(row) if left else 0
        out[i, begin : begin + len(row)] = row
    return out


def batches_by_length(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """The indices of ``lengths`` in batches of at most ``rows``: sorted by length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + rows] for i in range(0, len(order), rows)]
