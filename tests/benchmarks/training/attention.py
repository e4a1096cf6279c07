"""Attention block by block against attention with all logits at once, in turn, on the default device of JAX.

    python tests/benchmarks/training/attention.py [--lengths 1024 4096] [--rounds 7]

There are 2,048 tokens in all, and 8 heads of size 64 that share 4 key/value heads, in float32. It prints a row for each
length, causal and not, forward and with gradients: the median milliseconds of both, and their ratio.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.attention import layer as attention

TOKENS, HEADS, GROUPS, SIZE = 2048, 8, 4, 64


def programs(length: int, causal: bool, blocks: bool):
    """Forward, and the gradients of queries, keys and values; compiled."""
    rows = max(1, TOKENS // length)
    random = np.random.default_rng(0)
    shapes = (rows, length, HEADS, SIZE), (rows, GROUPS, length, SIZE), (rows, GROUPS, length, SIZE)
    arrays = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]
    mask = jnp.tril(jnp.ones((length, length), bool))[None] if causal else None

    def forward(q, k, v):
        return attention.attend(q, k, v, mask, scale=SIZE**-0.5, causal=causal)

    def backward(q, k, v):
        return jax.grad(lambda *qkv: jnp.sum(forward(*qkv) ** 2), (0, 1, 2))(q, k, v)

    with mock.patch.object(attention, "uses_flash", lambda *_: blocks):
        return [jax.jit(fn).lower(*arrays).compile() for fn in (forward, backward)], arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"{'length':>8}  {'':<8}{'':<10}{'at once':>10}{'blocks':>10}")
    for length in args.lengths:
        for causal in (True, False):
            (whole, arrays), (blocks, _) = (programs(length, causal, each) for each in (False, True))
            for name, pair in zip(("forward", "gradients"), zip(whole, blocks, strict=True), strict=True):
                seconds: list[list[float]] = [[], []]
                for _ in range(args.rounds + 1):
                    for times, program in zip(seconds, pair, strict=True):
                        begin = time.perf_counter()
                        jax.block_until_ready(program(*arrays))
                        times.append(time.perf_counter() - begin)
                one, other = (1e3 * float(np.median(times[1:])) for times in seconds)
                kind = "causal" if causal else "all"
                told = f"{length:>8}  {kind:<8}{name:<10}{one:>7.1f} ms{other:>7.1f} ms"
                print(f"{told}  {one / other:.2f} times", flush=True)


if __name__ == "__main__":
    main()
