"""Arrays as byte streams: how codes and floats are laid out, and how each stream is coded. All of it is lossless.

A *layout* says which values are kept:

    full    all of them
    mask    those that are not zero, and a bit for each value that says whether it is one of them
    gaps    those that are not zero, and the number of zeros before each (255: that many zeros and no value)

The values kept, the mask and the gaps are streams of symbols of up to 8 bits. A *symbolizer* (``Codes``, ``Words``,
``Planes``) turns values into streams of symbols and back. A *method* says how a stream is stored: ``raw`` (bit-packed),
``huffman`` or ``zstd``. An array gets the layout, and each of its streams the method, that take the fewest bytes; both
are recorded beside the streams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  registers bfloat16 and its kin as NumPy dtypes
import numpy as np
import zstandard

from jaxlm.checkpoint import huffman
from jaxlm.checkpoint.bitpack import pack_bits, packed_size, unpack_bits
from jaxlm.checkpoint.huffman import CorruptError

ESCAPE = 255  # in the gaps stream: this many zeros and no value
SymbolStreams = dict[str, tuple[int, np.ndarray]]  # name of a stream -> bits of a symbol, symbols
ReadStream = Callable[[str, int, int], np.ndarray]  # name of a stream, bits of a symbol, number of symbols -> symbols


@dataclass(frozen=True)
class CodedStream:
    """A stream as it is stored. Its size is known at once, its bytes are made when they are first asked for."""

    method: str
    nbytes: int
    make: Callable[[], np.ndarray]

    @staticmethod
    def of(method: str, data: np.ndarray) -> CodedStream:
        """A stream whose bytes are there."""
        return CodedStream(method, data.nbytes, lambda: data)

    @functools.cached_property
    def data(self) -> np.ndarray:
        """Its bytes, flat uint8."""
        return self.make()


CodedStreams = dict[str, CodedStream]


@dataclass(frozen=True)
class CodedArray:
    """One array, coded. ``gaps`` is the number of entries of the gaps stream, the only count that does not follow from
    others."""

    layout: str
    streams: CodedStreams
    gaps: int = 0

    @property
    def nbytes(self) -> int:
        return sum(stream.nbytes for stream in self.streams.values())


def encode_stream(symbols: np.ndarray, width: int, storage: str) -> CodedStream:
    """Flat uint8 symbols of ``width`` bits by the method of the fewest bytes; ``plain`` storage has only ``raw``."""
    best = CodedStream("raw", packed_size(len(symbols), width), functools.partial(pack_bits, symbols, width))
    if storage != "huffman" or not len(symbols):
        return best
    candidates = []
    if huffman.least_size(np.bincount(symbols, minlength=256)) < best.nbytes:
        size, make = huffman.encoded_size(symbols), functools.partial(huffman.encode, symbols)
        candidates.append(CodedStream("huffman", size, make))
    compressed = zstandard.ZstdCompressor(level=3).compress(symbols.data)
    candidates.append(CodedStream.of("zstd", np.frombuffer(compressed, np.uint8)))
    smallest = min(candidates, key=lambda stream: stream.nbytes)
    return smallest if smallest.nbytes < best.nbytes else best


def decode_stream(method: str, data: np.ndarray, width: int, count: int) -> np.ndarray:
    """The ``count`` symbols of a stream.

    Raises:
        CorruptError: the bytes are not such a stream; before more than ``count`` bytes are allocated.
    """
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
    """Flat unsigned codes of 1 to 8 bits (uint8): one stream, each symbol as many codes as fit in 8 bits, the first
    code in the lowest bits."""

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
    """Flat unsigned integers, the bits of an array's values: one stream of their bytes."""

    def __init__(self, dtype: np.dtype):
        self.bits, self.dtype = _word(dtype)

    def split(self, values: np.ndarray) -> SymbolStreams:
        return {"values": (8, values.view(np.uint8))}

    def join(self, read: ReadStream, count: int) -> np.ndarray:
        return read("values", 8, count * self.dtype.itemsize).view(self.dtype)


class Planes:
    """Flat unsigned integers, the bits of an array's values: one stream for each byte, the highest byte first.

    Floats are first rotated by one bit: the sign moves to the end, and the first byte is the exponent. Weights have few
    exponents, so the first stream has room for two bits of the second byte, the head of the mantissa: a symbol is the
    rank of the first byte among the first bytes that occur, followed by as many of those bits as fit in 8, at most 2.
    A Huffman code wastes less on a larger alphabet, and large mantissas are rarer than small ones. The stream ``tops``
    has one bit for each of the 256 possible first bytes: whether it occurs. ``plane1`` has the rest of the second byte.
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
        """The number of bits that fit in 8 beside the rank of one of ``tops`` first bytes."""
        return min(2, 8 - (max(tops, 1) - 1).bit_length())

    def _rest(self, room: int) -> list[tuple[int, int, int]]:
        """(number, bits, shift) of each plane after the first."""
        return [(i, 8 if i > 1 else 8 - room, self.bits - 8 * (i + 1)) for i in range(1, self.bits // 8)]


def _word(dtype: np.dtype) -> tuple[int, np.dtype]:
    if dtype.itemsize not in (1, 2, 4, 8) or dtype.hasobject:
        raise CorruptError(f"values of {dtype}")
    return 8 * dtype.itemsize, np.dtype(f"<u{dtype.itemsize}")


Symbolizer = Codes | Words | Planes


def encode(values: np.ndarray, symbolizer: Symbolizer, storage: str) -> CodedArray:
    """Flat values (of the symbolizer's dtype) in the layout that takes the fewest bytes."""
    nonzero = values != 0
    zeros = 1 - nonzero.mean() if len(values) else 0.0
    layouts = [CodedArray("full", _encode_kept(values, symbolizer, storage))]
    if zeros * symbolizer.bits > 1 or (storage == "huffman" and zeros > 0.25):
        kept = _encode_kept(values[nonzero], symbolizer, storage)
        mask = encode_stream(np.packbits(nonzero, bitorder="little"), 8, storage)
        layouts.append(CodedArray("mask", {"mask": mask} | kept))
        if storage == "huffman":
            gaps = _gaps(nonzero)
            layouts.append(CodedArray("gaps", {"gaps": encode_stream(gaps, 8, storage)} | kept, len(gaps)))
    return min(layouts, key=lambda coded: coded.nbytes)


def _encode_kept(kept: np.ndarray, symbolizer: Symbolizer, storage: str) -> CodedStreams:
    return {
        name: encode_stream(symbols, width, storage) for name, (width, symbols) in symbolizer.split(kept).items()
    }


def _gaps(nonzero: np.ndarray) -> np.ndarray:
    """The number of zeros before each value that is not zero; those after the last one are implied."""
    runs = np.diff(np.flatnonzero(nonzero), prepend=-1) - 1
    entries = runs // ESCAPE + 1
    gaps = np.full(entries.sum(), ESCAPE, np.uint8)
    gaps[np.cumsum(entries) - 1] = runs % ESCAPE
    return gaps


def decode(coded: CodedArray, symbolizer: Symbolizer, count: int) -> np.ndarray:
    """The ``count`` values of an array.

    Raises:
        CorruptError: a stream is missing or not what it should be, or the streams do not fit each other.
    """

    def stream(name: str, width: int, symbols: int) -> np.ndarray:
        if name not in coded.streams:
            raise CorruptError(f"its stream {name!r} is missing")
        found = coded.streams[name]
        return decode_stream(found.method, found.data, width, symbols)

    if coded.layout == "full":
        where, kept = None, count
    elif coded.layout == "mask":
        where = np.unpackbits(stream("mask", 8, packed_size(count, 1)), bitorder="little")[:count].view(bool)
        kept = int(np.count_nonzero(where))
    elif coded.layout == "gaps":
        if not 0 <= coded.gaps <= count:
            raise CorruptError(f"{coded.gaps} gaps in {count} values")
        gaps = stream("gaps", 8, coded.gaps)
        is_value = gaps != ESCAPE
        where = (np.cumsum(gaps + is_value.astype(np.int64)) - 1)[is_value]
        kept = len(where)
        if kept and where[-1] >= count:
            raise CorruptError("its gaps reach past the end")
    else:
        raise CorruptError(f"unknown layout {coded.layout!r}")
    values = symbolizer.join(stream, kept)
    if where is None:
        return values
    dense = np.zeros(count, symbolizer.dtype)
    dense[where] = values
    return dense
