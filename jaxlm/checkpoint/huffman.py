"""Canonical Huffman coding of bytes, no code longer than 12 bits, encoded and decoded in vectors.

A stream is cut into chunks of 512 symbols that start at byte boundaries, so that all chunks are decoded in lockstep,
one NumPy operation for a symbol of each. Layout of the coded bytes:

    128 bytes   the code lengths of the 256 symbols, 4 bits each
      2 bytes   the size of the smallest chunk (little-endian)
      1 byte    the width in bits of what follows
    packed      the size of each chunk minus the smallest, ``width`` bits each (below 8: else 2 bytes each)
    chunks      the codes, first symbol in the lowest bits
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxlm.checkpoint.bitpack import pack_bits, packed_size, unpack_bits

LIMIT = 12
CHUNK = 512
HEADER = 131
_SYMBOLS = 256
_BLOCK = 4096  # chunks handled at once: 2 MiB of symbols, by each thread
_THREADS = 2  # NumPy releases the interpreter's lock in each operation


class Corrupt(ValueError):
    """Coded bytes that no encoder wrote."""


def code_lengths(counts: np.ndarray, limit: int = LIMIT) -> np.ndarray:
    """The lengths ``[symbols]`` of an optimal prefix code among those with none longer than ``limit``; 0 if unused.

    Package-merge (Larmore and Hirschberg, J. ACM 1990): a code is a choice of 2n - 2 coins, a coin of width
    ``2**-l`` for each level l up to the symbol's length; pairs of coins of one level are merged into the next.
    """
    lengths = np.zeros(len(counts), np.uint8)
    used = np.flatnonzero(counts)
    if len(used) < 2:
        lengths[used] = 1
        return lengths
    used = used[np.argsort(counts[used], kind="stable")]
    coins, members = counts[used].astype(np.int64), np.eye(len(used), dtype=np.uint16)
    weights, chosen = coins, members
    for _ in range(limit - 1):
        even = len(weights) // 2 * 2
        weights = np.concatenate([coins, weights[:even:2] + weights[1:even:2]])
        chosen = np.concatenate([members, chosen[:even:2] + chosen[1:even:2]])
        order = np.argsort(weights, kind="stable")
        weights, chosen = weights[order], chosen[order]
    lengths[used] = chosen[: 2 * len(used) - 2].sum(0)
    return lengths


def coded_size(counts: np.ndarray) -> int:
    """About how many bytes ``encode`` makes of symbols with these counts: within a percent and the header."""
    return int(counts @ code_lengths(counts).astype(np.int64)) // 8 + int(counts.sum()) // 350 + HEADER


def _decoding_table(lengths: np.ndarray) -> np.ndarray:
    """``[4096]``: for the next 12 bits of the stream, the symbol in the low byte and its length above."""
    order = np.lexsort((np.arange(_SYMBOLS), lengths))
    order = order[lengths[order] > 0]
    spans = 1 << (LIMIT - lengths[order].astype(np.int64))
    total = int(spans.sum())
    if len(order) == 1 and lengths[order[0]] == 1:
        spans[0] = total = 1 << LIMIT  # a lone symbol owns both halves of the code space
    if lengths.max() > LIMIT or total != 1 << LIMIT:
        raise Corrupt("its code lengths are not those of a prefix code")
    entries = order | (lengths[order].astype(np.int64) << 8)
    return np.repeat(entries, spans)[_reversed(np.arange(1 << LIMIT))]


def _reversed(values: np.ndarray) -> np.ndarray:
    """12-bit values with their bits in the opposite order."""
    out = np.zeros_like(values)
    for i in range(LIMIT):
        out |= (values >> i & 1) << (LIMIT - 1 - i)
    return out


def _codes(lengths: np.ndarray) -> np.ndarray:
    """Each symbol's code, its first bit lowest: what the decoding table inverts."""
    order = np.lexsort((np.arange(_SYMBOLS), lengths))
    order = order[lengths[order] > 0]
    spans = 1 << (LIMIT - lengths[order].astype(np.int64))
    codes = np.zeros(_SYMBOLS, np.int64)
    codes[order] = _reversed(np.cumsum(spans) - spans)
    return codes


def encode(symbols: np.ndarray) -> np.ndarray:
    """Flat uint8 ``symbols`` as coded bytes (uint8)."""
    lengths = code_lengths(np.bincount(symbols, minlength=_SYMBOLS))
    codes = _codes(lengths)
    cuts = [symbols[i : i + _BLOCK * CHUNK] for i in range(0, max(len(symbols), 1), _BLOCK * CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes, blocks = zip(*pool.map(lambda cut: _encode_block(cut, codes, lengths), cuts), strict=True)
    sizes = np.concatenate(sizes)
    smallest = int(sizes.min(initial=CHUNK * LIMIT // 8))
    over = sizes - smallest
    width = int(over.max(initial=0)).bit_length()
    index = pack_bits(over.astype(np.uint8), width) if width <= 8 else over.astype("<u2").view(np.uint8)
    head = np.array([smallest & 255, smallest >> 8, width], np.uint8)
    return np.concatenate([pack_bits(lengths, 4), head, index, *blocks])


def _encode_block(symbols: np.ndarray, codes: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The byte size of each chunk, and the bytes of them all."""
    chunks = -(-len(symbols) // CHUNK)
    code = np.zeros(chunks * CHUNK, np.uint64)
    bits = np.zeros(chunks * CHUNK, np.uint64)  # what pads the last chunk has no bits
    code[: len(symbols)] = codes.astype(np.uint64)[symbols]
    bits[: len(symbols)] = lengths.astype(np.uint64)[symbols]
    for _ in range(2):  # join neighbours twice: four symbols are at most 48 bits
        code = code[0::2] | code[1::2] << bits[0::2]
        bits = bits[0::2] + bits[1::2]
    bits_CxQ = bits.reshape(chunks, CHUNK // 4)
    ends_CxQ = np.cumsum(bits_CxQ, 1)
    sizes = (ends_CxQ[:, -1].astype(np.int64) + 7) >> 3
    starts = np.cumsum(sizes) - sizes
    offset = (ends_CxQ - bits_CxQ + (starts.astype(np.uint64) << np.uint64(3))[:, None]).ravel()

    # Each quartet goes to the 64-bit word its offset falls in, and where it does not fit spills into the next one.
    total = int(sizes.sum())
    words = np.zeros(total // 8 + 2, "<u8")
    word, shift = (offset >> np.uint64(6)).astype(np.int64), offset & np.uint64(63)
    first = np.flatnonzero(np.diff(word, prepend=-1))
    words[word[first]] = np.bitwise_or.reduceat(code << shift, first)
    spill = code >> np.uint64(1) >> (np.uint64(63) - shift)
    over = np.flatnonzero(spill)
    words[word[over] + 1] |= spill[over]  # at most one quartet spills into a word
    return sizes, words.view(np.uint8)[:total]


def decode(coded: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` symbols (uint8) of the coded bytes, or Corrupt; allocates at most 16 times what it is given."""
    if len(coded) < HEADER or count > 8 * (len(coded) - HEADER):
        raise Corrupt(f"{len(coded)} bytes cannot hold {count} symbols")
    lengths = unpack_bits(coded[:128], 4, _SYMBOLS)
    smallest, width = int(coded[128]) | int(coded[129]) << 8, int(coded[130])
    chunks = -(-count // CHUNK)
    index = packed_size(chunks, width) if width <= 8 else 2 * chunks
    payload = coded[HEADER + index :]
    if HEADER + index > len(coded) or width > 10:
        raise Corrupt("its index of chunks is cut off")
    packed = coded[HEADER : HEADER + index]
    sizes = smallest + (unpack_bits(packed, width, chunks) if width <= 8 else packed.view("<u2")).astype(np.int64)
    if int(sizes.sum()) != len(payload):
        raise Corrupt(f"its chunks add up to {int(sizes.sum())} bytes, not {len(payload)}")
    if not count:
        return np.zeros(0, np.uint8)
    table = _decoding_table(lengths)
    starts = np.cumsum(sizes) - sizes
    symbols = np.empty(chunks * CHUNK, np.uint8)

    def block(first: int) -> None:
        last = min(first + _BLOCK, chunks)
        where = starts[first:last] - starts[first]
        data = payload[starts[first] : starts[last - 1] + sizes[last - 1]]
        used = _decode_block(data, where, table, symbols[first * CHUNK : last * CHUNK].reshape(-1, CHUNK))
        if last == chunks and count % CHUNK:  # the last chunk ran on past its end
            used[-1] = lengths[symbols[(chunks - 1) * CHUNK : count]].sum(dtype=np.int64)
        if not np.array_equal((used + 7) >> 3, sizes[first:last]):
            raise Corrupt("a chunk does not end where the next one starts")

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(block, range(0, chunks, _BLOCK)))
    return symbols[:count]


def _decode_block(data: np.ndarray, starts: np.ndarray, table: np.ndarray, out_CxS: np.ndarray) -> np.ndarray:
    """Decodes chunks in lockstep into ``out``; returns the bits each used."""
    padded = np.zeros(len(data) + CHUNK * LIMIT // 8 + 16, np.uint8)
    padded[: len(data)] = data
    words = np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))  # 64 bits from any byte on
    position = starts * 8
    decoded_SxC = np.empty(out_CxS.shape[::-1], np.uint8)
    entry, bits = np.empty_like(position), np.empty_like(position)
    for s in range(0, CHUNK, 4):  # four codes are at most 48 bits, and at least 57 are read
        window = words[position >> 3] >> (position & 7).view(np.uint64)
        for row in decoded_SxC[s : s + 4]:
            np.take(table, (window & np.uint64(4095)).view(np.int64), out=entry, mode="clip")
            np.copyto(row, entry, casting="unsafe")
            np.right_shift(entry, 8, out=bits)
            window >>= bits.view(np.uint64)
            position += bits
    np.copyto(out_CxS, decoded_SxC.T)
    return position - starts * 8
