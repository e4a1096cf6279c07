import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.checkpoint.bitpack import pack_bits, packed_size, unpack_bits
from jaxlm.checkpoint.huffman import (
    BLOCK,
    LANES,
    LIMIT,
    SHORTEST,
    CorruptError,
    code_lengths,
    decode,
    encode,
    encoded_size,
    least_size,
)


def entropy(symbols):
    """Bits a symbol."""
    p = np.bincount(symbols, minlength=256) / len(symbols)
    return -(p[p > 0] * np.log2(p[p > 0])).sum()


@pytest.mark.parametrize("width", range(9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001])
def test_bit_packing(width, count):
    values = np.random.default_rng(0).integers(0, 2**width, count).astype(np.uint8)
    packed = pack_bits(values, width)
    stream = "".join(format(v, "08b")[::-1][:width] for v in values)  # lowest bits first
    expected = [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]
    assert packed.tolist() == expected and len(packed) == packed_size(count, width)
    np.testing.assert_array_equal(unpack_bits(packed, width, count), values)
    with pytest.raises(ValueError):
        unpack_bits(np.append(packed, np.uint8(0)), width, count)


def cheapest(counts, limit):
    """The fewest bits over all sets of lengths that obey Kraft's inequality: brute force."""
    lengths = itertools.product(range(1, limit + 1), repeat=len(counts))
    return min(np.dot(counts, ls) for ls in lengths if sum(2.0**-n for n in ls) <= 1)


@pytest.mark.parametrize("limit", [3, 4])
@given(counts=st.lists(st.integers(1, 1000), min_size=2, max_size=6))
@settings(max_examples=25, deadline=None)
def test_lengths_are_optimal_under_the_limit(limit, counts):
    lengths = code_lengths(np.array(counts), limit)
    assert lengths.max() <= limit and sum(2.0 ** -int(n) for n in lengths) == 1
    assert np.dot(counts, lengths) == cheapest(counts, limit)


@given(counts=st.lists(st.integers(0, 2**40), min_size=256, max_size=256))
@settings(max_examples=20, deadline=None)
def test_no_code_is_longer_than_the_limit(counts):
    counts = np.array(counts)
    counts[:40] = [int(1.6**i) for i in range(40)]  # without a limit these alone take 39 bits
    lengths = code_lengths(counts)
    assert lengths.max() <= LIMIT and np.all((lengths > 0) == (counts > 0))
    assert sum(2.0 ** -int(n) for n in lengths if n) == 1


@given(
    data=st.one_of(
        st.binary(max_size=2000),
        st.tuples(st.sampled_from([1, 3, 40, 256]), st.integers(0, 3 * SHORTEST), st.integers(0, 9)).map(
            lambda t: np.random.default_rng(t[2]).geometric(1 / t[0], t[1]).clip(1, 256).astype(np.uint8).tobytes()
        ),
    )
)
@settings(max_examples=150, deadline=None)
def test_round_trip(data):
    symbols = np.frombuffer(data, np.uint8)
    np.testing.assert_array_equal(decode(encode(symbols), len(symbols)), symbols)


def reference(coded, count):
    """A decoder written from the format's description alone, bit by bit."""
    coded = coded.tobytes()
    nibbles = [byte >> shift & 15 for byte in coded[2:] for shift in (0, 4)]
    lengths = {symbol: nibbles[i] for i, symbol in enumerate(range(coded[0], coded[1] + 1)) if nibbles[i]}
    at = 2 + (coded[1] - coded[0] + 2) // 2
    codes, code, previous = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in lengths.items()):
        code <<= length - previous
        codes[format(code, f"0{length}b")] = symbol
        code, previous = code + 1, length
    blocks = [min(2**21, count - i) for i in range(0, count, 2**21)]
    shapes = [(n, min(1024, -(-n // 512))) for n in blocks]
    chunks = sum(c for _, c in shapes)
    smallest, width = int.from_bytes(coded[at : at + 2], "little"), coded[at + 2]
    width = 16 if width > 8 else width
    end = at + 3 + (chunks * width + 7) // 8
    index = int.from_bytes(coded[at + 3 : end], "little")
    sizes = iter([smallest + (index >> i * width & (1 << width) - 1) for i in range(chunks)])
    symbols = []
    for n, chunks in shapes:
        block = np.zeros((-(-n // (4 * chunks)), chunks, 4), np.uint8)
        for c in range(chunks):
            size = next(sizes)
            bits = format(int.from_bytes(coded[end : end + size], "little"), f"0{8 * size}b")[::-1]
            end, at = end + size, 0
            for quartet in range(c, -(-n // 4), chunks):
                for i in range(min(4, n - 4 * quartet)):
                    length = next(length for length in range(1, 13) if bits[at : at + length] in codes)
                    block[quartet // chunks, c, i] = codes[bits[at : at + length]]
                    at += length
            assert size == -(-at // 8)
        symbols.append(block.reshape(-1)[:n])
    assert end == len(coded)
    return np.concatenate(symbols) if symbols else np.zeros(0, np.uint8)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 511, 512, 513, 2049, 30_003, 70_001])
def test_the_format_is_what_it_says(count):
    symbols = np.random.default_rng(count).geometric(0.1, count).astype(np.uint8)
    coded = encode(symbols)
    assert len(coded) == encoded_size(symbols)
    np.testing.assert_array_equal(reference(coded, count), symbols)
    np.testing.assert_array_equal(decode(coded, count), symbols)


@pytest.mark.parametrize("count", [64 * 512 + 1, 256 * 512 + 1, LANES * SHORTEST - 1, LANES * SHORTEST + 5, BLOCK + 2])
def test_round_trip_of_every_shape_of_block(count):
    rng = np.random.default_rng(0)
    symbols = np.where(np.arange(count) % 999 < 500, rng.integers(0, 256, count), rng.geometric(0.3, count) % 256)
    symbols = symbols.astype(np.uint8)
    symbols[: count // 3] = 0  # chunks of very different sizes
    coded = encode(symbols)
    np.testing.assert_array_equal(decode(coded, count), symbols)
    assert encode(symbols.copy()).tobytes() == coded.tobytes()
    assert least_size(np.bincount(symbols, minlength=256)) <= len(coded) == encoded_size(symbols)


@pytest.mark.parametrize("spread", [30, 8])
def test_within_2_percent_of_the_entropy(spread):
    symbols = (np.random.default_rng(0).normal(size=400_000) * spread).round().clip(-128, 127).astype(np.int8)
    symbols = symbols.view(np.uint8)
    assert 8 * len(encode(symbols)) < 1.02 * entropy(symbols) * len(symbols)


def test_damage_is_noticed_or_harmless():
    """Without a checksum a flipped bit may decode to other symbols, but nothing crashes or grows."""
    rng = np.random.default_rng(0)
    symbols = rng.geometric(0.2, 3000).astype(np.uint8)
    coded = encode(symbols)
    for _ in range(400):
        broken = coded.copy()
        broken[rng.integers(len(coded))] ^= 1 << rng.integers(8)
        broken = broken[: rng.choice([len(coded), rng.integers(len(coded))])]
        try:
            assert len(decode(broken, len(symbols))) == len(symbols)
        except (CorruptError, ValueError):
            pass


def test_a_count_that_cannot_be_allocates_nothing():
    coded = encode(np.arange(256, dtype=np.uint8))
    for count in (-1, 10**6, 10**12, 2**62):
        with pytest.raises(CorruptError):
            decode(coded, count)
