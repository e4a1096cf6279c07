"""Arrays as byte streams: how codes and floats are laid out, and which coding each stream gets. All of it is lossless.

A *layout* says which values are kept:

    full    all of them
    mask    those that are not zero, and a bit for each value that says which those are
    gaps    those that are not zero, and the number of zeros before each (255: that many zeros and no value)

The values kept, the mask and the gaps are streams of symbols of up to 8 bits; floats become one stream a byte, the
exponent's first. A *method* says how a stream is stored: ``raw`` (bit-packed), ``huffman`` or ``zstd``. For each array
the layout, and for each stream the method, that take the fewest bytes are chosen, and recorded beside the streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes  # noqa: F401  registers bfloat16 and its kin as NumPy dtypes
import numpy as np
import zstandard

from jaxlm.checkpoint import huffman
from jaxlm.checkpoint.bitpack import pack_bits, packed_size, unpack_bits
from jaxlm.checkpoint.huffman import Corrupt

ESCAPE = 255
Coded = dict[str, tuple[str, np.ndarray]]  # stream -> method, bytes


@dataclass(frozen=True)
class Part:
    """One array, coded. ``gaps`` is the number of entries of the gaps stream, the only count not known from others."""

    layout: str
    streams: Coded
    gaps: int = 0

    @property
    def nbytes(self) -> int:
        return sum(data.nbytes for _, data in self.streams.values())


def encode_stream(symbols: np.ndarray, width: int, storage: str) -> tuple[str, np.ndarray]:
    """Flat uint8 symbols of ``width`` bits by the cheapest method; ``plain`` storage has only ``raw``."""
    raw = packed_size(len(symbols), width)
    choices = {}
    if storage == "huffman" and len(symbols):
        if huffman.coded_size(np.bincount(symbols, minlength=256)) < raw:
            choices["huffman"] = huffman.encode(symbols)
        choices["zstd"] = np.frombuffer(zstandard.ZstdCompressor(level=3).compress(symbols.data), np.uint8)
    method = min(choices, key=lambda name: len(choices[name]), default="raw")
    if method == "raw" or len(choices[method]) >= raw:
        return "raw", pack_bits(symbols, width)
    return method, choices[method]


def decode_stream(method: str, data: np.ndarray, width: int, count: int) -> np.ndarray:
    """The ``count`` symbols of a stream. Raises Corrupt before it allocates more than ``count`` bytes."""
    if method == "huffman":
        return huffman.decode(data, count)
    if method == "raw":
        return unpack_bits(data, width, count)
    if method != "zstd":
        raise Corrupt(f"unknown method {method!r}")
    try:
        if zstandard.frame_content_size(data.data) != count:
            raise Corrupt(f"its frame does not hold {count} symbols")
        symbols = np.frombuffer(zstandard.ZstdDecompressor().decompress(data.data), np.uint8)
    except zstandard.ZstdError as error:
        raise Corrupt(str(error)) from None
    if len(symbols) != count:
        raise Corrupt(f"{len(symbols)} symbols, not {count}")
    return symbols


class Codes:
    """Flat unsigned codes of 2 to 8 bits (uint8), as many a symbol as fit in 8 bits."""

    def __init__(self, bits: int):
        self.bits, self.per_symbol = bits, 8 // bits
        self.dtype = np.dtype(np.uint8)
        self.streams = {"codes": bits * self.per_symbol}

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        padded = np.zeros(self.symbols(len(values)) * self.per_symbol, np.uint8)
        padded[: len(values)] = values
        symbols = np.zeros(len(padded) // self.per_symbol, np.uint8)
        for i in range(self.per_symbol):
            symbols |= padded[i :: self.per_symbol] << np.uint8(i * self.bits)
        return [symbols]

    def join(self, streams: list[np.ndarray], count: int) -> np.ndarray:
        values = np.empty((len(streams[0]), self.per_symbol), np.uint8)
        for i in range(self.per_symbol):
            values[:, i] = streams[0] >> np.uint8(i * self.bits) & np.uint8(2**self.bits - 1)
        return values.reshape(-1)[:count]

    def symbols(self, count: int) -> int:
        return -(-count // self.per_symbol)


class Words:
    """Flat unsigned integers, the bits of an array's values, as one stream of their bytes."""

    def __init__(self, dtype: np.dtype):
        self.bits = 8 * dtype.itemsize
        self.dtype = np.dtype(f"<u{dtype.itemsize}")
        self.streams = {"values": 8}

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        return [values.view(np.uint8)]

    def join(self, streams: list[np.ndarray], count: int) -> np.ndarray:
        return streams[0].view(self.dtype)

    def symbols(self, count: int) -> int:
        return count * self.dtype.itemsize


class Planes:
    """Flat unsigned integers, the bits of an array's values, as one stream a byte, the highest byte first.

    Those of floats are rotated by one bit: the sign moves to the end, and the first byte is the exponent.
    """

    def __init__(self, dtype: np.dtype):
        self.bits = 8 * dtype.itemsize
        self.dtype = np.dtype(f"<u{dtype.itemsize}")
        self.rotated = dtype.kind not in "iub"
        self.streams = {f"plane{i}": 8 for i in range(dtype.itemsize)}

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        if self.rotated:
            values = values << 1 | values >> (self.bits - 1)
        planes = values.view(np.uint8).reshape(-1, self.bits // 8).T
        return [np.ascontiguousarray(plane) for plane in planes[::-1]]

    def join(self, streams: list[np.ndarray], count: int) -> np.ndarray:
        values = np.stack(streams[::-1], 1).view(self.dtype)[:, 0]
        return values >> 1 | values << (self.bits - 1) if self.rotated else values

    def symbols(self, count: int) -> int:
        return count


Kind = Codes | Words | Planes


def encode(values: np.ndarray, kind: Kind, storage: str) -> Part:
    """Flat values (of the kind's dtype) in the layout that takes the fewest bytes."""
    nonzero = values != 0
    zeros = 1 - nonzero.mean() if len(values) else 0.0
    parts = [_encode_kept(values, kind, storage, "full", {})]
    if zeros * kind.bits > 1 or (storage == "huffman" and zeros > 0.25):
        kept = values[nonzero]
        mask = encode_stream(np.packbits(nonzero, bitorder="little"), 8, storage)
        parts.append(_encode_kept(kept, kind, storage, "mask", {"mask": mask}))
        if storage == "huffman":
            gaps = _gaps(nonzero)
            coded = encode_stream(gaps, 8, storage)
            parts.append(_encode_kept(kept, kind, storage, "gaps", {"gaps": coded}, len(gaps)))
    return min(parts, key=lambda part: part.nbytes)


def _encode_kept(kept: np.ndarray, kind: Kind, storage: str, layout: str, where: Coded, gaps: int = 0) -> Part:
    streams = zip(kind.streams.items(), kind.split(kept), strict=True)
    coded = {name: encode_stream(symbols, width, storage) for (name, width), symbols in streams}
    return Part(layout, where | coded, gaps)


def _gaps(nonzero: np.ndarray) -> np.ndarray:
    """The zeros before each value that is not zero; those after the last one are implied."""
    runs = np.diff(np.flatnonzero(nonzero), prepend=-1) - 1
    entries = runs // ESCAPE + 1
    gaps = np.full(entries.sum(), ESCAPE, np.uint8)
    gaps[np.cumsum(entries) - 1] = runs % ESCAPE
    return gaps


def decode(part: Part, kind: Kind, count: int) -> np.ndarray:
    """The ``count`` values of a part, or Corrupt."""

    def stream(name: str, width: int, symbols: int) -> np.ndarray:
        if name not in part.streams:
            raise Corrupt(f"its stream {name!r} is missing")
        method, data = part.streams[name]
        return decode_stream(method, data, width, symbols)

    if part.layout == "full":
        where, kept = None, count
    elif part.layout == "mask":
        where = np.unpackbits(stream("mask", 8, packed_size(count, 1)), bitorder="little")[:count].view(bool)
        kept = np.count_nonzero(where)
    elif part.layout == "gaps":
        if not 0 <= part.gaps <= count:
            raise Corrupt(f"{part.gaps} gaps in {count} values")
        gaps = stream("gaps", 8, part.gaps)
        is_value = gaps != ESCAPE
        where = (np.cumsum(gaps + is_value.astype(np.int64)) - 1)[is_value]
        kept = len(where)
        if kept and where[-1] >= count:
            raise Corrupt("its gaps reach past the end")
    else:
        raise Corrupt(f"unknown layout {part.layout!r}")
    streams = [stream(name, width, kind.symbols(kept)) for name, width in kind.streams.items()]
    values = kind.join(streams, kept)
    if where is None:
        return values
    dense = np.zeros(count, kind.dtype)
    dense[where] = values
    return dense
