"""Canonical Huffman coding of bytes, no code longer than 12 bits, read by many lanes in lockstep.

A stream is cut into blocks of 2**21 symbols and a block into chunks, at most 1024, that are decoded side by side: one
step of a compiled loop reads the next four symbols of every chunk. So that a step's output is already in order, the
block's *quartets* (runs of four symbols) go to its chunks in turn: quartet q to chunk ``q % chunks``. A block of n
symbols has ``min(1024, ceil(n / 512))`` chunks. Layout of the coded bytes:

    2 bytes     the first and the last symbol that occur
    packed      the code lengths of the symbols from the first to the last, 4 bits each (0: does not occur)
    2 bytes     the size in bytes of the smallest chunk (little-endian)
    1 byte      the width in bits of what follows
    packed      the size of each chunk minus the smallest, ``width`` bits each (more than 8: 2 bytes each)
    chunks      of all blocks: codes, the first symbol's in the lowest bits, filled up to a whole byte

What is packed starts in the lowest bits and ends at a whole byte. A code is made of its length as in DEFLATE (RFC
1951, 3.2.2: by length, then by symbol), and its first bit is the lowest; a symbol that occurs alone has the code 0.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.bitpack import pack_bits, packed_size, unpack_bits

LIMIT = 12
LANES = 1024  # chunks of a block
SHORTEST, LONGEST = 512, 2048  # symbols of a chunk: fewer cost size, more of them memory
BLOCK = LANES * LONGEST
_SYMBOLS = 256
_CODE = np.uint32(2**24 - 1)
_WIDTHS = 64, 256, LANES  # how many lanes the loop is compiled for: short streams need not pay for all
_REVERSED = sum((np.arange(1 << LIMIT) >> i & 1) << (LIMIT - 1 - i) for i in range(LIMIT))  # the order of 12 bits
_THREADS = 2  # NumPy and XLA let other threads run


class CorruptError(ValueError):
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


def least_size(counts: np.ndarray) -> int:
    """The size in bytes of ``encode`` for symbols with these counts, without its index of chunks: a lower bound."""
    lengths = code_lengths(counts)
    first, last = _span(lengths)
    return 5 + packed_size(last - first + 1, 4) + packed_size(int(counts @ lengths.astype(np.int64)), 1)


def encoded_size(symbols: np.ndarray) -> int:
    """The size in bytes of ``encode(symbols)`` for flat uint8 ``symbols``, computed from the lengths of their codes."""
    lengths = code_lengths(np.bincount(symbols, minlength=_SYMBOLS))
    sizes = [_chunk_sizes(symbols[i : i + BLOCK], lengths) for i in range(0, len(symbols), BLOCK)]
    sizes = np.concatenate(sizes) if sizes else np.zeros(0, np.int64)
    first, last = _span(lengths)
    return 2 + packed_size(last - first + 1, 4) + len(_index(sizes)) + int(sizes.sum())


def _chunk_sizes(symbols: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The byte size of each chunk of a block."""
    chunks, steps = _shape(len(symbols))
    bits = np.zeros(4 * steps * chunks, np.uint8)
    np.take(lengths, symbols, out=bits[: len(symbols)])
    per_lane = bits.reshape(steps, 4 * chunks).sum(0, dtype=np.int64)
    return (per_lane.reshape(chunks, 4).sum(1) + 7) >> 3


def encode(symbols: np.ndarray) -> np.ndarray:
    """Flat uint8 ``symbols`` as coded bytes (uint8), the same ones for the same symbols."""
    lengths = code_lengths(np.bincount(symbols, minlength=_SYMBOLS))
    codes = _codes(lengths) | lengths.astype(np.uint32) << 24
    cuts = [symbols[i : i + BLOCK] for i in range(0, max(len(symbols), 1), BLOCK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        pairs = _pairs(codes)
        sizes, blocks = zip(*pool.map(lambda cut: _encode_block(cut, codes, pairs), cuts), strict=True)
    first, last = _span(lengths)
    span = np.array([first, last], np.uint8)
    return np.concatenate([span, pack_bits(lengths[first : last + 1], 4), _index(np.concatenate(sizes)), *blocks])


def decode(coded: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` symbols (uint8) of flat coded bytes (uint8), or CorruptError.

    Allocates no more than some eight times what it is given, and 16 MiB.
    """
    if not 0 <= count <= 8 * len(coded):
        raise CorruptError(f"{len(coded)} bytes cannot hold {count} symbols")
    lengths, coded = _read_lengths(coded)
    sizes, payload = _read_sizes(coded, sum(_shape(n)[0] for n in _blocks(count)))
    if not count:
        return np.zeros(0, np.uint8)
    table = jax.device_put(_decoding_table(lengths), _host())
    ends = np.cumsum(sizes)
    symbols = np.empty(count, np.uint8)

    def block(i: int) -> None:
        out = symbols[i * BLOCK : (i + 1) * BLOCK]
        of = sizes[i * LANES : (i + 1) * LANES]
        last = ends[i * LANES + len(of) - 1]
        used = _decode_block(payload[last - of.sum() : last], of, table, lengths, out)
        if not np.array_equal((used + 7) >> 3, of):
            raise CorruptError("a chunk does not end where the next one starts")

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(block, range(-(-count // BLOCK))))
    return symbols


def _blocks(count: int) -> list[int]:
    """How many symbols each block has."""
    return [BLOCK] * (count // BLOCK) + ([count % BLOCK] if count % BLOCK else [])


def _shape(count: int) -> tuple[int, int]:
    """(chunks, the most quartets of a chunk) of a block with so many symbols."""
    chunks = min(LANES, -(-count // SHORTEST))
    return chunks, -(-count // (4 * max(chunks, 1)))


def _span(lengths: np.ndarray) -> tuple[int, int]:
    """The first and the last symbol that occur."""
    used = np.flatnonzero(lengths)
    return (int(used[0]), int(used[-1])) if len(used) else (0, 0)


def _by_code(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The symbols in the order of their codes, and how many of the 4096 strings of 12 bits start with each code."""
    order = np.lexsort((np.arange(_SYMBOLS), lengths))
    order = order[lengths[order] > 0]
    return order, 1 << (LIMIT - lengths[order].astype(np.int64))


def _codes(lengths: np.ndarray) -> np.ndarray:
    """Each symbol's code ``[256]`` (uint32), its first bit lowest: what the decoding table inverts."""
    order, spans = _by_code(lengths)
    codes = np.zeros(_SYMBOLS, np.uint32)
    codes[order] = _REVERSED[np.cumsum(spans) - spans]
    return codes


def _decoding_table(lengths: np.ndarray) -> np.ndarray:
    """``[4096]`` (uint32): for the next 12 bits of the stream, the symbol in the low byte and its length above."""
    if lengths.max() > LIMIT:
        raise CorruptError("a code is too long")
    order, spans = _by_code(lengths)
    if len(order) == 1 and spans[0] == 1 << LIMIT - 1:
        spans *= 2  # a lone symbol owns both halves of the code space
    if spans.sum() != 1 << LIMIT:
        raise CorruptError("its code lengths are not those of a prefix code")
    entries = (order | lengths[order].astype(np.int64) << 8).astype(np.uint32)
    return np.repeat(entries, spans)[_REVERSED]


def _pairs(codes: np.ndarray) -> np.ndarray:
    """``[65536]``: for a symbol (the low byte) and the next one their codes joined, and from bit 24 their length."""
    first, second = codes[None, :], codes[:, None]
    joined = (first & _CODE) | (second & _CODE) << (first >> 24)
    return (joined | ((first >> 24) + (second >> 24)) << 24).reshape(-1)


def _encode_block(symbols: np.ndarray, codes: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The byte size of each chunk, and the bytes of them all."""
    chunks, steps = _shape(len(symbols))
    padded = np.zeros(4 * steps * chunks, np.uint8)
    padded[: len(symbols)] = symbols
    coded = pairs[padded.view("<u2")]
    coded[(len(symbols) + 1) // 2 :] = 0  # what fills up the last step has no bits
    if len(symbols) % 2:
        coded[len(symbols) // 2] = codes[symbols[-1]]
    coded_CxSx2 = coded.view(np.uint64).reshape(steps, chunks).T.copy().view(np.uint32).reshape(chunks, steps, 2)
    bits_CxSx2 = coded_CxSx2 >> 24
    coded_CxSx2 &= _CODE
    code = coded_CxSx2[..., 1].astype(np.uint64)  # a quartet is at most 48 bits
    code <<= bits_CxSx2[..., 0]
    code |= coded_CxSx2[..., 0]
    bits_CxS = bits_CxSx2.sum(-1, dtype=np.int64)
    offset_CxS = np.cumsum(bits_CxS, 1)
    sizes = (offset_CxS[:, -1] + 7 if steps else np.zeros(0, np.int64)) >> 3
    offset_CxS += (8 * (np.cumsum(sizes) - sizes))[:, None] - bits_CxS

    # Each quartet goes to the 64-bit word its offset falls in, and where it does not fit spills into the next one.
    total = int(sizes.sum())
    words = np.zeros(total // 8 + 2, "<u8")
    code, offset = code.reshape(-1), offset_CxS.reshape(-1)
    word, shift = offset >> 6, (offset & 63).astype(np.uint64)
    first = np.flatnonzero(np.diff(word, prepend=-1))
    words[word[first]] = np.bitwise_or.reduceat(code << shift, first) if len(first) else 0
    spill = code >> np.uint64(1) >> (np.uint64(63) - shift)
    over = np.flatnonzero(spill)
    words[word[over] + 1] |= spill[over]  # at most one quartet spills into a word
    return sizes, words.view(np.uint8)[:total]


def _index(sizes: np.ndarray) -> np.ndarray:
    """The byte size of each chunk, as it is stored."""
    smallest = int(sizes.min()) if len(sizes) else 0
    over = sizes - smallest
    width = int(over.max(initial=0)).bit_length()
    packed = pack_bits(over.astype(np.uint8), width) if width <= 8 else over.astype("<u2").view(np.uint8)
    return np.concatenate([np.array([smallest & 255, smallest >> 8, width], np.uint8), packed])


def _read_lengths(coded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The code lengths of the 256 symbols, and the bytes after them."""
    first, last = (int(coded[0]), int(coded[1])) if len(coded) > 1 else (1, 0)
    used = last - first + 1
    end = 2 + packed_size(used, 4)
    if used < 1 or len(coded) < end:
        raise CorruptError("its header is cut off")
    lengths = np.zeros(_SYMBOLS, np.uint8)
    lengths[first : last + 1] = unpack_bits(coded[2:end], 4, used)
    return lengths, coded[end:]


def _read_sizes(coded: np.ndarray, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """The byte size of each chunk, and the bytes of the chunks."""
    if len(coded) < 3:
        raise CorruptError("its header is cut off")
    smallest, width = int(coded[0]) | int(coded[1]) << 8, int(coded[2])
    end = 3 + (packed_size(chunks, width) if width <= 8 else 2 * chunks)
    if len(coded) < end:
        raise CorruptError("its index of chunks is cut off")
    over = unpack_bits(coded[3:end], width, chunks) if width <= 8 else coded[3:end].view("<u2")
    sizes = smallest + over.astype(np.int64)
    if sizes.sum() != len(coded) - end:
        raise CorruptError(f"its chunks do not add up to {len(coded) - end} bytes")
    return sizes, coded[end:]


def _decode_block(
    data: np.ndarray, sizes: np.ndarray, table: jax.Array, lengths: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """Decodes the bytes of a block's chunks into ``out``; returns the bits each chunk used."""
    chunks, steps = _shape(len(out))
    if sizes.max() > steps * 4 * LIMIT // 8:
        raise CorruptError("a chunk is larger than its symbols")
    lanes = next(width for width in _WIDTHS if width >= chunks)
    longest = LONGEST if lanes == LANES else SHORTEST
    words = np.empty(lanes * longest * LIMIT // 8 // 4 + 2, "<u4")  # of one size for each width
    words.view(np.uint8)[: len(data)] = data
    starts = np.zeros(lanes, np.uint32)
    starts[:chunks] = 8 * (np.cumsum(sizes) - sizes)
    ends, quartets = _lockstep(*jax.device_put((words, starts), _host()), table, steps, longest // 4)
    read = np.ascontiguousarray(np.asarray(quartets)[:steps, :chunks]).reshape(-1).view(np.uint8)
    out[:] = read[: len(out)]
    used = (np.asarray(ends) - starts)[:chunks].astype(np.int64)
    # In the last step some chunks read on past their ends.
    beyond = np.zeros(4 * chunks, np.int64)
    beyond[4 * chunks - (len(read) - len(out)) :] = lengths[read[len(out) :]]
    return used - beyond.reshape(chunks, 4).sum(1)


@cache
def _host() -> jax.Device:
    """Where the loop runs: what it reads comes from a file, and what it makes goes on through NumPy."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return jax.local_devices()[0]


@partial(jax.jit, static_argnames="rows")
def _lockstep(
    words: jax.Array, position: jax.Array, table: jax.Array, steps: int, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Reads ``steps`` quartets a lane, from the bit ``position`` [lanes] of ``words`` (uint32) on.

    Returns the positions after them, and the quartets ``[rows, lanes]`` (uint32), the first symbol lowest.
    """

    def step(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        position, quartets = state
        quartet = jnp.zeros_like(position)
        for symbol in range(4):
            if symbol % 2 == 0:  # of 32 bits, two codes take at most 24
                at, shift = position >> 5, position & 31
                low, high = words.at[at].get(mode="clip"), words.at[at + 1].get(mode="clip")
                window = low >> shift | high << 1 << (31 - shift)
            entry = table.at[window & (2**LIMIT - 1)].get(mode="promise_in_bounds")
            quartet |= (entry & 255) << 8 * symbol
            window >>= entry >> 8
            position += entry >> 8
        return position, quartets.at[i].set(quartet)

    return jax.lax.fori_loop(0, steps, step, (position, jnp.zeros((rows, len(position)), jnp.uint32)))
