"""Codes of a few bits packed into 32-bit words, as the layouts of quantized weights store them."""

from __future__ import annotations

import numpy as np

from jaxlm.checkpoint.bitpack import pack_bits, unpack_bits

__all__ = ["pack_int32", "unpack_int32"]


def pack_int32(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[rows, columns]`` below ``2**bits`` as int32 ``[rows, ceil(columns * bits / 32)]``: the bits of each row
    one after the other, the lowest first."""
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // 32) * 32), np.uint8)
    padded[:, :columns] = codes
    words = pack_bits(padded.reshape(-1), bits).view("<i4").reshape(rows, -1)
    return np.ascontiguousarray(words[:, : -(-columns * bits // 32)])


def unpack_int32(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The uint8 codes ``[rows, columns]`` of ``pack_int32``, or of the older packing of ``32 // bits`` whole codes in a
    word. The number of words shows which of the two it is.

    Raises:
        ValueError: the number of words fits neither.
    """
    rows, found = words.shape
    codes_per_word = 32 // bits
    if found == -(-columns * bits // 32):
        padded = np.zeros((rows, -(-columns // 32) * bits), "<i4")
        padded[:, :found] = words
        count = rows * (padded.shape[1] * 32 // bits)
        codes = unpack_bits(padded.view(np.uint8).reshape(-1), bits, count).reshape(rows, -1)
    elif found == -(-columns // codes_per_word):
        shifts = np.arange(codes_per_word, dtype=np.uint32) * np.uint32(bits)
        codes = (words.astype("<u4", copy=False)[:, :, None].view(np.uint32) >> shifts) & np.uint32(2**bits - 1)
        codes = codes.astype(np.uint8).reshape(rows, -1)
    else:
        raise ValueError(f"{found} words a row do not hold {columns} codes of {bits} bits")
    return codes[:, :columns]
