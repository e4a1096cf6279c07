"""The loop that GPTQ and SparseGPT share: columns fixed one after another, each error made up for by the later ones.

Optimal Brain Surgeon in a fixed order (arXiv:2208.11580, 2210.17323, 2301.00774). The authors update all later columns
by ``U = chol(inv(H))``. With ``R = inv(U)`` the same weights come from the errors made so far, ``W'_F = W_F + (W_D -
Q_D) R_DF inv(R_FF)`` for fixed columns D and free ones F (LDLQ, arXiv:2307.13304): only the diagonal blocks of ``R``
are ever inverted, and a column is touched when its block begins, not at every block before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def sweep(
    w_IxO: jax.Array,
    r_IxI: jax.Array,
    column: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    extra: Any = None,
    *,
    block: int,
    step: int = 16,
    begin_block: Callable | None = None,
    begin_step: Callable | None = None,
) -> tuple[Any, Any, jax.Array]:
    """Fixes the columns of W, here the rows of its transpose, in blocks of ``block`` and steps of ``step`` of them.

    ``column(w_O, extra_i) -> (value_O, out)`` fixes one column as compensated so far, given its slice of ``extra``, a
    pytree of arrays ``[I, ...]``. ``begin_block(w_BxO, r_B, extra_B) -> (extra_B, out)`` and ``begin_step(w_SxO, r_S,
    extra_S) -> extra_S`` see the compensated columns as they begin, and may replace their slices. ``r_B`` is the
    diagonal of the factor: ``(w * r)**2`` is what setting one weight to 0 costs. The last block is filled up with
    columns of zeros (``extra`` too) and a factor of 1.

    Returns ``column``'s outs ``[I, ...]``, ``begin_block``'s ``[blocks, ...]``, and ``|(W - Q) R|^2`` an output.
    """
    n_in, n_out = w_IxO.shape
    pad = -n_in % block
    blocks, steps = (n_in + pad) // block, block // step
    w_IxO = jnp.pad(w_IxO, ((0, pad), (0, 0)))
    r_IxI = jnp.pad(r_IxI, ((0, pad), (0, pad))) + jnp.diag(jnp.arange(n_in + pad) >= n_in).astype(r_IxI.dtype)
    cut = functools.partial(jax.tree.map, lambda x: x.reshape(-1, block, *x.shape[1:]))
    extra = cut(jax.tree.map(lambda x: jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))), extra))
    diagonal_NxBxB = jnp.stack([r_IxI[i : i + block, i : i + block] for i in range(0, n_in, block)])
    eye_NxBxB = jnp.broadcast_to(jnp.eye(block), diagonal_NxBxB.shape)
    u_NxBxB = jax.lax.linalg.triangular_solve(diagonal_NxBxB, eye_NxBxB, left_side=True, lower=False)

    def solve_column(w_SxO, xs):
        k, u_S, extra_i = xs
        w_O = w_SxO[k]
        value_O, out = column(w_O, extra_i)
        error_O = (w_O - value_O) / u_S[k]
        return w_SxO - u_S[:, None] * error_O, (value_O, error_O, out)

    def solve_step(w_BxO, xs):
        start, u_SxB, r_S, extra_S = xs
        w_SxO = jax.lax.dynamic_slice_in_dim(w_BxO, start, step)
        u_SxS = jax.lax.dynamic_slice_in_dim(u_SxB, start, step, axis=1)
        if begin_step:
            extra_S = begin_step(w_SxO, r_S, extra_S)
        _, (value_SxO, error_SxO, out_S) = jax.lax.scan(solve_column, w_SxO, (jnp.arange(step), u_SxS, extra_S))
        w_BxO = w_BxO - _dot(u_SxB.T, error_SxO)
        return jax.lax.dynamic_update_slice_in_dim(w_BxO, value_SxO, start, 0), (jnp.sum(error_SxO**2, 0), out_S)

    def solve_block(error_IxO, xs):
        index, w_BxO, u_BxB, extra_B = xs
        start = index * block

        def gather(i, sum_BxO):
            r_CxB = jax.lax.dynamic_slice(r_IxI, (i * block, start), (block, block))
            return sum_BxO + _dot(r_CxB.T, jax.lax.dynamic_slice_in_dim(error_IxO, i * block, block))

        now_BxO = w_BxO + _dot(u_BxB.T, jax.lax.fori_loop(0, index, gather, jnp.zeros_like(w_BxO)))
        r_B, out = 1 / jnp.diagonal(u_BxB), None
        if begin_block:
            extra_B, out = begin_block(now_BxO, r_B, extra_B)
        split = functools.partial(jax.tree.map, lambda x: x.reshape(steps, step, *x.shape[1:]))
        starts = jnp.arange(0, block, step)
        value_BxO, (loss, out_B) = jax.lax.scan(solve_step, now_BxO, (starts, *split((u_BxB, r_B, extra_B))))
        error_IxO = jax.lax.dynamic_update_slice_in_dim(error_IxO, w_BxO - value_BxO, start, 0)
        return error_IxO, (jnp.sum(loss, 0), jax.tree.map(lambda x: x.reshape(block, *x.shape[2:]), out_B), out)

    xs = (jnp.arange(blocks), cut(w_IxO), u_NxBxB, extra)
    _, (loss, columns, begins) = jax.lax.scan(solve_block, jnp.zeros_like(w_IxO), xs)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n_in], columns), begins, jnp.sum(loss, 0)
