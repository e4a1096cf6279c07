"""Entropy coding: its size against the entropy and against zstd, its speed, and its effect on a bfloat16 checkpoint.

    python tests/benchmarks/compression/huffman.py

With JAXLM_SHARED, the checkpoint is models/books-llama. The streams are like those of compressed models, one symbol a
byte. Rounds alternate between Huffman and zstd -3. Rates are megabytes of symbols a second: the median, and the best in
brackets; on a busy machine also by processor time, which is the rate of one core with nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np
import zstandard
from flax import nnx

from jaxlm.checkpoint import huffman
from jaxlm.checkpoint.codec import Codes, Planes, Symbolizer, encode
from jaxlm.checkpoint.storage import pack_params, unpack_params
from jaxlm.core.host_memory import keep_freed_memory
from jaxlm.core.tree import flatten
from jaxlm.hf.tensor_files import TensorFiles, write_tensors


def entropy(values: np.ndarray) -> float:
    """Bits a value, of values that are independent of each other."""
    p = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(p * np.log2(p)).sum())


def gaussian_codes(rng: np.random.Generator, bits: int, count: int, step: float = 3.5) -> np.ndarray:
    """Codes modulo ``2**bits`` of a normal weight, the grid's end at ``step`` standard deviations."""
    half = 2 ** (bits - 1)
    codes = (rng.normal(size=count) * half / step).round().clip(-half, half - 1)
    return (codes.astype(np.int16) & 2**bits - 1).astype(np.uint8)


def streams(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    weights = (rng.normal(size=count) * 0.02).astype(np.float32)
    bf16 = weights.astype(ml_dtypes.bfloat16).view(np.uint16)
    pairs = Codes(4).split(gaussian_codes(rng, 4, 2 * count, 2.7))["codes"][1]
    return {
        "int4 pairs": pairs,
        "int8 codes": gaussian_codes(rng, 8, count),
        "bf16 exponents": (bf16 >> 7).astype(np.uint8),
        "bf16 plane0": Planes(np.dtype(ml_dtypes.bfloat16)).split(bf16)["plane0"][1],
        "f32 plane0": Planes(weights.dtype).split(weights.view(np.uint32))["plane0"][1],
        **{f"gaps of {z}% zeros": (rng.geometric(1 - z / 100, count) - 1).clip(0, 254).astype(np.uint8)
           for z in (80, 90, 95)},
        "mask of 80% zeros": np.packbits(rng.random(8 * count) > 0.8, bitorder="little"),
    }


class Clock:
    def __init__(self):
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*args)
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        return result

    def rate(self, count: int) -> str:
        wall, best, cpu = (count / 1e6 / t for t in (median(self.wall), min(self.wall), median(self.cpu)))
        return f"{wall:6.0f} ({best:5.0f}) {cpu:5.0f}"


def time_streams(rng: np.random.Generator, count: int, rounds: int) -> None:
    columns = f"{'decode':>20} {'encode':>20} {'zstd decode':>20}"
    print(f"{count:,} symbols a stream; MB/s: median (best), a core")
    print(f"{'':19}{columns}   size / entropy   zstd    raw")
    for name, symbols in streams(rng, count).items():
        write, read, peer = Clock(), Clock(), Clock()
        packed = zstandard.ZstdCompressor(level=3).compress(symbols.data)
        for i in range(rounds + 1):
            if i == 1:
                write, read, peer = Clock(), Clock(), Clock()  # the first round compiled
            coded = write(huffman.encode, symbols)
            decoded = read(huffman.decode, coded, len(symbols))
            peer(zstandard.ZstdDecompressor().decompress, packed)
        assert np.array_equal(decoded, symbols)
        least = entropy(symbols) * len(symbols) / 8
        rates = " ".join(clock.rate(len(symbols)) for clock in (read, write, peer))
        sizes = [len(data) / least for data in (coded, packed, symbols)]
        print(f"{name:19}{rates}   {sizes[0]:15.4f} {sizes[1]:6.3f} {sizes[2]:6.3f}")


def tensors(rng: np.random.Generator, count: int) -> dict[str, tuple[np.ndarray, Symbolizer, float]]:
    """Values, their kind, and the bytes of a mask and the kept values at their entropies (of floats, the exponents at
    theirs and the rest as it is)."""
    kinds: dict[str, tuple[Symbolizer, np.ndarray]] = {
        **{f"int{bits}": (Codes(bits), gaussian_codes(rng, bits, count, 2.7)) for bits in (2, 3, 4)},
        "5-bit k-means": (Codes(5), gaussian_codes(rng, 5, count)),
        "int8": (Codes(8), gaussian_codes(rng, 8, count)),
    }
    for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)):
        words = (rng.normal(size=count) * 0.02).astype(dtype).view(f"u{dtype.itemsize}")
        kinds[dtype.name] = Planes(dtype), words
    out = {}
    for name, (kind, values) in kinds.items():
        values[values == 0] = 1  # zeros are those of the mask
        masks = {f"{z}% zeros": (rng.random(count) >= z / 100, None) for z in (0, 50, 80, 90, 95, 98)}
        two_of_four = rng.permuted(np.tile(np.array([False, False, True, True]), (count // 4, 1)), axis=1).reshape(-1)
        for pruning, (mask, bits) in (masks | {"2:4": (two_of_four, np.log2(6) / 4)}).items():
            kept = values[mask]
            if isinstance(kind, Codes):
                value_bits = entropy(kept)
            else:
                exponents = kept >> kind.dtype.type(kind.bits - 9) & kind.dtype.type(255)
                value_bits = entropy(exponents) + kind.bits - 8
            least = (value_bits * len(kept) + (entropy(mask) if bits is None else bits) * count) / 8
            out[f"{name}, {pruning}"] = values * mask, kind, least
    return out


def measure_tensors(rng: np.random.Generator, count: int) -> None:
    print(f"\n{count:,} values a tensor{'':9}size / entropy  bits a value  layout and methods")
    for name, (values, kind, least) in tensors(rng, count).items():
        part = encode(values, kind, "huffman")
        methods = ", ".join(f"{stream} {method}" for stream, (method, _) in part.streams.items())
        print(f"{name:28}{part.nbytes / least:15.4f}{8 * part.nbytes / count:14.3f}  {part.layout}: {methods}")


def measure_checkpoint(name: str, weights: dict[str, np.ndarray]) -> None:
    params = nnx.State({path: nnx.Param(array.astype(ml_dtypes.bfloat16)) for path, array in weights.items()})
    with tempfile.TemporaryDirectory() as directory:
        sizes, spent = {}, {}
        for storage in ("plain", "huffman"):
            (home := Path(directory, storage)).mkdir()
            clocks = Clock(), Clock()
            packed, meta = clocks[0](pack_params, params, storage)
            write_tensors(home, packed)
            back = clocks[1](unpack_params, params, TensorFiles(home), meta)
            for path, leaf in flatten(params).items():
                assert np.asarray(leaf).tobytes() == np.asarray(flatten(back)[path]).tobytes(), path
            sizes[storage] = TensorFiles(home).nbytes
            spent[storage] = [round(clock.wall[0], 2) for clock in clocks]
    coded, plain = sizes["huffman"], sizes["plain"]
    print(f"{name}: {coded:,} of {plain:,} bytes, {coded / plain:.1%}, bit for bit; seconds to pack and to read", spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--symbols", type=int, default=2**23, help="of each stream")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    keep_freed_memory()
    rng = np.random.default_rng(0)
    time_streams(rng, args.symbols, args.rounds)
    measure_tensors(rng, 2**20)
    print("\nbfloat16 checkpoints")
    normal = {f"layer{i}": rng.normal(size=(2048, 1024)) * 0.02 for i in range(8)}
    measure_checkpoint("normal weights", normal | {"norm": np.ones(2048)})
    if "JAXLM_SHARED" in os.environ:
        files = TensorFiles(Path(os.environ["JAXLM_SHARED"], "models/books-llama"))
        measure_checkpoint("books-llama", {path.replace(".", "-"): files[path] for path in files})


if __name__ == "__main__":
    main()
