"""Rounding to nearest on a uniform grid: the quantizer behind ``w8a8-dynamic`` and ``wNa16-rtn``.

``grid`` and ``round_to`` are apart so that a solver can pick its grid here and its codes elsewhere.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.core.leaves import QArray, expand_groups, straight_through


@functools.partial(jax.jit, static_argnames=("bits", "group", "symmetric", "act_bits", "axis"))
def quantize(
    dense: jax.Array, *, bits: int, group: int = 0, symmetric: bool = True, act_bits: int = 0, axis: int = -2
) -> QArray:
    """``dense`` (any leading layer dimensions) rounded to the nearest point of its grid: at most half a step off.

    ``axis`` is the contraction axis, along which groups run: -2 for a kernel ``[in, out]``, -1 for a table.
    """
    w_OxI = (dense.swapaxes(-1, -2) if axis == -2 else dense).astype(jnp.float32)
    group = 0 if group >= w_OxI.shape[-1] else group
    scale, zero = grid(w_OxI, bits, group, symmetric)
    return QArray(round_to(w_OxI, scale, zero, bits, group), scale, zero, bits, group, act_bits, axis)


def grid(
    w_OxI: jax.Array, bits: int, group: int, symmetric: bool, weight_I: jax.Array | None = None, min_clip: float = 1.0
) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero, ``[..., out, groups]``, of ``2**bits`` points that span each group's values and 0.

    A symmetric grid spans plus and minus the largest magnitude, so that all ``2**bits`` codes are used: its outermost
    values lie half a step outside (compressed-tensors and GPTQ do the same; at 3 bits perplexity is 2% better than
    with ``2**bits - 1`` points). A group of zeros gets scale 1.

    With ``min_clip < 1`` each group's span is shrunk, at most to ``min_clip`` of it, where clipping the outermost values
    costs less than a finer grid saves: to the least ``sum_i weight_i (w_i - q_i)**2``. ``weight_I``, ``[..., in]``, is
    ``E[x**2]``, the diagonal of the Hessian (None: all alike).
    """
    low, high = extent(w_OxI, group, symmetric)

    def shrunk(by):
        scale, zero = points(by * low, by * high, bits, symmetric)
        return scale, None if zero is None else zero.astype(jnp.int8)

    if min_clip == 1:
        return shrunk(1)
    groups = _cut(w_OxI, group)
    weight = 1 if weight_I is None else _cut(weight_I, group)[..., None, :, :]

    def cost(scale, zero):
        scale, zero = scale[..., None], None if zero is None else zero[..., None]
        codes = round_to(groups, scale, zero, bits, 0).astype(jnp.float32)
        return jnp.sum(weight * (groups - (codes if zero is None else codes - zero) * scale) ** 2, -1)

    def keep_better(best, by):
        tried = shrunk(by)
        now = (cost(*tried), tried)
        return jax.tree.map(lambda old, new: jnp.where(now[0] < best[0], new, old), best, now), None

    start = shrunk(1)
    shrinks = jnp.linspace(1, min_clip, max(2, round((1 - min_clip) * 100)) + 1)[1:]
    return jax.lax.scan(keep_better, (cost(*start), start), shrinks)[0][1]


def extent(w_OxI: jax.Array, group: int, symmetric: bool) -> tuple[jax.Array, jax.Array]:
    """The least and the largest of each group's values and 0, ``[..., out, groups]``; one the negative of the other for
    a symmetric grid."""
    groups = _cut(w_OxI, group)
    low, high = jnp.minimum(groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)
    return (-jnp.maximum(-low, high), jnp.maximum(-low, high)) if symmetric else (low, high)


def points(low: jax.Array, high: jax.Array, bits: int, symmetric: bool) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero of ``2**bits`` points from ``low`` to ``high``. The zero is whole, of the type of the ends,
    with straight-through gradients."""
    span = high - low
    # Of a symmetric grid the outermost value is halfway between two codes, and even is the outer one. A hair off the
    # scale holds it there: division by a constant is compiled as multiplication, and half of them fell inward.
    levels = (2**bits - 1) * (1 + 2**-21 if symmetric else 1)
    scale = jnp.where(span > 0, span / levels, 1)
    if symmetric:
        return scale, None
    place = -low / scale
    return scale, straight_through(place, jnp.round(place)) - 2 ** (bits - 1)


def _cut(x: jax.Array, group: int) -> jax.Array:
    """``[..., in]`` in groups, the last one filled up with zeros: ``[..., groups, group]``."""
    n_in, size = x.shape[-1], group or x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n_in % size)]).reshape(*x.shape[:-1], -1, size)


def round_to(w_OxI: jax.Array, scale: jax.Array, zero: jax.Array | None, bits: int, group: int) -> jax.Array:
    """The int8 codes of the grid points nearest to the weights."""
    n_in = w_OxI.shape[-1]
    codes = jnp.round(w_OxI / expand_groups(scale, group, n_in))
    if zero is not None:
        codes = codes + expand_groups(zero, group, n_in)
    return jnp.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(jnp.int8)


@jax.tree_util.register_static
@dataclass(frozen=True)
class IntegerGrid:
    """The grid of a ``QArray`` as solvers see it (``column_solver.Grid``); parameters are ``(scale, zero)``."""

    bits: int
    symmetric: bool = False
    min_clip: float = 1.0

    def fit(self, w_OxI: jax.Array, group: int, weight_I: jax.Array | None = None) -> tuple:
        return grid(w_OxI, self.bits, group, self.symmetric, weight_I, self.min_clip)

    def codes(self, w_OxI: jax.Array, params: tuple, group: int = 0) -> jax.Array:
        return round_to(w_OxI, *params, self.bits, group)

    def values(self, codes_OxI: jax.Array, params: tuple, group: int = 0) -> jax.Array:
        scale, zero = params
        spread_to = functools.partial(expand_groups, group=group, n_in=codes_OxI.shape[-1])
        codes = codes_OxI.astype(jnp.float32)
        return (codes if zero is None else codes - spread_to(zero)) * spread_to(scale)
