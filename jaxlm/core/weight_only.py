"""A GPU kernel (Triton) for ``x @ dequantize(w)`` with few rows and integer weights: it dequantizes in registers.

A decoding step takes as long as reading its weights does. Where XLA does not fuse the conversion into the product, it
writes the dequantized weights to memory and reads them again. The kernel reads the codes once, two int4 a byte. At best
its time falls with the bytes: to a half (int8) and a quarter (int4) of the time with bfloat16.

The kernel has not run on a GPU yet. The tests compare it with ``reference`` in Pallas' interpreter and lower it to
Triton, which says nothing about its speed. So ``ops.dot`` leaves these products to XLA unless ``JAXLM_KERNELS=1`` is
set. That is for one device, because XLA does not split a kernel over a mesh.
``tests/benchmarks/inference/decode_bandwidth.py`` measures both. The kernel does not work on TPUs: the scales of a
group are a narrow column, which Mosaic cannot index.
"""

from __future__ import annotations

import math
import os
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxlm.core.leaves import QArray, coded_values

ROWS = 16  # the fewest rows of a tensor-core product
PROGRAMS = 256  # about as many as a product is split into: two for each multiprocessor of a large GPU
UNROLLED = 16  # blocks of columns in a program, at most


def enabled() -> bool:
    """Whether ``JAXLM_KERNELS=1`` is set; read when a product is traced."""
    return os.environ.get("JAXLM_KERNELS") == "1"


def takes(x_MxI: jax.Array, w: QArray) -> bool:
    """Whether ``dot`` takes this product: at most 16 rows, one matrix of integers that blocks of 16 x 16 divide."""
    integer = jnp.issubdtype(w.codes.dtype, jnp.integer)
    return x_MxI.shape[0] <= ROWS and w.ndim == 2 and integer and min(_blocks(w)) >= 16


def reference(x_MxI: jax.Array, w: QArray) -> jax.Array:
    """What the kernel computes, in plain JAX: ``[M, O]`` in the dtype of ``x``."""
    return jnp.matmul(x_MxI.astype(jnp.float32), coded_values(w).T, precision="highest").astype(x_MxI.dtype)


def dot(x_MxI: jax.Array, w: QArray, *, interpret: bool = False) -> jax.Array:
    """``reference`` by the kernel, for products that it ``takes``; ``interpret`` runs it on any platform, slowly.

    A program multiplies a block of outputs by some blocks of columns; the results of an output's programs are added in
    float32. The columns of a block share their scale, so the integers are multiplied as they are.
    """
    (rows, n_in), n_out = x_MxI.shape, w.codes.shape[0]
    outputs, columns = _blocks(w)
    tiles, splits = n_out // outputs, _splits(n_in // columns, n_out // outputs)
    kernel = partial(_kernel, rows=rows, columns=columns, group=w.group or n_in)
    a_tile = pl.BlockSpec((outputs, w.scale.shape[-1]), lambda tile, split: (tile, 0))
    sums_SxMxO = pl.pallas_call(
        kernel if w.zero is not None else lambda x, codes, scale, sums: kernel(x, codes, scale, None, sums),
        grid=(tiles, splits),
        in_specs=[
            pl.BlockSpec((ROWS, n_in // splits), lambda tile, split: (0, split)),
            pl.BlockSpec((outputs, n_in // splits), lambda tile, split: (tile, split)),
            *[a_tile] * (1 if w.zero is None else 2),
        ],
        out_specs=pl.BlockSpec((None, ROWS, outputs), lambda tile, split: (split, 0, tile)),
        out_shape=jax.ShapeDtypeStruct((splits, rows, n_out), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="weight_only_dot",
    )(jnp.pad(x_MxI, ((0, ROWS - rows), (0, 0))), w.codes, w.scale, *(() if w.zero is None else (w.zero,)))
    return jnp.sum(sums_SxMxO, 0).astype(x_MxI.dtype)


def _kernel(x_ref, codes_ref, scale_ref, zero_ref, sums_ref, *, rows: int, columns: int, group: int):
    """The slices are static, so that int4 is loaded as bytes and unpacked in registers."""
    blocks = codes_ref.shape[-1] // columns
    sums_MxO = jnp.zeros(sums_ref.shape, jnp.float32)
    for block in range(blocks):
        of = (pl.program_id(1) * blocks + block) * columns // group
        at = pl.ds(block * columns, columns)
        x_MxB, values_OxB = x_ref[:, at], codes_ref[:, at].astype(jnp.float32)
        if zero_ref is not None:
            values_OxB -= zero_ref[:, of].astype(jnp.float32)[:, None]
        product_MxO = jax.lax.dot_general(
            x_MxB, values_OxB.astype(x_MxB.dtype), (((1,), (1,)), ((), ())),
            precision="highest" if x_MxB.dtype == jnp.float32 else None, preferred_element_type=jnp.float32,
        )  # fmt: skip
        sums_MxO += product_MxO * scale_ref[:, of][None]
    triton.store(sums_ref, sums_MxO, mask=(jnp.arange(ROWS) < rows)[:, None])


def _blocks(w: QArray) -> tuple[int, int]:
    """How many outputs and columns are multiplied at once: powers of two that divide the matrix and its groups."""
    n_out, n_in = w.codes.shape[-2:]
    return math.gcd(n_out, 64), math.gcd(n_in, w.group or n_in, 128)


def _splits(blocks: int, tiles: int) -> int:
    """Programs along the columns: the fewest, dividing the blocks, that occupy a GPU and do not unroll too far."""
    enough = max(PROGRAMS / tiles, blocks / UNROLLED)
    return min(splits for splits in range(1, blocks + 1) if blocks % splits == 0 and splits >= min(enough, blocks))
