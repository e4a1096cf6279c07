"""The types of tensors in llama.cpp's library ggml (github.com/ggml-org/ggml), and weights encoded in them.

Quantized types cut the rows of a matrix into blocks of 32 or 256 weights:

    Q8_0    32 weights: float16 d, 32 int8 codes; d * code
    Q4_0    32 weights: float16 d, 32 codes of 4 bits; d * (code - 8)
    Q5_0    32 weights: float16 d, the fifth bits of all codes as uint32, 32 codes of 4 bits; d * (code - 16)
    Q4_K    256 weights: float16 d and m, eight pairs (s, t) of 6 bits in 12 bytes, 256 codes of 4 bits; every
            32 weights share a pair; d * s * code - m * t
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["CODE_TYPES", "GGML_TYPES", "GgmlType", "encode_codes", "encode_values"]


@dataclass(frozen=True)
class GgmlType:
    """A type of tensor.

    - ``number`` stands for it in files.
    - ``block_weights`` and ``block_bytes`` are the sizes of a block; float types have blocks of one weight.
    - ``min_code`` and ``max_code`` are the range of codes around zero, in types that have such.
    """

    number: int
    block_weights: int = 1
    block_bytes: int = 4
    min_code: int = 0
    max_code: int = 0


GGML_TYPES = {
    "F32": GgmlType(0),
    "F16": GgmlType(1, block_bytes=2),
    "Q4_0": GgmlType(2, 32, 18, -8, 7),
    "Q5_0": GgmlType(6, 32, 22, -16, 15),
    "Q8_0": GgmlType(8, 32, 34, -128, 127),
    "Q4_K": GgmlType(12, 256, 144),
}
CODE_TYPES = ("Q4_0", "Q5_0", "Q8_0")  # the types with codes around zero, the smallest first


def encode_codes(kind: str, codes_RxN: np.ndarray, scale_RxB: np.ndarray) -> np.ndarray:
    """Codes ``[R, N]`` in blocks of a type: bytes ``[R, B * block_bytes]``.

    Args:
        kind: one of ``CODE_TYPES``; the codes must be in its range.
        codes_RxN: integers, 32 a block.
        scale_RxB: the scale of each block.
    """
    rows, blocks = scale_RxB.shape
    d = scale_RxB.astype("<f2")[..., None].view(np.uint8)
    codes = codes_RxN.reshape(rows, blocks, 32)
    if kind == "Q8_0":
        parts = [d, codes.astype(np.int8).view(np.uint8)]
    else:
        unsigned = (codes.astype(np.int16) - GGML_TYPES[kind].min_code).astype(np.uint8)
        low = unsigned & 15
        nibbles = low[..., :16] | low[..., 16:] << 4
        fifth = [] if kind == "Q4_0" else [np.packbits(unsigned >> 4, axis=-1, bitorder="little")]
        parts = [d, *fifth, nibbles]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def encode_values(kind: str, values_RxN: np.ndarray) -> np.ndarray:
    """Float32 weights ``[R, N]`` rounded to a type: bytes ``[R, ...]``, or floats ``[R, N]`` for "F32" and "F16"."""
    if kind in ("F32", "F16"):
        return np.ascontiguousarray(values_RxN, "<f4" if kind == "F32" else "<f2")
    rows = len(values_RxN)
    if kind == "Q4_K":
        return _encode_q4_k(values_RxN.reshape(rows, -1, 8, 32)).reshape(rows, -1)
    groups = values_RxN.reshape(rows, -1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], axis=-1)
    # The largest weight gets the outermost code, which is negative: there is one more negative code than positive ones.
    scale = np.abs(largest) / 127 if kind == "Q8_0" else largest / GGML_TYPES[kind].min_code
    scale = scale.astype(np.float16).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scale == 0, 0, np.rint(groups / scale))
    codes = codes.clip(GGML_TYPES[kind].min_code, GGML_TYPES[kind].max_code)
    return encode_codes(kind, codes.reshape(rows, -1), scale[..., 0])


def _encode_q4_k(w_RxSx8x32: np.ndarray) -> np.ndarray:
    """Blocks of Q4_K. Each 32 weights get the step and offset with the least squared error, rounded to 6 bits."""
    scale, offset = _fit_steps(w_RxSx8x32)
    d, s = _six_bits(scale)
    m, t = _six_bits(offset)
    step, shift = (d[..., None] * s)[..., None], (m[..., None] * t)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(step == 0, 0, np.rint((w_RxSx8x32 + shift) / step)).clip(0, 15).astype(np.uint8)
    s, t = s.astype(np.uint8), t.astype(np.uint8)
    # Bytes 0-3 and 4-7 hold the first four pairs, and in their upper two bits those of the other four, whose lower bits
    # are in bytes 8-11.
    first = s[..., :4] | (s[..., 4:] >> 4) << 6
    second = t[..., :4] | (t[..., 4:] >> 4) << 6
    third = (s[..., 4:] & 15) | (t[..., 4:] & 15) << 4
    pairs = codes.reshape(*codes.shape[:2], 4, 2, 32)
    nibbles = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*codes.shape[:2], 128)
    halves = [part.astype("<f2")[..., None].view(np.uint8) for part in (d, m)]
    return np.concatenate([*halves, first, second, third, nibbles], axis=-1)


def _fit_steps(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(step, offset) ``[...]`` for weights ``[..., 32]`` as ``step * code - offset`` with codes 0 to 15.

    Of several ranges the best is kept: each gives codes, and a least-squares fit to these gives step and offset.
    """
    low, high = np.minimum(w.min(-1, keepdims=True), 0), w.max(-1, keepdims=True)
    best = (np.full(w.shape[:-1], np.inf), np.zeros(w.shape[:-1], np.float32), np.zeros(w.shape[:-1], np.float32))
    for steps in (13.5, 14.0, 14.5, 15.0, 15.5, 16.0, 16.5):
        step = np.maximum(high - low, 0) / steps
        codes = np.where(step > 0, np.rint((w - low) / np.where(step > 0, step, 1)), 0).clip(0, 15)
        spread = codes - codes.mean(-1, keepdims=True)
        power = (spread**2).sum(-1)
        fitted = np.where(power > 0, (spread * w).sum(-1) / np.where(power > 0, power, 1), 0)
        offset = fitted * codes.mean(-1) - w.mean(-1)
        clamped = offset < 0  # offsets cannot be negative: then the line goes through zero
        through_zero = (codes * w).sum(-1) / np.maximum((codes**2).sum(-1), 1e-30)
        fitted, offset = np.where(clamped, through_zero, fitted), np.maximum(offset, 0)
        fitted = np.maximum(fitted, 0)
        again = ((w + offset[..., None]) / np.where(fitted > 0, fitted, 1)[..., None]).round().clip(0, 15)
        error = ((fitted[..., None] * again - offset[..., None] - w) ** 2).sum(-1)
        better = error < best[0]
        best = tuple(np.where(better, new, old) for new, old in zip((error, fitted, offset), best, strict=True))
    return best[1].astype(np.float32), best[2].astype(np.float32)


def _six_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float16 unit ``[...]``, codes 0 to 63 ``[..., 8]``) of non-negative numbers."""
    unit = (x.max(-1) / 63).astype(np.float16).astype(np.float32)
    codes = np.where(unit[..., None] > 0, np.rint(x / np.where(unit > 0, unit, 1)[..., None]), 0)
    return unit, codes.clip(0, 63)
