"""Lowers a compressed model for a platform: representations that would be slower than dense there are expanded.

This happens when a model is loaded; files keep every representation. Measured with XLA on CPU (jax 0.10, AVX-512, one
core, float32; medians of interleaved runs; time dense / time w8a8; M rows of activations):

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

A layer is copied out of its stack at every use, and the int8 copy has a quarter of the bytes: there w8a8 wins from
128 x 256 on. A matrix that stays in cache must be larger before the product saves more than rounding the activations
costs.

The gain depends on XLA: that of jax 0.12 has VNNI kernels for int8 (660 to 820 GOP/s on this core, where dense
float32 reaches 200 GFLOP/s), that of 0.10 has none (310 to 340). Time dense / time compressed of layers of a stack, by
``tests/benchmarks/inference/cpu_dots.py``, in seconds of CPU on a machine that others used; rows differ by a tenth
between runs:

                             jax 0.12                                jax 0.10
    in x out     kind        M = 1    M = 8  M = 128  M = 512        M = 1    M = 8  M = 128  M = 512
    512 x 512    w8a8         2.55     2.71     3.18     3.22         3.29     2.42     1.48     1.51
    1024 x 1024  w8a8         2.18     2.51     3.34     3.59         2.33     2.25     1.57     1.47
    1024 x 4096  w8a8         3.28     3.41     3.77     3.43         3.04     2.76     1.86     1.67
    2048 x 2048  w8a8         2.96     3.81     3.93     3.71         3.34     2.35     1.88     1.74
    512 x 512    w8a16        2.59     1.83     1.26     1.07         3.30     1.38     0.57     0.54
    1024 x 1024  w8a16        2.30     1.80     1.37     1.21         2.34     1.28     0.58     0.51
    1024 x 4096  w8a16        3.14     2.77     1.54     1.27         3.41     1.74     0.73     0.60
    2048 x 2048  w8a16        2.86     2.77     1.64     1.29         3.36     1.65     0.76     0.62
    1024 x 1024  low rank     2.04     1.91     1.93     2.02         2.03     2.07     2.00     2.03
    1024 x 1024  w4a16 g128   1.63     0.27     0.65     0.89         1.75     0.29     0.62     0.86
    1024 x 1024  nf4          0.70     0.29     0.70     0.90         0.73     0.31     0.70     0.90
    1024 x 1024  fp8          0.12     0.19     0.55     0.81         0.19     0.21     0.58     0.83

- w8a8 wins with both versions. A scale for each token and one fixed scale have the same speed.
- Weight-only integers with one scale an output channel are multiplied as int8 planes (``core.ops``). With jax 0.12 they
  win at every M. With 0.10 they win where one token is decoded and lose in prefill, so they are expanded.
- Integers with a scale a group, codebooks and float8 are converted to float32 at every use, which takes longer than the
  product, so they are expanded. (Integer products of single groups would win at M = 1 and lose from M = 512 on.)
- So are integers with a scale a group beside int8 activations (w4a8 g128, 1024 x 1024 and 1024 x 4096, jax 0.10): as
  floats 1.3 to 1.6 at M = 1 and 0.6 to 0.9 from M = 8 on, by integer products of single groups 0.1 to 0.8.
- Low-rank factors, here with half of the entries, win by what they save: 0.9 to 1.1 with 90% of the entries, 1.1 to 1.4
  with 75%. They stay where they save a quarter. (One matrix at M = 1 had 0.8 at 1024 x 1024 in some runs.)

GPUs and TPUs keep every representation; the effect on their speed has not been measured.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp

from jaxlm.core.leaves import Codebook, LoRA, LowRank, QArray, dequantize, is_leaf
from jaxlm.core.tree import Leaf, Params, map_params

_expand = jax.jit(dequantize)
_VNNI = jax.__version_info__ >= (0, 12)  # whether XLA's int8 kernels use these instructions


def lower_for_platform(params: Params, platform: str) -> tuple[Params, list[str]]:
    """The parameters as ``platform`` ("cpu", "gpu" or "tpu") runs them best, and notes about what was expanded.

    On CPU, weights that would be slower than dense become dense. On GPU and TPU, codes of up to 4 bits become native
    int4.
    """
    expanded: Counter[str] = Counter()

    def lower(path: str, leaf: Leaf) -> Leaf:
        if not is_leaf(leaf):
            return leaf
        if isinstance(leaf, LoRA):
            return dataclasses.replace(leaf, base=lower(path, leaf.base))
        if isinstance(leaf, LowRank) and (platform != "cpu" or fast_on_cpu(leaf)):
            return LowRank(lower(path, leaf.a), lower(path, leaf.b))
        if platform != "cpu":
            return to_native_4bit(leaf)
        if fast_on_cpu(leaf):
            return leaf
        expanded[describe_leaf(leaf)] += 1
        return _expand(leaf)

    lowered = map_params(lower, params)
    reason = "would be slower than dense on this platform"
    return lowered, [f"{kind}: {count} tensors expanded, they {reason}" for kind, count in expanded.items()]


def fast_on_cpu(leaf: Leaf) -> bool:
    """Whether products with the leaf are at least as fast as in float32 on CPU, by the tables above. Low-rank factors
    are judged as if they were dense."""
    if isinstance(leaf, LowRank):
        return 4 * leaf.a.shape[-1] * sum(leaf.shape[-2:]) <= 3 * leaf.shape[-2] * leaf.shape[-1]
    if not isinstance(leaf, QArray) or leaf.codes.dtype != jnp.int8:
        return False
    *layers, n_out, n_in = leaf.codes.shape
    size, narrowest = n_in * n_out, min(n_in, n_out)
    if leaf.act_bits and leaf.scale.shape[-1] == 1:
        return narrowest >= 128 and size >= (2**15 if layers else 2**20)
    return _VNNI and leaf.scale.shape[-1] == 1 and narrowest >= 512 and size >= (2**18 if layers else 2**20)


def to_native_4bit(leaf: Leaf) -> Leaf:
    """The leaf with codes of up to 4 bits as native int4 or uint4, two a byte in device memory; others as they are."""
    if not isinstance(leaf, QArray | Codebook) or leaf.bits > 4:
        return leaf
    return dataclasses.replace(leaf, codes=leaf.codes.astype(jnp.int4 if isinstance(leaf, QArray) else jnp.uint4))


def describe_leaf(leaf: Leaf) -> str:
    """The representation in words: ``int4 g128``, ``int8 channel symmetric, int8 activations``, or the dtype of an
    array."""
    if not is_leaf(leaf):
        return str(leaf.dtype)
    if isinstance(leaf, LoRA):
        return f"{describe_leaf(leaf.base)} + rank {leaf.a.shape[-1]}"
    if isinstance(leaf, LowRank):
        return f"rank {leaf.a.shape[-1]} of {describe_leaf(leaf.a)}"
    grid = f"g{leaf.group}" if leaf.group else "channel"
    if isinstance(leaf, Codebook):
        return f"{leaf.bits}-bit codebook" if leaf.kind == "shared" else f"{leaf.kind} {grid}"
    symmetric = " symmetric" if leaf.zero is None else ""
    kind = "int" if jnp.issubdtype(leaf.codes.dtype, jnp.integer) else "float"
    static = "" if leaf.act_scale is None else "static "
    activations = f", {static}{kind}{leaf.act_bits} activations" if leaf.act_bits else ""
    return f"{kind}{leaf.bits} {grid}{symmetric if kind == 'int' else ''}{activations}"
