"""A decoding step with each type of key/value cache against the full one, on this machine, in turn.

    python tests/benchmarks/inference/decode_cache.py [--slots 1024] [--batch 1] [--preset 124m] [--dtype float32]

The cache is nearly full, so attention reads all of its slots. Rounds alternate, so that the ratios hold while the
machine's speed drifts; medians count. ``attention`` is the attention of the layers over their caches alone, without the
products with weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm import nn
from jaxlm.nn.attention.kv_cache import cache_bytes_per_token
from jaxlm.nn.attention.layer import attend

KINDS = ("full", "int8", "int4", "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--preset", default="124m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    config = nn.preset(args.preset, dtype=args.dtype)
    params = nn.build(config, jax.random.key(0))[1]
    rounds = {"step": {}, "attention": {}}
    temporary = {}
    for kind in KINDS:
        other = dataclasses.replace(config, kv_cache=kind)
        for name, make in (("step", step), ("attention", attention)):
            run, temporary[name, kind] = make(other, params, args)
            rounds[name][kind] = (run, [])
    for turn in range(args.rounds + 1):
        for kinds in rounds.values():
            for run, seconds in kinds.values():
                begin = time.perf_counter()
                run()
                if turn:  # the first one warms up
                    seconds.append(time.perf_counter() - begin)
    for name, kinds in rounds.items():
        full = statistics.median(kinds["full"][1])
        for kind, (_, seconds) in kinds.items():
            median = statistics.median(seconds)
            size = cache_bytes_per_token(dataclasses.replace(config, kv_cache=kind))
            print(
                f"{name:9}  {kind:4}  {1e3 * median:8.2f} ms  {median / full:.2f} of full  {size:,} bytes a token  "
                f"{temporary[name, kind] / 2**20:.1f} MiB of temporaries"
            )


def step(config, params, args):
    """A whole step: one token for every row."""
    graphdef = nn.abstract(config)[0]
    cache = nnx.merge(graphdef, params).init_cache(args.batch, args.slots)
    cache = cache.replace(index=jnp.int32(args.slots - args.rounds - 2))
    tokens = jnp.zeros((args.batch, 1), jnp.int32)
    jitted = jax.jit(lambda p, tokens, cache: nnx.merge(graphdef, p).decode(tokens, cache), donate_argnums=2)
    compiled = jitted.lower(params, tokens, cache).compile()

    def run():
        nonlocal cache
        logits, cache = compiled(params, tokens, cache)
        logits.block_until_ready()

    return run, compiled.memory_analysis().temp_size_in_bytes


def attention(config, params, args):
    """One query after another for every layer."""
    cache = nnx.merge(nn.abstract(config)[0], params).init_cache(args.batch, args.slots)
    q = jnp.ones((args.batch, 1, config.heads, config.d_head), config.dtype)

    kept = (cache.keys[0], cache.values[0])

    def layers(q, kept):
        def layer(q, i):
            k, v = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)[:, :, 0], kept)
            return q + attend(q, k, v, None, scale=0.1), None

        return jax.lax.scan(layer, q, jnp.arange(config.layers))[0]

    compiled = jax.jit(layers).lower(q, kept).compile()
    return lambda: compiled(q, kept).block_until_ready(), compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
