"""Which representations a platform can run at speed; the others are expanded when a model is loaded.

A compressed model must not be slower than the dense one. Measured with XLA on CPU (jax 0.10, AVX-512, one core,
float32; medians of interleaved runs of stacked layers under ``lax.scan``; time dense / time compressed):

    w8a8, in x out   M = 1 row    M = 8   M = 64   M = 512
    128 x 128             0.99     0.85     1.16      1.07
    128 x 256             1.20     1.14     1.44      1.84
    128 x 512             1.60     1.54     1.46      1.07
    256 x 256             1.67     1.37     1.44      1.30
    512 x 512             4.87     2.92     1.68      1.41
    1024 x 1024           2.23     2.39     1.75      1.43
    2048 x 2048           3.13     3.10     2.82      1.70
    2048 x 64             2.40     1.88     1.18      0.97
    1024 x 64             2.10     1.87     1.23      0.91
    64 x 1024             0.72     1.00     1.51      1.46

So int8 dots stay where both sides are at least 128 and one of them is more; in smaller ones rounding the activations
costs what the product saves. Weight-only integers are converted before a float dot, which XLA on CPU does not fuse
(17 times slower at M = 1): they are always expanded.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp

from jaxlm.core.leaves import QArray, dequantize, is_leaf
from jaxlm.core.tree import Leaf, Params, map_params

_expand = jax.jit(dequantize)


def place(params: Params, platform: str) -> tuple[Params, list[str]]:
    """The parameters as ``platform`` ("cpu", "gpu", "tpu") runs them best, and a line for each kind it cannot.

    On CPU what is slower than dense is expanded to dense; elsewhere codes of up to 4 bits are narrowed to int4.
    """
    expanded: Counter[str] = Counter()

    def of_leaf(path: str, leaf: Leaf) -> Leaf:
        if not is_leaf(leaf):
            return leaf
        if platform != "cpu":
            return narrow(leaf)
        if fast_on_cpu(leaf):
            return leaf
        expanded[describe(leaf)] += 1
        return _expand(leaf)

    placed = map_params(of_leaf, params)
    reason = "would be slower than dense on this platform"
    return placed, [f"{kind}: {count} tensors expanded, they {reason}" for kind, count in expanded.items()]


def fast_on_cpu(leaf: QArray) -> bool:
    """Whether the leaf's product is at least as fast as float32 on CPU, by the table above."""
    n_out, n_in = leaf.codes.shape[-2:]
    return leaf.act_bits == 8 and min(n_in, n_out) >= 128 and n_in * n_out >= 2**15


def narrow(leaf: QArray) -> QArray:
    """Codes of up to 4 bits as int4, two a byte in device memory."""
    return leaf if leaf.bits > 4 else dataclasses.replace(leaf, codes=leaf.codes.astype(jnp.int4))


def describe(leaf: Leaf) -> str:
    """``int4 g128``, ``int8 channel symmetric, int8 activations``, or the dtype of a dense array."""
    if not is_leaf(leaf):
        return str(leaf.dtype)
    grid = f"g{leaf.group}" if leaf.group else "channel"
    symmetric = " symmetric" if leaf.zero is None else ""
    activations = f", int{leaf.act_bits} activations" if leaf.act_bits else ""
    return f"int{leaf.bits} {grid}{symmetric}{activations}"
