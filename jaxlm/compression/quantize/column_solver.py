"""Solves for the weights of one matrix column by column: what GPTQ and SparseGPT share.

A grid makes it GPTQ (``quantize.gptq``), a loop that chooses a pruning mask makes it SparseGPT (``prune.sparsegpt``),
and both together prune and quantize in one pass (arXiv:2210.17323, arXiv:2301.00774). ``quantize.obs`` runs over the
columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import CalibratedLayer
from jaxlm.compression.quantize.hessian import factorize, fix_dead_inputs
from jaxlm.compression.quantize.obs import sweep


class Grid(Protocol):
    """The values that a weight may take, 0 included.

    A grid is a pytree whose arrays (a table, say) have the leading dimensions of the weights. Its ``params``, such as
    scales and zero points, are a pytree of arrays ``[..., out, groups]``; ``group`` 0 means one group. An example is
    ``rtn.IntegerGrid``.
    """

    def fit(self, w_OxI: jax.Array, group: int, weight_I: jax.Array | None = None) -> Any: ...
    def codes(self, w_OxI: jax.Array, params: Any, group: int = 0) -> jax.Array: ...
    def values(self, codes_OxI: jax.Array, params: Any, group: int = 0) -> jax.Array: ...


class SolverInfo(NamedTuple):
    """How the solver fared: scalars, or ``[...]`` for a stack of matrices.

    ``damping``, ``retries`` and ``failed`` are those of ``hessian.HessianFactor``. ``loss`` is ``tr(E H E^T)`` with the
    error ``E = W - Q`` and the damped ``H``: the squared error of the outputs, per token where ``H`` is a mean.
    """

    damping: jax.Array
    retries: jax.Array
    failed: jax.Array
    loss: jax.Array


class Solution(NamedTuple):
    """The solved matrix: ``codes_OxI`` and the ``params`` of the grid, or ``weights_OxI`` where there is no grid.

    ``kept_OxI`` is the pruning mask (True: kept) where the solver chose it.
    """

    info: SolverInfo
    weights_OxI: jax.Array | None = None
    codes_OxI: jax.Array | None = None
    params: Any = None
    kept_OxI: jax.Array | None = None


class ColumnLoop(NamedTuple):
    """The blocks and steps in which ``obs.sweep`` takes the columns, and its hooks."""

    block: int
    step: int
    begin_block: Callable | None = None
    begin_step: Callable | None = None


def column_loop(block: int, begin_block: Callable | None = None) -> ColumnLoop:
    """Blocks of ``block`` columns, in steps of at most 16."""
    return ColumnLoop(block, math.gcd(block, 16), begin_block)


def solve_stack(
    solve: Callable[..., Solution], w_OxI: jax.Array, h_IxI: jax.Array, kept_OxI: jax.Array | None, grid: Grid | None
) -> Solution:
    """``solve``, which takes one matrix, over all matrices of a stack ``[..., out, in]``."""
    for _ in w_OxI.shape[:-2]:
        solve = jax.vmap(solve)
    return solve(w_OxI.astype(jnp.float32), h_IxI.astype(jnp.float32), kept_OxI, grid)


def solve_matrix(
    w_OxI: jax.Array,
    h_IxI: jax.Array,
    kept_OxI: jax.Array | None,
    grid: Grid | None,
    *,
    group: int,
    act_order: bool,
    static_groups: bool,
    damping: float,
    sweeps: int,
    block: int,
    mask_loop: ColumnLoop | None = None,
) -> Solution:
    """One matrix. The arguments are those of ``gptq.gptq``.

    With ``mask_loop``, its hooks set ``extra["kept"]``, the pruning mask of the columns that are about to be fixed.
    """
    w_OxI, h_IxI = fix_dead_inputs(w_OxI, h_IxI)
    n_in = w_OxI.shape[1]
    weight_I = jnp.maximum(jnp.diagonal(h_IxI), 0)
    order_I = jnp.argsort(-weight_I) if act_order else jnp.arange(n_in)
    inverse_I = jnp.argsort(order_I) if act_order else slice(None)
    w_IxO, factor = w_OxI.T[order_I], factorize(h_IxI, damping, order_I)
    extra = {"real": jnp.ones(n_in, bool)} | ({} if kept_OxI is None else {"kept": kept_OxI.T[order_I]})
    loop, params = mask_loop or column_loop(block), None
    if grid:
        extra["group"], extra["weight"] = order_I // (group or n_in), weight_I[order_I]
        if static_groups:
            params = grid.fit(w_OxI if kept_OxI is None else jnp.where(kept_OxI, w_OxI, 0), group, weight_I)
        else:
            loop = column_loop(group, functools.partial(_fit_group, grid))

    fix = functools.partial(_fix_column, grid, mask_loop is not None)
    first = functools.partial(fix, jax.tree.map(jnp.transpose, params))
    error_IxO, columns, begun, loss = sweep(w_IxO, factor.r_IxI, first, extra, **loop._asdict())
    if grid and not static_groups:
        params = jax.tree.map(lambda p_GxOx1: p_GxOx1[..., 0].T, begun)

    if sweeps:
        if mask_loop:
            extra["kept"] = columns["kept_OxI"]
        a_IxI = jnp.where(factor.failed, jnp.eye(n_in), factor.damp(h_IxI)[order_I][:, order_I])
        again = functools.partial(fix, jax.tree.map(jnp.transpose, params))

        def descend(_, state):
            error_IxO, _, loss = state
            error_IxO, columns, _, change = sweep(w_IxO, a_IxI, again, extra, error_IxO, block=block)
            return error_IxO, columns, loss + change

        error_IxO, columns, loss = jax.lax.fori_loop(0, sweeps, descend, (error_IxO, columns, loss))
    columns = jax.tree.map(lambda x_IxO: x_IxO[inverse_I].T, columns)
    return Solution(SolverInfo(factor.damping, factor.retries, factor.failed, loss), params=params, **columns)


def _fix_column(
    grid: Grid | None, return_mask: bool, params_GxO: Any, w_O: jax.Array, extra: dict[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The value of one column, pruned by its mask and rounded to the grid, and what the solution holds of it."""
    kept_O = extra.get("kept")
    value_O = w_O if kept_O is None else jnp.where(kept_O, w_O, 0)
    out = {"kept_OxI": kept_O} if return_mask else {}
    if not grid:
        return value_O, out | {"weights_OxI": value_O}
    params = extra.get("params")  # a dynamic group passes its own; those of a static group are looked up
    if params is None:
        params = jax.tree.map(lambda p_GxO: p_GxO[extra["group"]][:, None], params_GxO)
    codes_Ox1 = grid.codes(value_O[:, None], params)
    return grid.values(codes_Ox1, params)[:, 0], out | {"codes_OxI": codes_Ox1[:, 0]}


def _fit_group(grid: Grid, w_BxO: jax.Array, r_B: jax.Array, extra_B: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Dynamic groups: a block is a group, and its grid is fitted to the weights as they are when the block begins."""
    kept_BxO = jnp.where(extra_B["kept"], w_BxO, 0) if "kept" in extra_B else w_BxO
    params = grid.fit(kept_BxO.T, 0, extra_B["weight"])
    each = jax.tree.map(lambda p_Ox1: jnp.broadcast_to(p_Ox1, (len(w_BxO), *p_Ox1.shape)), params)
    return extra_B | {"params": each}, params


def note_failures(layer: CalibratedLayer, names: Sequence[str], info: SolverInfo, action: str) -> None:
    """Notes where the Hessian of kernels needed more damping or could not be factored; ``action``: "pruned", ..."""
    paths = ", ".join(layer.path(name) for name in names)
    if bool(jnp.any(info.failed)):
        layer.notes.append(f"{paths}: the Hessian cannot be factored: {action} without error feedback")
    elif bool(jnp.any(info.retries > 0)):
        layer.notes.append(f"{paths}: the Hessian needed a damping of {float(jnp.max(info.damping)):g}")
