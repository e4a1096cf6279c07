"""GPTQ and SparseGPT: what to do with a column in the loop of ``compression.quantize.obs`` (arXiv:2210.17323, 2301.00774).

One solver: a grid makes it GPTQ, a sparsity makes it SparseGPT, both are its joint pruning and quantization. By default
it is the authors' method; three options go beyond it: a clip search (``least``), ``sweeps`` and ``search``. Perplexity
of a Llama of 5.5 million parameters, 44.71 when dense, by the authors' code and with these options:

    int2, groups of 64      49.80   48.89   least=0.6, sweeps=3
    int3, groups of 128     45.62   45.37   least=0.8, sweeps=3
    50%                     46.33   45.67   search=30, sweeps=5
    2:4                     49.22   47.75   search=30, sweeps=5
    70%                     55.60   50.26   search=30, sweeps=5
    80%                     83.03   61.42   search=30, sweeps=5
    50% and int4            46.52   45.89   search=30, sweeps=3
    2:4 and int4            49.54   48.19   search=30, sweeps=3
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxlm.compression.prune.admm import support
from jaxlm.compression.prune.scores import largest, smallest
from jaxlm.compression.quantize.hessian import factor, revive
from jaxlm.compression.quantize.obs import sweep
from jaxlm.compression.quantize.rtn import Integers
from jaxlm.core.errors import UserError


class Grid(Protocol):
    """Where weights may lie, 0 included: a pytree, whose arrays (a table, say) have the weight's leading dimensions.

    Its parameters are a pytree of arrays ``[..., out, groups]``; ``group`` 0 means one group. See ``rtn.Integers``.
    """

    def fit(self, w_OxI: jax.Array, group: int, weight_I: jax.Array | None = None) -> Any: ...
    def codes(self, w_OxI: jax.Array, params: Any, group: int = 0) -> jax.Array: ...
    def values(self, codes_OxI: jax.Array, params: Any, group: int = 0) -> jax.Array: ...


class Info(NamedTuple):
    """How a solver fared, scalars (``[...]`` for a stack): see ``hessian.Factor``; ``loss`` is ``tr(E H E^T)`` with the
    error ``E = W - Q`` and ``H`` as damped: the squared error of the outputs, per token where ``H`` is a mean."""

    damping: jax.Array
    retries: jax.Array
    failed: jax.Array
    loss: jax.Array


class Solution(NamedTuple):
    """``codes_OxI`` and the grid's ``params``, or, solved without a grid, ``weights_OxI``; and where weights were kept,
    if the solver chose that."""

    info: Info
    weights_OxI: jax.Array | None = None
    codes_OxI: jax.Array | None = None
    params: Any = None
    kept_OxI: jax.Array | None = None


def gptq(
    w_OxI: jax.Array,
    h_IxI: jax.Array,
    kept_OxI: jax.Array | None = None,
    *,
    bits: int,
    group: int = 128,
    symmetric: bool = False,
    least: float = 1.0,
    act_order: bool = True,
    static_groups: bool = True,
    damping: float = 0.01,
    sweeps: int = 0,
    block: int = 128,
) -> tuple[jax.Array, jax.Array, jax.Array | None, Info]:
    """Codes, scale and zero of a ``core.leaves.QArray``, and how it went: see ``solve``, for ``least`` ``rtn.grid``."""
    solution = solve(
        w_OxI, h_IxI, kept_OxI, grid=Integers(bits, symmetric, least), group=group, act_order=act_order,
        static_groups=static_groups, damping=damping, sweeps=sweeps, block=block,
    )  # fmt: skip
    return solution.codes_OxI, *solution.params, solution.info


def sparsegpt(
    w_OxI: jax.Array,
    h_IxI: jax.Array,
    *,
    sparsity: float | None = None,
    n: int = 0,
    m: int = 0,
    search: int = 0,
    damping: float = 0.01,
    sweeps: int = 0,
    block: int = 128,
) -> tuple[jax.Array, jax.Array, Info]:
    """The pruned weights, where they were kept, and how it went.

    Of every block of columns the ``sparsity`` share is dropped, or all but ``n`` of every ``m`` inputs of an output.
    For quantization in the same pass see ``solve``.
    """
    sparsity = (n, m) if sparsity is None else sparsity
    solution = solve(
        w_OxI, h_IxI, sparsity=sparsity, search=search, act_order=False, damping=damping, sweeps=sweeps, block=block
    )
    return solution.weights_OxI, solution.kept_OxI, solution.info


_STATIC = ("group", "sparsity", "search", "act_order", "static_groups", "sweeps", "block")


@functools.partial(jax.jit, static_argnames=_STATIC)
def solve(
    w_OxI: jax.Array,
    h_IxI: jax.Array,
    kept_OxI: jax.Array | None = None,
    *,
    grid: Grid | None = None,
    group: int = 0,
    sparsity: float | tuple[int, int] | None = None,
    search: int = 0,
    act_order: bool = True,
    static_groups: bool = True,
    damping: float = 0.01,
    sweeps: int = 0,
    block: int = 128,
) -> Solution:
    """The weights nearest to W in ``tr((W - Q) H (W - Q)^T)`` that a greedy pass over the columns finds.

    Args:
      w_OxI: weights; leading dimensions are layers or experts, solved at once. Rows may be sharded.
      h_IxI: mean or sum of ``x x^T`` over tokens, ``[..., in, in]``.
      kept_OxI: which weights stay (bool); the others are exactly 0 in the result, and made up for as well.
      grid: rounds the weights to this.
      group: columns that share the grid's parameters; 0 is all of them, and the last group may be shorter.
      sparsity: the share of weights to drop of every block of columns, those that cost least; or (n, m): all but n of
        every m columns, a row each. Grids are fitted before.
      search: iterations of ``admm.support``, which instead chooses the weights to drop first, over the whole matrix.
      act_order: fixes the columns of the largest ``diag(H)`` first; without N:M sparsity.
      static_groups: grids are fitted to the original weights; else to the weights as compensated when their group
        begins, which takes columns in their own order and no sparsity.
      damping: added to the diagonal of ``H``, as a share of its mean.
      sweeps: passes of coordinate descent over the result, which lower the loss further; masks and grids stay.
      block: columns between updates of all later ones; only ``sparsity`` sees it otherwise than as speed.

    Raises UserError for what does not go together.
    """
    group = 0 if group >= w_OxI.shape[-1] else group
    static_groups = static_groups or not group
    pattern = isinstance(sparsity, tuple)
    if act_order and not static_groups:  # an index a column would have to be stored
        raise UserError("GPTQ with act-order takes static groups; use static_groups=True or act_order=False")
    if act_order and pattern and not search:
        raise UserError("N:M sparsity takes columns in their own order; use act_order=False")
    if sparsity and (not static_groups or kept_OxI is not None):
        raise UserError("a sparsity takes static groups and no mask; use static_groups=True and kept_OxI=None")
    if pattern and not 0 < sparsity[0] < sparsity[1] or not pattern and sparsity is not None and not 0 < sparsity < 1:
        raise UserError(f"a sparsity of {sparsity} is impossible; use a share of 0 to 1, or (n, m) with 0 < n < m")
    if grid is None and sparsity is None and kept_OxI is None:
        raise UserError("nothing to solve for; give a grid, a sparsity or a mask")
    one = functools.partial(
        _search_and_solve, group=group, sparsity=sparsity, search=search, act_order=act_order,
        static_groups=static_groups, damping=damping, sweeps=sweeps, block=block,
    )  # fmt: skip
    for _ in w_OxI.shape[:-2]:
        one = jax.vmap(one)
    return one(w_OxI.astype(jnp.float32), h_IxI.astype(jnp.float32), kept_OxI, grid)


def _search_and_solve(w_OxI, h_IxI, kept_OxI, grid, *, sparsity, search, damping, **options):
    if not (sparsity and search):
        return _solve(w_OxI, h_IxI, kept_OxI, grid, sparsity=sparsity, damping=damping, **options)
    kept_OxI = support(w_OxI, h_IxI, sparsity, search, damping)
    solution = _solve(w_OxI, h_IxI, kept_OxI, grid, sparsity=None, damping=damping, **options)
    return solution._replace(kept_OxI=kept_OxI)


def _solve(w_OxI, h_IxI, kept_OxI, grid, *, group, sparsity, act_order, static_groups, damping, sweeps, block):
    w_OxI, h_IxI = revive(w_OxI, h_IxI)
    n_in = w_OxI.shape[1]
    weight_I = jnp.maximum(jnp.diagonal(h_IxI), 0)
    order_I = jnp.argsort(-weight_I) if act_order else jnp.arange(n_in)
    back_I = jnp.argsort(order_I) if act_order else slice(None)
    w_IxO, factored = w_OxI.T[order_I], factor(h_IxI, damping, order_I)
    extra = {"real": jnp.ones(n_in, bool)} | ({} if kept_OxI is None else {"kept": kept_OxI.T[order_I]})
    params = None
    if grid:
        extra["group"], extra["weight"] = order_I // (group or n_in), weight_I[order_I]
        if static_groups:
            params = grid.fit(w_OxI if kept_OxI is None else jnp.where(kept_OxI, w_OxI, 0), group, weight_I)

    def column(w_O, extra, params_GxO):
        kept = extra.get("kept")
        value_O = w_O if kept is None else jnp.where(kept, w_O, 0)
        out = {"kept_OxI": kept} if sparsity else {}
        if not grid:
            return value_O, out | {"weights_OxI": value_O}
        here = extra.get("params")  # a dynamic group's own; else its column of all of them
        if here is None:
            here = jax.tree.map(lambda p_GxO: p_GxO[extra["group"]][:, None], params_GxO)
        codes_Ox1 = grid.codes(value_O[:, None], here)
        return grid.values(codes_Ox1, here)[:, 0], out | {"codes_OxI": codes_Ox1[:, 0]}

    def first(**options):
        fix = functools.partial(column, params_GxO=jax.tree.map(jnp.transpose, params))
        return sweep(w_IxO, factored.r_IxI, fix, extra, **options)

    if grid and not static_groups:
        begin = functools.partial(_fit_block, grid)
        errors_IxO, columns, begun, loss = first(block=group, step=math.gcd(group, 16), begin_block=begin)
        params = jax.tree.map(lambda p_GxOx1: p_GxOx1[..., 0].T, begun)
    elif isinstance(sparsity, tuple):
        n, m = sparsity
        begin = functools.partial(_choose_pattern, n)
        errors_IxO, columns, _, loss = first(block=m * max(block // m, 1), step=m, begin_step=begin)
    else:
        begin = functools.partial(_choose, sparsity) if sparsity else None
        errors_IxO, columns, _, loss = first(block=block, step=math.gcd(block, 16), begin_block=begin)

    if sweeps:
        if sparsity:
            extra["kept"] = columns["kept_OxI"]
        a_IxI = jnp.where(factored.failed, jnp.eye(n_in), factored.damp(h_IxI)[order_I][:, order_I])
        fix = functools.partial(column, params_GxO=jax.tree.map(jnp.transpose, params))

        def again(_, state):
            errors_IxO, _, loss = state
            errors_IxO, columns, _, change = sweep(w_IxO, a_IxI, fix, extra, errors_IxO, block=block)
            return errors_IxO, columns, loss + change

        errors_IxO, columns, loss = jax.lax.fori_loop(0, sweeps, again, (errors_IxO, columns, loss))
    columns = jax.tree.map(lambda x_IxO: x_IxO[back_I].T, columns)
    return Solution(Info(factored.damping, factored.retries, factored.failed, loss), params=params, **columns)


def _fit_block(grid, w_BxO, r_B, extra_B):
    """Dynamic groups: a block is a group, its grid fitted to the weights as they are when it begins."""
    kept_BxO = jnp.where(extra_B["kept"], w_BxO, 0) if "kept" in extra_B else w_BxO
    params = grid.fit(kept_BxO.T, 0, extra_B["weight"])
    each = jax.tree.map(lambda p_Ox1: jnp.broadcast_to(p_Ox1, (len(w_BxO), *p_Ox1.shape)), params)
    return extra_B | {"params": each}, params


def _choose(sparsity, w_BxO, r_B, extra_B):
    """The mask of a block: its least costly weights, over all rows."""
    real_B = extra_B["real"]
    drop = jnp.round(sparsity * jnp.sum(real_B) * w_BxO.shape[1]).astype(jnp.int32)
    cost_BxO = jnp.where(real_B[:, None], (w_BxO * r_B[:, None]) ** 2, jnp.inf)
    return extra_B | {"kept": ~smallest(cost_BxO, drop)}, None


def _choose_pattern(n, w_SxO, r_S, extra_S):
    """The mask of one group of m columns: the n most costly of every row."""
    cost_SxO = jnp.where(extra_S["real"][:, None], (w_SxO * r_S[:, None]) ** 2, -1)
    return extra_S | {"kept": largest(cost_SxO.T, n).T}
