"""The loop of GPTQ and SparseGPT: it fixes columns one after another, each making up for the errors of those before.

This is Optimal Brain Surgeon in a fixed order (arXiv:2208.11580, arXiv:2210.17323, arXiv:2301.00774). The authors
update all later columns by ``chol(inv(H))``. With ``H = R R^T``, R upper triangular, the same weights come from the
errors ``E = W - Q`` made so far (LDLQ, arXiv:2307.13304): column i is fixed as near as possible to its target

    w_i + sum_{j != i} E_j A_ji / A_ii

with ``A = R`` and no errors at first. With ``A = H`` and the errors of an earlier pass, the same loop is coordinate
descent, which never raises ``tr(E H E^T)``.
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
    a_IxI: jax.Array,
    column: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    extra: Any = None,
    error_IxO: jax.Array | None = None,
    *,
    block: int,
    step: int = 16,
    begin_block: Callable | None = None,
    begin_step: Callable | None = None,
) -> tuple[jax.Array, Any, Any, jax.Array]:
    """Fixes the columns of W, which are the rows of its transpose here, in blocks and steps.

    Args:
        w_IxO: the transpose of W.
        a_IxI: the factor R; the Hessian where there is an ``error_IxO``.
        column: ``(target_O, extra_i) -> (value_O, out)`` fixes one column, given its target and its slice of ``extra``.
        extra: a pytree of arrays ``[I, ...]``.
        error_IxO: the errors of an earlier pass; None in the first pass.
        block: number of columns between updates of all later ones. The last block is filled up with columns of zeros
            (``extra`` too), and of the identity in ``a_IxI``.
        step: number of columns between updates of the rest of the block.
        begin_block: in the first pass, ``(w_BxO, r_B, extra_B) -> (extra_B, out)`` sees the columns of a block as the
            errors so far change them, and may replace their slice of ``extra``. ``r_B`` is the diagonal of the factor:
            ``(w * r)**2`` is the loss of setting a weight to 0.
        begin_step: the same for the columns of a step: ``(w_SxO, r_S, extra_S) -> extra_S``.

    Returns:
        The errors; what ``column`` returned, ``[I, ...]``; what ``begin_block`` returned, ``[blocks, ...]``; and the
        change of ``tr(E H E^T)``.
    """
    first, (n_in, n_out) = error_IxO is None, w_IxO.shape
    pad = -n_in % block
    blocks, steps = (n_in + pad) // block, block // step
    w_IxO = jnp.pad(w_IxO, ((0, pad), (0, 0)))
    a_IxI = jnp.pad(a_IxI, ((0, pad), (0, pad))) + jnp.diag(jnp.arange(n_in + pad) >= n_in).astype(a_IxI.dtype)
    error_IxO = jnp.zeros_like(w_IxO) if first else jnp.pad(error_IxO, ((0, pad), (0, 0)))
    extra = jax.tree.map(lambda x: jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))), extra)

    def solve_column(delta_SxO, xs):
        # A product with the changes so far is half the memory traffic of adding each change to all later columns.
        k, a_S, g_O, w_O, old_O, extra_i = xs
        target_O = w_O + (g_O + _dot(a_S, delta_SxO)) / a_S[k] - old_O
        value_O, out = column(target_O, extra_i)
        new_O = w_O - value_O
        miss_O = (value_O - target_O) ** 2
        change_O = a_S[k] ** 2 * miss_O if first else a_S[k] * (miss_O - (w_O - old_O - target_O) ** 2)
        return delta_SxO.at[k].set(new_O - old_O), (new_O, change_O, out)

    def solve_step(g_BxO, xs):
        start, a_SxB, u_SxB, w_SxO, old_SxO, extra_S = xs
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=step)
        g_SxO, a_SxS = part(g_BxO), part(a_SxB, axis=1)
        if begin_step:
            extra_S = begin_step(w_SxO + _dot(part(u_SxB, axis=1).T, g_SxO), jnp.diagonal(a_SxS), extra_S)
        xs = (jnp.arange(step), a_SxS.T, g_SxO, w_SxO, old_SxO, extra_S)
        delta_SxO, (new_SxO, change_SxO, out_S) = jax.lax.scan(solve_column, jnp.zeros_like(g_SxO), xs)
        return g_BxO + _dot(a_SxB.T, delta_SxO), (new_SxO, jnp.sum(change_SxO), out_S)

    def solve_block(error_IxO, xs):
        index, w_BxO, extra_B = xs
        start = index * block

        def gather(i, sum_BxO):
            a_CxB = jax.lax.dynamic_slice(a_IxI, (i * block, start), (block, block))
            return sum_BxO + _dot(a_CxB.T, jax.lax.dynamic_slice_in_dim(error_IxO, i * block, block))

        g_BxO = jax.lax.fori_loop(0, index if first else blocks, gather, jnp.zeros_like(w_BxO))
        a_BxB = jax.lax.dynamic_slice(a_IxI, (start, start), (block, block))
        u_BxB = out = None
        if begin_block or begin_step:
            u_BxB = jax.lax.linalg.triangular_solve(a_BxB, jnp.eye(block), left_side=True, lower=False)
        if begin_block:
            extra_B, out = begin_block(w_BxO + _dot(u_BxB.T, g_BxO), jnp.diagonal(a_BxB), extra_B)
        old_BxO = jax.lax.dynamic_slice_in_dim(error_IxO, start, block)
        xs = jax.tree.map(lambda x: x.reshape(steps, step, *x.shape[1:]), (a_BxB, u_BxB, w_BxO, old_BxO, extra_B))
        _, (new_B, change, out_B) = jax.lax.scan(solve_step, g_BxO, (jnp.arange(0, block, step), *xs))
        error_IxO = jax.lax.dynamic_update_slice_in_dim(error_IxO, new_B.reshape(block, n_out), start, 0)
        return error_IxO, (out_B, out, jnp.sum(change))

    xs = jax.tree.map(lambda x: x.reshape(blocks, block, *x.shape[1:]), (w_IxO, extra))
    error_IxO, (columns, begun, change) = jax.lax.scan(solve_block, error_IxO, (jnp.arange(blocks), *xs))
    columns = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:])[:n_in], columns)
    return error_IxO[:n_in], columns, begun, jnp.sum(change)
