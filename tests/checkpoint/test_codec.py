import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.checkpoint import huffman
from jaxlm.checkpoint.codec import (
    CodedArray,
    CodedStream,
    Codes,
    CorruptError,
    Planes,
    Words,
    decode,
    decode_stream,
    encode,
    encode_stream,
)

FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float64]


def gaussian_codes(bits, count=300_000, zeros=0.0, seed=0):
    """Codes modulo 2**bits of a normal weight on a symmetric grid, a share of them pruned."""
    rng = np.random.default_rng(seed)
    codes = (rng.normal(size=count) * 2 ** (bits - 1) / 3.5).round().clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes[rng.random(count) < zeros] = 0
    return (codes.astype(np.int16) & (2**bits - 1)).astype(np.uint8)


def entropy_bytes(values):
    p = np.bincount(values) / len(values)
    return -(p[p > 0] * np.log2(p[p > 0])).sum() * len(values) / 8


@given(
    bits=st.integers(2, 8),
    count=st.integers(0, 3000),
    zeros=st.sampled_from([0, 0.3, 0.6, 0.9, 0.999, 1.0]),
    storage=st.sampled_from(["plain", "huffman"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_codes_round_trip(bits, count, zeros, storage, seed):
    codes, kind = gaussian_codes(bits, count, zeros, seed), Codes(bits)
    np.testing.assert_array_equal(decode(encode(codes, kind, storage), kind, count), codes)


@given(
    dtype=st.sampled_from([*FLOATS, np.int32, np.uint8]),
    words=st.lists(st.sampled_from([0, 1, 0x8000, 0x80000000, 0x7FC00000, 0xFFFF, 0x3F80]), max_size=200),
    seed=st.integers(0, 9),
    storage=st.sampled_from(["plain", "huffman"]),
)
@settings(max_examples=150, deadline=None)
def test_words_round_trip_bit_for_bit(dtype, words, seed, storage):
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, dtype.itemsize * int(rng.integers(300)), np.uint8).view(f"u{dtype.itemsize}")
    values = np.concatenate([np.array(words, np.uint64).astype(noise.dtype), noise])
    kind = (Planes if storage == "huffman" else Words)(dtype)
    np.testing.assert_array_equal(decode(encode(values, kind, storage), kind, len(values)), values)


@pytest.mark.parametrize("dtype", FLOATS)
def test_planes_are_what_the_format_says(dtype):
    """A reader written from FORMAT.md alone, a value at a time."""
    kind = Planes(np.dtype(dtype))
    words = (np.random.default_rng(0).normal(size=300) * 0.02).astype(dtype).view(kind.dtype)
    planes = {name: symbols.tolist() for name, (_, symbols) in kind.split(words).items()}
    for i, word in enumerate(words.tolist()):
        if kind.bits == 8:
            bits = f"{planes['plane0'][i]:08b}"
        else:
            tops = [8 * at + bit for at, byte in enumerate(planes["tops"]) for bit in range(8) if byte >> bit & 1]
            room = 2 if len(tops) <= 64 else 1 if len(tops) <= 128 else 0
            rank, head = divmod(planes["plane0"][i], 2**room)
            bits = f"{tops[rank]:08b}" + (f"{head:0{room}b}" if room else "") + f"{planes['plane1'][i]:0{8 - room}b}"
            bits += "".join(f"{planes[f'plane{n}'][i]:08b}" for n in range(2, kind.bits // 8))
        assert bits[-1] + bits[:-1] == f"{word:0{kind.bits}b}"  # the sign comes first again


def test_negative_zero_is_a_value():
    values = np.array([0.0, -0.0] * 500, np.float32).view(np.uint32)
    for kind, storage in ((Words(np.dtype("f4")), "plain"), (Planes(np.dtype("f4")), "huffman")):
        np.testing.assert_array_equal(decode(encode(values, kind, storage), kind, 1000), values)


@pytest.mark.parametrize("bits,zeros", [
    (8, 0), (4, 0), (3, 0), (8, 0.8), (8, 0.9), (5, 0.9), (4, 0.9), (4, 0.5), (8, 0.95), (2, 0.8)
])
def test_within_2_percent_of_the_entropy(bits, zeros):
    codes = gaussian_codes(bits, zeros=zeros)
    part = encode(codes, Codes(bits), "huffman")
    assert part.nbytes < 1.02 * entropy_bytes(codes)


def test_shared_and_pruned_weights_are_within_2_percent_of_the_entropy():
    """As deep compression makes them: 90% zeros, and 31 values that are about equally frequent."""
    rng = np.random.default_rng(0)
    kept = rng.random(500_000) < 0.1
    codes = (rng.binomial(30, 0.5, 500_000) + 1).astype(np.uint8) * kept
    least = entropy_bytes(kept.astype(np.uint8)) + entropy_bytes(codes[kept])
    assert encode(codes, Codes(5), "huffman").nbytes < 1.02 * least


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("scale", [0.018, 0.02, 0.036])  # where a code of the exponents alone misses it
def test_floats_are_within_2_percent_of_the_entropy_of_their_exponents(dtype, scale):
    kind = Planes(np.dtype(dtype))
    words = (np.random.default_rng(0).normal(size=300_000) * scale).astype(dtype).view(kind.dtype)
    exponents = (words >> kind.dtype.type(kind.bits - 9)).astype(np.uint8)
    part = encode(words, kind, "huffman")
    first, rest = part.streams["plane0"].nbytes, len(words) * (kind.bits - 8) / 8
    assert part.nbytes < entropy_bytes(exponents) + rest
    _, symbols = kind.split(words)["plane0"]
    assert first < 1.02 * entropy_bytes(symbols)


@pytest.mark.parametrize("tops,room", [(1, 2), (64, 2), (65, 1), (128, 1), (129, 0), (256, 0)])
def test_first_bytes_of_any_number_leave_room_for_fewer_bits_beside_them(tops, room):
    kind = Planes(np.dtype(np.uint16))
    first = np.random.default_rng(0).permutation(256)[:tops]
    values = (np.repeat(first, 256) << 8 | np.tile(np.arange(256), tops)).astype(np.uint16)
    streams = kind.split(values)
    assert streams["plane0"][1].max() == (tops << room) - 1 and streams["plane1"][0] == 8 - room
    np.testing.assert_array_equal(kind.join(lambda name, width, count: streams[name][1], len(values)), values)


def test_plain_codes_are_packed_and_zeros_left_out():
    assert encode(gaussian_codes(3, 80_000) | 1, Codes(3), "plain").nbytes == 30_000
    sparse = gaussian_codes(8, 80_000, zeros=0.9)
    part = encode(sparse, Codes(8), "plain")
    assert part.layout == "mask" and part.nbytes == 10_000 + np.count_nonzero(sparse)


def test_layouts_suit_the_zeros():
    assert encode(gaussian_codes(8), Codes(8), "huffman").layout == "full"
    assert encode(gaussian_codes(8, zeros=0.99), Codes(8), "huffman").layout == "gaps"
    pattern = np.resize([0, 1, 0, 1, 1, 0, 0, 1], 400_000).astype(np.uint8) * gaussian_codes(8, 400_000)
    assert encode(pattern, Codes(8), "huffman").layout == "mask"  # regular zeros: the mask is nearly free


def test_bfloat16_weights_take_less_than_70_percent():
    weights = (np.random.default_rng(0).normal(size=200_000) * 0.02).astype(ml_dtypes.bfloat16)
    part = encode(weights.view(np.uint16), Planes(weights.dtype), "huffman")
    assert part.nbytes < 0.7 * weights.nbytes
    assert part.streams["plane1"].method == "raw"  # sign and mantissa do not compress


@pytest.mark.parametrize("symbols", [np.zeros(50_000, np.uint8), np.resize(np.arange(7, dtype=np.uint8), 50_000)])
def test_the_cheapest_method_is_chosen(symbols):
    stream = encode_stream(symbols, 8, "huffman")
    assert stream.method == "zstd" and len(stream.data) < 100
    noise = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    assert encode_stream(noise, 8, "huffman").method == "raw"
    assert encode_stream(symbols, 8, "plain").method == "raw"


@pytest.mark.parametrize("spread", [0.5, 3, 1000])
@pytest.mark.parametrize("count", [0, 1, 60, 3000, 50_000])
@pytest.mark.parametrize("width", [4, 8])
def test_no_other_method_takes_fewer_bytes(width, count, spread):
    symbols = (np.random.default_rng(0).normal(size=count) * spread).astype(np.int64) & 2**width - 1
    symbols = symbols.astype(np.uint8)
    sizes = {
        "huffman": len(huffman.encode(symbols)),
        "zstd": len(zstandard.ZstdCompressor(level=3).compress(symbols.data)),
        "raw": -(-count * width // 8),
    }
    stream = encode_stream(symbols, width, "huffman")
    assert len(stream.data) == stream.nbytes == sizes[stream.method] == min(sizes.values())
    np.testing.assert_array_equal(decode_stream(stream.method, stream.data, width, count), symbols)


@pytest.mark.parametrize("zeros", [0, 0.5, 0.9])
def test_damage_raises_corrupt_and_never_grows(zeros):
    rng = np.random.default_rng(0)
    kind, codes = Codes(8), gaussian_codes(8, 3000, zeros)
    part = encode(codes, kind, "huffman")
    for _ in range(300):
        name = rng.choice(list(part.streams))
        method, data = part.streams[name].method, part.streams[name].data
        broken = data.copy()
        broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
        broken = broken[: rng.choice([len(data), rng.integers(len(data))])]
        method = rng.choice([method, "raw", "huffman", "zstd", "lzma"], p=[0.8, 0.05, 0.05, 0.05, 0.05])
        layout = rng.choice([part.layout, "full", "gaps", "mask", "rows"], p=[0.8, 0.05, 0.05, 0.05, 0.05])
        gaps = rng.choice([part.gaps, -1, 5, 10**15], p=[0.7, 0.1, 0.1, 0.1])
        damaged = CodedArray(layout, part.streams | {name: CodedStream.of(method, broken)}, gaps)
        try:
            assert decode(damaged, kind, len(codes)).shape == codes.shape
        except (CorruptError, ValueError):
            pass


def test_what_no_encoder_writes_is_corrupt():
    for kind, dtype in ((Words, "S9"), (Planes, "O"), (Planes, "c16")):
        with pytest.raises(CorruptError):
            kind(np.dtype(dtype))
    for bits in (0, 9, 10**15, -1):
        with pytest.raises(CorruptError):
            Codes(bits)
    for data in (np.zeros(5, np.int8), np.zeros((1, 5), np.uint8)):
        with pytest.raises(CorruptError):
            decode_stream("raw", data, 8, 5)
    words = np.arange(1, 6, dtype=np.uint16)
    part = encode(words, Planes(words.dtype), "huffman")
    nothing = CodedArray("full", part.streams | {"tops": CodedStream.of("raw", np.zeros(32, np.uint8))})
    with pytest.raises(CorruptError, match="first bytes"):
        decode(nothing, Planes(words.dtype), 5)


def test_a_frame_that_claims_more_than_is_due_is_not_decompressed():
    bomb = encode_stream(np.zeros(10**7, np.uint8), 8, "huffman").data
    with pytest.raises(CorruptError, match="does not hold"):
        decode_stream("zstd", bomb, 8, 1000)
