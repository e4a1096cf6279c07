"""Decoding one token a sequence through the weights of a 1B model: tokens a second, and the share of memory bandwidth.

    python tests/benchmarks/inference/decode_bandwidth.py [--batch 1] [--layers 16] [--width 2048] [--ffn 8192] \\
        [--kv 512]

It runs only the linear maps of the layers, scanned: no attention and no output head. It compares bfloat16 with
weight-only int8 (one scale for each output channel) and int4 (groups of 128, zero points), both as XLA runs them and,
on a GPU, by the project's kernels. Bandwidth is the bytes of the weights divided by the time; its share is relative to
a copy on the same device, counting reads and writes. Rounds alternate, and medians count. On a CPU it only shows that
the script runs (``--layers 2 --width 512 --ffn 1024``).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.compression.platforms import to_native_4bit
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core import ops
from jaxlm.core.tree import count_bytes, map_params

KINDS = {
    "bf16": lambda w: w,
    "int8": lambda w: quantize(w, bits=8),
    "int4": lambda w: to_native_4bit(quantize(w, bits=4, group=128, symmetric=False)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 1), ("layers", 16), ("width", 2048), ("ffn", 8192), ("kv", 512), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    platform = jax.default_backend()
    x_BxD = jax.random.normal(jax.random.key(1), (args.batch, args.width), jnp.bfloat16)
    dense = weights(args)
    runs, sizes = {}, {}
    for kind, compress in KINDS.items():
        params = jax.jit(lambda params, f=compress: map_params(lambda _, w: f(w), params))(dense)
        for how in ("xla", "kernel") if platform == "gpu" and kind != "bf16" else ("xla",):
            os.environ["JAXLM_KERNELS"] = str(int(how == "kernel"))
            runs[kind, how] = (jax.jit(lambda x, params: step(x, params)).lower(x_BxD, params).compile(), x_BxD, params)
            sizes[kind, how] = count_bytes(params)
    block = jnp.zeros(2**27 if platform == "gpu" else 2**23, jnp.float32)
    runs["copy", ""], sizes["copy", ""] = (jax.jit(lambda block: block + 1), block), 2 * block.nbytes
    medians = measure(runs, args.rounds)
    copied = sizes["copy", ""] / medians["copy", ""]
    print(f"{jax.devices()[0].device_kind}; a copy reaches {copied / 1e9:.0f} GB/s")
    for (kind, how), seconds in medians.items():
        if kind != "copy":
            reached, bf16 = sizes[kind, how] / seconds, medians["bf16", "xla"]
            print(
                f"{kind:5}{how:7}{args.batch / seconds:10.1f} tokens/s  {bf16 / seconds:5.2f} x bf16  "
                f"{sizes[kind, how] / 2**20:7.0f} MiB  {reached / 1e9:7.1f} GB/s  {reached / copied:4.0%} of a copy"
            )


def weights(args) -> nnx.State:
    shapes = {"q": (args.width, args.width), "k": (args.width, args.kv), "v": (args.width, args.kv),
              "o": (args.width, args.width), "gate": (args.width, args.ffn), "up": (args.width, args.ffn),
              "down": (args.ffn, args.width)}  # fmt: skip
    return nnx.State({
        name: nnx.Param(jax.random.normal(jax.random.key(0), (args.layers, *shape), jnp.bfloat16) * shape[0] ** -0.5)
        for name, shape in shapes.items()
    })


def step(x_BxD: jax.Array, params: nnx.State) -> jax.Array:
    """All products of a decoding step, each needing the one before."""

    def layer(x, w):
        kv = ops.dot(x, w["k"].get_value()) * ops.dot(x, w["v"].get_value())
        x = x + ops.dot(ops.dot(x, w["q"].get_value()) + jnp.sum(kv), w["o"].get_value())
        h = jax.nn.silu(ops.dot(x, w["gate"].get_value())) * ops.dot(x, w["up"].get_value())
        return ops.dot(h, w["down"].get_value()), None

    return jax.lax.scan(layer, x_BxD, params)[0]


def measure(runs: dict, rounds: int) -> dict[tuple, float]:
    """Median seconds of each."""
    times = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, (run, *operands) in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(*operands))
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
