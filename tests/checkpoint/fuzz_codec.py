"""Damages coded streams and packed files at random: decoders must answer with an error or the right thing.

    python tests/checkpoint/fuzz_codec.py --rounds 5000 --seed 0

``test_fuzz_codec.py`` runs a few rounds of each target. What must hold:

    stream   Huffman, zstd or raw bytes: as many symbols as were asked for, or CorruptError
    part     layouts, methods and counts too: as many values as were asked for, or CorruptError
    file     a damaged model.safetensors: the weights that were written, bit for bit, or one line of UserError
    mended   the same behind right checksums, as a forger would: weights of the right shapes, or one line of UserError

and that none of them allocates more than a fixed multiple of what it was given or asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from jaxlm.checkpoint import codec, huffman
from jaxlm.checkpoint import storage as formats
from jaxlm.checkpoint.codec import CodedArray, CodedStream, Codes, CorruptError, Planes
from jaxlm.checkpoint.storage import pack_params, unpack_params
from jaxlm.compression.prune.scores import magnitude
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, LowRank
from jaxlm.core.tree import Params, flatten
from jaxlm.hf.directory import _weights_metadata
from jaxlm.hf.tensor_files import TensorFiles, write_tensors

ODD = (
    None, -1, 0, 1, 3, 9, 255, 10**6, 10**15, 2**63, 0.5, "zstd", "raw", "huffman", "mask", "gaps", "float64", "",
    {}, [], [10**9] * 3,
)
_FIXED = 24 << 20  # bytes: the decoder's buffers


def damaged(rng: np.random.Generator, data: np.ndarray) -> np.ndarray:
    """Bytes flipped, overwritten, cut off, left out, repeated or added, one to three times over."""
    data = data.copy()
    for _ in range(rng.integers(1, 4)):
        if not len(data):
            return rng.integers(0, 256, 4, np.uint8)
        at = int(rng.integers(len(data)) * rng.choice([1.0, 0.02]))  # headers come first
        few = int(rng.integers(1, 9))
        match rng.integers(7):
            case 0 | 1:
                data[at] ^= np.uint8(1 << rng.integers(8))
            case 2:
                data[at : at + few] = rng.choice([0, 255, rng.integers(256)])
            case 3:
                data = data[:at]
            case 4:
                data = np.delete(data, slice(at, at + few))
            case 5:
                data = np.insert(data, at, data[at : at + few])
            case 6:
                data = np.concatenate([data, rng.integers(0, 256, few, np.uint8)])
    return data


def within(limit: int, function: Callable[[], np.ndarray | Params]) -> np.ndarray | Params:
    """What the function gives; AssertionError where it takes more memory than ``limit`` bytes on the way."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        return function()
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak <= limit, f"{peak} bytes allocated, {limit} allowed"


def symbols_of(rng: np.random.Generator) -> np.ndarray:
    count = int(rng.choice([1, 5, 700, 5000, 40_000]))
    return rng.geometric(rng.choice([0.02, 0.3, 0.9]), count).clip(0, 255).astype(np.uint8)


def fuzz_stream(rng: np.random.Generator) -> bool:
    symbols = symbols_of(rng)
    stream = codec.encode_stream(symbols, 8, "huffman")
    method, data = stream.method, stream.data
    if rng.random() < 0.7:
        method, data = "huffman", huffman.encode(symbols)
    data = damaged(rng, data)
    count = len(symbols) if rng.random() < 0.8 else int(rng.choice([0, 1, len(symbols) + 1, 10**7, 10**12, -1]))
    try:
        out = within(32 * (len(data) + len(symbols)) + _FIXED, lambda: codec.decode_stream(method, data, 8, count))
    except CorruptError:
        return True
    assert out.shape == (count,) and out.dtype == np.uint8
    return False


def fuzz_part(rng: np.random.Generator) -> bool:
    bits, zeros = int(rng.integers(2, 9)), rng.choice([0, 0.5, 0.9, 0.99])
    kind, values = Codes(bits), symbols_of(rng) & np.uint8(2**bits - 1)
    if rng.random() < 0.4:
        dtype = np.dtype(rng.choice([ml_dtypes.bfloat16, np.float32, np.float16, ml_dtypes.float8_e4m3fn]))
        kind, values = Planes(dtype), rng.normal(size=len(values)).astype(dtype).view(f"u{dtype.itemsize}")
    values = np.where(rng.random(len(values)) < zeros, 0, values).astype(values.dtype)
    part = codec.encode(values, kind, "huffman")
    streams = dict(part.streams)
    for name in rng.choice(list(streams), rng.integers(1, 3)):
        method = str(rng.choice([streams[name].method] * 9 + ["raw", "huffman", "zstd", "lzma"]))
        streams[name] = CodedStream.of(method, damaged(rng, streams[name].data))
    layout = str(rng.choice([part.layout] * 9 + ["full", "mask", "gaps", "rows"]))
    gaps = rng.choice([part.gaps] * 6 + [0, 5, -1, len(values), 10**15]).item()
    try:
        out = within(
            100 * values.nbytes + 32 * part.nbytes + _FIXED,
            lambda: codec.decode(CodedArray(layout, streams, gaps), kind, len(values)),
        )
    except CorruptError:
        return True
    assert out.shape == values.shape and out.dtype == kind.dtype
    return False


@cache
def weights() -> Params:
    rng = np.random.default_rng(0)
    normal = {name: jax.numpy.asarray(rng.normal(size=(40, 48)) * 0.02, name) for name in ("float32", "bfloat16")}
    w = normal["float32"]
    leaves = {
        **normal,
        "pruned": magnitude(w, sparsity=0.9),
        "w4": quantize(w, bits=4, group=32, symmetric=False),
        "shared": Codebook(rng.binomial(15, 0.5, (48, 40)).astype(np.uint8), np.arange(16, dtype=np.float32), None, 4),
        "factors": LowRank(quantize(w[:, :6], bits=8), w[:6]),
        "w8a8": quantize(magnitude(w, sparsity=0.8), bits=8, act_bits=8),
    }
    return nnx.State({name: {"kernel": nnx.Param(leaf)} for name, leaf in leaves.items()})


@cache
def packed(storage: str) -> tuple[formats.Tensors, str]:
    """The weights' arrays and their metadata as JSON."""
    tensors, meta = pack_params(weights(), storage)
    return tensors, json.dumps(meta)


def load(directory: Path, like: Params) -> Params:
    files = TensorFiles(directory)
    return unpack_params(like, files, _weights_metadata(files, directory))


def answers(load: Callable[[], Params], size: int) -> Params | None:
    """What is loaded, or None where there is a UserError of one line."""
    try:
        return within(400 * size + _FIXED, load)
    except UserError as error:
        assert "\n" not in str(error), str(error)
        return None


def fuzz_file(rng: np.random.Generator) -> bool:
    params, storage = weights(), str(rng.choice(["plain", "huffman"]))
    with tempfile.TemporaryDirectory() as directory:
        write_tensors(Path(directory), *packed(storage))
        path = Path(directory, "model.safetensors")
        data = damaged(rng, np.fromfile(path, np.uint8))
        path.write_bytes(data.tobytes())
        back = answers(lambda: load(Path(directory), params), len(data))
    if back is not None:
        assert same(back, params), "other weights than were written"
    return back is None


def fuzz_mended(rng: np.random.Generator) -> bool:
    params, storage = weights(), str(rng.choice(["plain", "huffman"]))
    original, text = packed(storage)
    tensors, meta = dict(original), json.loads(text)
    size = sum(array.nbytes for array in tensors.values())
    path = str(rng.choice(list(meta["tensors"])))
    entry = meta["tensors"][path]
    if rng.random() < 0.6:
        name = str(rng.choice([name for name in tensors if name == path or name.startswith(path + "/")]))
        array = tensors[name]
        flat = damaged(rng, array.reshape(-1).view(np.uint8))
        cut = flat[: len(flat) // array.dtype.itemsize * array.dtype.itemsize].view(array.dtype)
        tensors[name] = cut.reshape(array.shape) if cut.size == array.size else cut
    else:
        at = scalars(entry)
        *outer, last = at[rng.integers(len(at))]
        node = entry
        for key in outer:
            node = node[key]
        node[last] = ODD[rng.integers(len(ODD))]
    try:
        names = formats._suffixes(entry)
        entry["crc32"] = formats._checksum(entry, {name: tensors[formats._name(path, name)] for name in names})
    except (AttributeError, KeyError, TypeError):
        pass  # no checksum can be right
    back = answers(lambda: unpack_params(params, tensors, meta), size)
    if back is not None:
        assert shapes(back) == shapes(params)
    return back is None


def scalars(node: object, at: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The paths of all that can be replaced in JSON."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return ([at] if at else []) + [path for key, child in items for path in scalars(child, (*at, key))]


def shapes(params: Params) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in flatten(params).values()]


def same(a: Params, b: Params) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (x.dtype, x.shape, np.asarray(x).tobytes()) == (y.dtype, y.shape, np.asarray(y).tobytes()) for x, y in pairs
    )


TARGETS = {"stream": fuzz_stream, "part": fuzz_part, "file": fuzz_file, "mended": fuzz_mended}


def fuzz(target: str, rounds: int, seed: int) -> int:
    """How many rounds were refused; AssertionError, naming the round, where one went wrong."""
    refused = 0
    tracemalloc.start()
    try:
        for i in range(rounds):
            try:
                refused += TARGETS[target](np.random.default_rng([seed, i]))
            except Exception as error:
                raise AssertionError(f"{target}, seed {seed}, round {i}: {type(error).__name__}: {error}") from error
    finally:
        tracemalloc.stop()
    return refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for target in TARGETS:
        print(f"{target}: {args.rounds} rounds, {fuzz(target, args.rounds, args.seed)} refused", flush=True)


if __name__ == "__main__":
    sys.exit(main())
