"""Which representations a platform can run at speed; the others are expanded when a model is loaded.

A compressed model must not be slower than the dense one. Measured with XLA on CPU (jax 0.10, AVX-512, one core,
float32; medians of interleaved runs; time dense / time w8a8; M rows of activations):

    layers of a stack, under lax.scan                    one matrix, used whole again and again
    in x out       M = 1   M = 8  M = 64  M = 512        in x out       M = 1   M = 8  M = 64
    128 x 128       0.99    0.85    1.16     1.07        128 x 512       0.65    0.76    1.15
    128 x 256       1.20    1.14    1.44     1.84        256 x 1024      0.62    1.01    1.55
    128 x 512       1.60    1.54    1.46     1.07        512 x 2048      1.08    1.32    1.67
    256 x 256       1.67    1.37    1.44     1.30        1024 x 4096     2.63    2.60    1.83
    512 x 512       4.87    2.92    1.68     1.41        256 x 16384     1.81    2.09    1.60
    1024 x 1024     2.23    2.39    1.75     1.43
    2048 x 2048     3.13    3.10    2.82     1.70
    1024 x 64       2.10    1.87    1.23     0.91
    64 x 1024       0.72    1.00    1.51     1.46

A layer is copied out of its stack at every use, and int8 is a quarter of the copy: there w8a8 wins from 128 x 256 on.
A matrix that stays in cache has to be larger before the product saves more than rounding the activations costs.
Weight-only integers are converted to float at every use, 0.2 to 0.8 of the dense speed at M = 8: always expanded.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp

from jaxlm.core.leaves import Codebook, LoRA, LowRank, QArray, dequantize, is_leaf
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
        if isinstance(leaf, LoRA):
            return dataclasses.replace(leaf, base=of_leaf(path, leaf.base))
        if platform != "cpu":
            return narrow(leaf)
        if fast_on_cpu(leaf):
            return leaf
        expanded[describe(leaf)] += 1
        return _expand(leaf)

    placed = map_params(of_leaf, params)
    reason = "would be slower than dense on this platform"
    return placed, [f"{kind}: {count} tensors expanded, they {reason}" for kind, count in expanded.items()]


def fast_on_cpu(leaf: Leaf) -> bool:
    """Whether the leaf's product is at least as fast as float32 on CPU, by the table above."""
    if not isinstance(leaf, QArray) or leaf.codes.dtype != jnp.int8:
        return False
    *layers, n_out, n_in = leaf.codes.shape
    return leaf.act_bits == 8 and min(n_in, n_out) >= 128 and n_in * n_out >= (2**15 if layers else 2**20)


def narrow(leaf: Leaf) -> Leaf:
    """Codes of up to 4 bits as int4, two a byte in device memory."""
    if not isinstance(leaf, QArray) or leaf.bits > 4:
        return leaf
    return dataclasses.replace(leaf, codes=leaf.codes.astype(jnp.int4))


def describe(leaf: Leaf) -> str:
    """``int4 g128``, ``int8 channel symmetric, int8 activations``, or the dtype of a dense array."""
    if not is_leaf(leaf):
        return str(leaf.dtype)
    if isinstance(leaf, LoRA):
        return f"{describe(leaf.base)} + rank {leaf.a.shape[-1]}"
    if isinstance(leaf, LowRank):
        return f"rank {leaf.a.shape[-1]} of {describe(leaf.a)}"
    grid = f"g{leaf.group}" if leaf.group else "channel"
    if isinstance(leaf, Codebook):
        return f"{leaf.bits}-bit codebook" if leaf.kind == "shared" else f"{leaf.kind} {grid}"
    symmetric = " symmetric" if leaf.zero is None else ""
    kind = "int" if jnp.issubdtype(leaf.codes.dtype, jnp.integer) else "float"
    static = "" if leaf.act_scale is None else "static "
    activations = f", {static}{kind}{leaf.act_bits} activations" if leaf.act_bits else ""
    return f"{kind}{leaf.bits} {grid}{symmetric if kind == 'int' else ''}{activations}"
