"""Unsigned integers of a few bits packed without gaps, the lowest bits first."""

from __future__ import annotations

import numpy as np


def packed_size(count: int, width: int) -> int:
    """Bytes that ``count`` values of ``width`` bits take."""
    return (count * width + 7) // 8


def pack_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Flat uint8 ``values`` below ``2**width`` (width 0 to 8) as ``packed_size`` bytes."""
    if width == 8:
        return values
    # Eight values fill `width` bytes exactly: gather them in a 64-bit word and keep its lowest bytes.
    groups = np.zeros((len(values) + 7) // 8 * 8, np.uint8)
    groups[: len(values)] = values
    words = np.zeros(len(groups) // 8, "<u8")
    for i, column in enumerate(groups.reshape(-1, 8).T):
        words |= column.astype(np.uint64) << np.uint64(i * width)
    packed = words.view(np.uint8).reshape(-1, 8)[:, :width].ravel()
    return packed[: packed_size(len(values), width)]


def unpack_bits(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """The ``count`` uint8 values that ``pack_bits`` packed; ``packed`` must have exactly their size."""
    if len(packed) != packed_size(count, width):
        raise ValueError(f"{count} values of {width} bits take {packed_size(count, width)} bytes, not {len(packed)}")
    if width == 8:
        return packed
    groups = (count + 7) // 8
    words = np.zeros((groups, 8), np.uint8)
    padded = np.zeros(groups * width, np.uint8)
    padded[: len(packed)] = packed
    words[:, :width] = padded.reshape(groups, width)
    words = words.view("<u8")[:, 0]
    values = np.empty((groups, 8), np.uint8)
    for i in range(8):
        values[:, i] = (words >> np.uint64(i * width)) & np.uint64(2**width - 1)
    return values.reshape(-1)[:count]
