"""Arrays as byte streams: how codes and floats are laid out, and which coding each stream gets. All of it is lossless.

A *layout* says which values are kept:

    full    all of them
    mask    those that are not zero, and a bit for each value that says which those are
    gaps    those that are not zero, and the number of zeros before each (255: that many zeros and no value)

The values kept, the mask and the gaps are streams of symbols of up to 8 bits; which streams the values make, their
*kind* says (``Codes``, ``Words``, ``Planes``). A *method* says how a stream is stored: ``raw`` (bit-packed),
``huffman`` or ``zstd``. For each array the layout, and for each stream the method, that take the fewest bytes are
chosen, and recorded beside the streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  registers bfloat16 and its kin as NumPy dtypes
import numpy as np
import zstandard

from jaxlm.checkpoint import huffman
from jaxlm.checkpoint.bitpack import pack_bits, packed_size, unpack_bits
from jaxlm.checkpoint.huffman import CorruptError

ESCAPE = 255
CodedStreams = dict[str, tuple[str, np.ndarray]]  # stream -> method, bytes
SymbolStreams = dict[str, tuple[int, np.ndarray]]  # stream -> bits of a symbol, symbols
ReadStream = Callable[[str, int, int], np.ndarray]  # a stream, the bits of a symbol, how many -> symbols


@dataclass(frozen=True)
class CodedArray:
    """One array, coded. ``gaps`` is the number of entries of the gaps stream, the only count not known from others."""

    layout: str
    streams: CodedStreams
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
    """The ``count`` symbols of a stream. Raises CorruptError before it allocates more than ``count`` bytes."""
    if data.dtype != np.uint8 or data.ndim != 1 or count < 0:
        raise CorruptError(f"{data.dtype}{list(data.shape)} cannot be {count} symbols")
    if method == "huffman":
        return huffman.decode(data, count)
    if method == "raw":
        if len(data) != packed_size(count, width):
            raise CorruptError(f"{len(data)} bytes are not {count} symbols of {width} bits")
        return unpack_bits(data, width, count)
    if method != "zstd":
        raise CorruptError(f"unknown method {method!r}")
    try:
        if zstandard.frame_content_size(data.data) != count:
            raise CorruptError(f"its frame does not hold {count} symbols")
        symbols = np.frombuffer(zstandard.ZstdDecompressor().decompress(data.data), np.uint8)
    except zstandard.ZstdError as error:
        raise CorruptError(str(error)) from None
    if len(symbols) != count:
        raise CorruptError(f"{len(symbols)} symbols, not {count}")
    return symbols


class Codes:
    """Flat unsigned codes of 1 to 8 bits (uint8): one stream, as many a symbol as fit in 8 bits, the first lowest."""

    def __init__(self, bits: int):
        if bits not in range(1, 9):
            raise CorruptError(f"codes of {bits} bits")
        self.bits, self.per_symbol = bits, 8 // bits
        self.dtype = np.dtype(np.uint8)

    def split(self, values: np.ndarray) -> SymbolStreams:
        padded = np.zeros(-(-len(values) // self.per_symbol) * self.per_symbol, np.uint8)
        padded[: len(values)] = values
        symbols = np.zeros(len(padded) // self.per_symbol, np.uint8)
        for i in range(self.per_symbol):
            symbols |= padded[i :: self.per_symbol] << np.uint8(i * self.bits)
        return {"codes": (self.bits * self.per_symbol, symbols)}

    def join(self, read: ReadStream, count: int) -> np.ndarray:
        symbols = read("codes", self.bits * self.per_symbol, -(-count // self.per_symbol))
        values = np.empty((len(symbols), self.per_symbol), np.uint8)
        for i in range(self.per_symbol):
            values[:, i] = symbols >> np.uint8(i * self.bits) & np.uint8(2**self.bits - 1)
        return values.reshape(-1)[:count]


class Words:
    """Flat unsigned integers, the bits of an array's values: one stream, their bytes."""

    def __init__(self, dtype: np.dtype):
        self.bits, self.dtype = _word(dtype)

    def split(self, values: np.ndarray) -> SymbolStreams:
        return {"values": (8, values.view(np.uint8))}

    def join(self, read: ReadStream, count: int) -> np.ndarray:
        return read("values", 8, count * self.dtype.itemsize).view(self.dtype)


class Planes:
    """Flat unsigned integers, the bits of an array's values: one stream a byte, the highest byte first.

    Those of floats are rotated by one bit: the sign moves to the end, and the first byte is the exponent. Weights have
    few exponents, so the first stream has room for two bits of the second byte, the head of the mantissa: its symbols
    are the ranks of the first bytes among those that occur, followed by as many of those bits as fit in 8, at most 2.
    A Huffman code wastes less of a larger alphabet, and large mantissas are rarer than small ones. The stream ``tops``
    has a bit for each of the 256 first bytes, whether it occurs; ``plane1`` has the bits that are left.
    """

    def __init__(self, dtype: np.dtype):
        self.bits, self.dtype = _word(dtype)
        self.rotated = dtype.kind not in "iub"

    def split(self, values: np.ndarray) -> SymbolStreams:
        if self.rotated:
            values = values << 1 | values >> (self.bits - 1)
        top = (values >> (self.bits - 8)).astype(np.uint8)
        if self.bits == 8:
            return {"plane0": (8, top)}
        occurs = np.bincount(top, minlength=256) > 0
        room = self._room(int(np.count_nonzero(occurs)))
        ranks = (np.cumsum(occurs) - 1 << room & 255).astype(np.uint8)
        head = (values >> (self.bits - 8 - room) & 2**room - 1).astype(np.uint8)
        planes: SymbolStreams = {"tops": (8, np.packbits(occurs, bitorder="little")), "plane0": (8, ranks[top] | head)}
        for i, width, shift in self._rest(room):
            planes[f"plane{i}"] = (width, (values >> shift & 2**width - 1).astype(np.uint8))
        return planes

    def join(self, read: ReadStream, count: int) -> np.ndarray:
        if self.bits == 8:
            values = read("plane0", 8, count)
        else:
            tops = np.flatnonzero(np.unpackbits(read("tops", 8, 32), bitorder="little"))
            room = self._room(len(tops))
            heads = (tops[:, None] << room | np.arange(2**room)).reshape(-1).astype(self.dtype)
            first = read("plane0", 8, count)
            if len(first) and first.max() >= len(heads):
                raise CorruptError("a value begins with none of its first bytes")
            values = np.take(heads << self.dtype.type(self.bits - 8 - room), first)
            for i, width, shift in self._rest(room):
                values |= read(f"plane{i}", width, count).astype(self.dtype) << self.dtype.type(shift)
        return values >> 1 | values << (self.bits - 1) if self.rotated else values

    @staticmethod
    def _room(tops: int) -> int:
        """How many bits beside the rank of a first byte fit in 8."""
        return min(2, 8 - (max(tops, 1) - 1).bit_length())

    def _rest(self, room: int) -> list[tuple[int, int, int]]:
        """(number, bits, shift) of the planes after the first."""
        return [(i, 8 if i > 1 else 8 - room, self.bits - 8 * (i + 1)) for i in range(1, self.bits // 8)]


def _word(dtype: np.dtype) -> tuple[int, np.dtype]:
    if dtype.itemsize not in (1, 2, 4, 8) or dtype.hasobject:
        raise CorruptError(f"values of {dtype}")
    return 8 * dtype.itemsize, np.dtype(f"<u{dtype.itemsize}")


Symbolizer = Codes | Words | Planes


def encode(values: np.ndarray, kind: Symbolizer, storage: str) -> CodedArray:
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


def _encode_kept(kept: np.ndarray, kind: Symbolizer, storage: str, layout: str, where: CodedStreams, gaps: int = 0) -> CodedArray:
    coded = {name: encode_stream(symbols, width, storage) for name, (width, symbols) in kind.split(kept).items()}
    return CodedArray(layout, where | coded, gaps)


def _gaps(nonzero: np.ndarray) -> np.ndarray:
    """The zeros before each value that is not zero; those after the last one are implied."""
    runs = np.diff(np.flatnonzero(nonzero), prepend=-1) - 1
    entries = runs // ESCAPE + 1
    gaps = np.full(entries.sum(), ESCAPE, np.uint8)
    gaps[np.cumsum(entries) - 1] = runs % ESCAPE
    return gaps


def decode(part: CodedArray, kind: Symbolizer, count: int) -> np.ndarray:
    """The ``count`` values of a part, or CorruptError."""

    def stream(name: str, width: int, symbols: int) -> np.ndarray:
        if name not in part.streams:
            raise CorruptError(f"its stream {name!r} is missing")
        method, data = part.streams[name]
        return decode_stream(method, data, width, symbols)

    if part.layout == "full":
        where, kept = None, count
    elif part.layout == "mask":
        where = np.unpackbits(stream("mask", 8, packed_size(count, 1)), bitorder="little")[:count].view(bool)
        kept = int(np.count_nonzero(where))
    elif part.layout == "gaps":
        if not 0 <= part.gaps <= count:
            raise CorruptError(f"{part.gaps} gaps in {count} values")
        gaps = stream("gaps", 8, part.gaps)
        is_value = gaps != ESCAPE
        where = (np.cumsum(gaps + is_value.astype(np.int64)) - 1)[is_value]
        kept = len(where)
        if kept and where[-1] >= count:
            raise CorruptError("its gaps reach past the end")
    else:
        raise CorruptError(f"unknown layout {part.layout!r}")
    values = kind.join(stream, kept)
    if where is None:
        return values
    dense = np.zeros(count, kind.dtype)
    dense[where] = values
    return dense
