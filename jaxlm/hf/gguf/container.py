"""GGUF, the format of llama.cpp: the container, and weights as its blocks (github.com/ggml-org/ggml, docs/gguf.md).

A file is the header, typed key-value pairs, a table of tensors and their data, each at a multiple of 32 bytes. Rows of
a matrix are cut into blocks of 32 or 256 weights:

    Q8_0    32 weights: float16 d, 32 int8 codes; d * code
    Q4_0    32 weights: float16 d, 32 codes of 4 bits; d * (code - 8)
    Q5_0    32 weights: float16 d, the fifth bits of all codes as uint32, 32 codes of 4 bits; d * (code - 16)
    Q4_K    256 weights: float16 d and m, eight pairs of 6 bits (s, t) in 12 bytes, 256 codes of 4 bits; every 32
            weights have a pair, and are d * s * code - m * t
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxlm.hf.tensor_files import Lazy

__all__ = ["BLOCKS", "TYPES", "Block", "encode_codes", "encode_values", "write_gguf"]

_ALIGNMENT = 32


@dataclass(frozen=True)
class Block:
    """A type of tensor: its number in the file, weights and bytes of a block, and the range of codes of signed ones."""

    number: int
    weights: int = 1
    bytes: int = 4
    low: int = 0
    high: int = 0


TYPES = {
    "F32": Block(0), "F16": Block(1, bytes=2), "Q4_0": Block(2, 32, 18, -8, 7), "Q5_0": Block(6, 32, 22, -16, 15),
    "Q8_0": Block(8, 32, 34, -128, 127), "Q4_K": Block(12, 256, 144),
}
BLOCKS = ("Q4_0", "Q5_0", "Q8_0")  # those that hold codes around zero, the smallest first


# Weights --------------------------------------------------------------------------------------------------------------


def encode_codes(kind: str, codes_RxN: np.ndarray, scale_RxB: np.ndarray) -> np.ndarray:
    """Codes within the range of ``kind`` (one of ``BLOCKS``), and a scale for each 32, as bytes ``[R, ...]``."""
    rows, blocks = scale_RxB.shape
    d = scale_RxB.astype("<f2")[..., None].view(np.uint8)
    codes = codes_RxN.reshape(rows, blocks, 32)
    if kind == "Q8_0":
        parts = [d, codes.astype(np.int8).view(np.uint8)]
    else:
        unsigned = (codes.astype(np.int16) - TYPES[kind].low).astype(np.uint8)
        low = unsigned & 15
        nibbles = low[..., :16] | low[..., 16:] << 4
        fifth = [] if kind == "Q4_0" else [np.packbits(unsigned >> 4, axis=-1, bitorder="little")]
        parts = [d, *fifth, nibbles]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def encode_values(kind: str, values_RxN: np.ndarray) -> np.ndarray:
    """Float32 weights rounded to blocks: bytes ``[R, ...]``; for "F32" and "F16", cast."""
    if kind in ("F32", "F16"):
        return np.ascontiguousarray(values_RxN, "<f4" if kind == "F32" else "<f2")
    rows = len(values_RxN)
    if kind == "Q4_K":
        return _q4_k(values_RxN.reshape(rows, -1, 8, 32)).reshape(rows, -1)
    groups = values_RxN.reshape(rows, -1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], axis=-1)
    # The largest weight gets the outermost code of its side: of one more step on the negative side, where there is one.
    scale = np.abs(largest) / 127 if kind == "Q8_0" else largest / TYPES[kind].low
    scale = scale.astype(np.float16).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scale == 0, 0, np.rint(groups / scale))
    codes = codes.clip(TYPES[kind].low, TYPES[kind].high)
    return encode_codes(kind, codes.reshape(rows, -1), scale[..., 0])


def _q4_k(w_RxSx8x32: np.ndarray) -> np.ndarray:
    """Each 32 weights get the step and offset with the least squared error; both are then rounded to 6 bits."""
    scale, offset = _fit(w_RxSx8x32)
    d, s = _six_bits(scale)
    m, t = _six_bits(offset)
    step, shift = (d[..., None] * s)[..., None], (m[..., None] * t)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(step == 0, 0, np.rint((w_RxSx8x32 + shift) / step)).clip(0, 15).astype(np.uint8)
    s, t = s.astype(np.uint8), t.astype(np.uint8)
    # The first four pairs are whole in bytes 0-3 and 4-7, but for the upper bits there, which are those of the others.
    first = s[..., :4] | (s[..., 4:] >> 4) << 6
    second = t[..., :4] | (t[..., 4:] >> 4) << 6
    third = (s[..., 4:] & 15) | (t[..., 4:] & 15) << 4
    pairs = codes.reshape(*codes.shape[:2], 4, 2, 32)
    nibbles = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*codes.shape[:2], 128)
    halves = [part.astype("<f2")[..., None].view(np.uint8) for part in (d, m)]
    return np.concatenate([*halves, first, second, third, nibbles], axis=-1)


def _fit(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(step, offset), of ``step * code - offset`` with codes 0 to 15: of some ranges, the one that fits best after a
    least-squares fit to its codes."""
    low, high = np.minimum(w.min(-1, keepdims=True), 0), w.max(-1, keepdims=True)
    best = (np.full(w.shape[:-1], np.inf), np.zeros(w.shape[:-1], np.float32), np.zeros(w.shape[:-1], np.float32))
    for steps in (13.5, 14.0, 14.5, 15.0, 15.5, 16.0, 16.5):
        step = np.maximum(high - low, 0) / steps
        codes = np.where(step > 0, np.rint((w - low) / np.where(step > 0, step, 1)), 0).clip(0, 15)
        spread = codes - codes.mean(-1, keepdims=True)
        power = (spread**2).sum(-1)
        fitted = np.where(power > 0, (spread * w).sum(-1) / np.where(power > 0, power, 1), 0)
        offset = fitted * codes.mean(-1) - w.mean(-1)
        held = offset < 0  # offsets are not negative: then the line goes through zero
        through = (codes * w).sum(-1) / np.maximum((codes**2).sum(-1), 1e-30)
        fitted, offset = np.where(held, through, fitted), np.maximum(offset, 0)
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


# The container --------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], Lazy]]
) -> None:
    """Writes a file. Integers are stored as uint32 (in lists int32), other numbers as float32; a list has one type.

    ``tensors`` are by name the type, the shape (outputs first) and the bytes, which are made one at a time.
    """
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_text(key))
            _write_value(file, value)
        offset = 0
        for name, (kind, shape, data) in tensors.items():
            file.write(_text(name) + struct.pack("<I", len(shape)))
            file.write(struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", TYPES[kind].number, offset))
            offset += data.nbytes + -data.nbytes % _ALIGNMENT
        for _, _, data in tensors.values():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            file.write(np.ascontiguousarray(data.make()).reshape(-1).view(np.uint8).data)
        file.write(bytes(-file.tell() % _ALIGNMENT))


def _text(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _write_value(file: BinaryIO, value: Any) -> None:
    if isinstance(value, list):
        kind, form = _list_type(value)
        file.write(struct.pack("<IIQ", 9, kind, len(value)))
        file.write(b"".join(map(_text, value)) if kind == 8 else struct.pack(f"<{len(value)}{form}", *value))
    elif isinstance(value, bool):
        file.write(struct.pack("<I?", 7, value))
    elif isinstance(value, int):
        file.write(struct.pack("<II", 4, value))
    elif isinstance(value, float):
        file.write(struct.pack("<If", 6, value))
    else:
        file.write(struct.pack("<I", 8) + _text(value))


def _list_type(values: Sequence[Any]) -> tuple[int, str]:
    if isinstance(values[0], str):
        return 8, ""
    return (6, "f") if isinstance(values[0], float) else (5, "i")
