"""Rounding to nearest on a uniform grid: the quantizer behind ``w8a8-dynamic`` and ``wNa16-rtn``.

``fit_grid`` and ``round_to_grid`` are two functions so that a solver can take its grid from here and find its own
codes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.compression.steps import LAYER_KERNELS, LayerStep, OnCpu, Step, WeightStep, check_grid, integers_on_cpu
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray, expand_groups, straight_through
from jaxlm.core.tree import Leaf
from jaxlm.nn.config import ModelConfig

__all__ = [
    "IntegerGrid", "IntegerLayerStep", "Quantize", "fit_grid", "group_range", "quantize", "round_to_grid",
    "scale_and_zero_point",
]


@functools.partial(jax.jit, static_argnames=("bits", "group", "symmetric", "act_bits", "axis"))
def quantize(
    dense: jax.Array, *, bits: int, group: int = 0, symmetric: bool = True, act_bits: int = 0, axis: int = -2
) -> QArray:
    """``dense`` (any leading layer dimensions) rounded to the nearest point of its grid: at most half a step off.

    ``axis`` is the contraction axis, along which groups run: -2 for a kernel ``[in, out]``, -1 for a table.
    """
    w_OxI = (dense.swapaxes(-1, -2) if axis == -2 else dense).astype(jnp.float32)
    group = 0 if group >= w_OxI.shape[-1] else group
    scale, zero = fit_grid(w_OxI, bits, group, symmetric)
    return QArray(round_to_grid(w_OxI, scale, zero, bits, group), scale, zero, bits, group, act_bits, axis)


def fit_grid(
    w_OxI: jax.Array, bits: int, group: int, symmetric: bool, weight_I: jax.Array | None = None, min_clip: float = 1.0
) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero point, ``[..., out, groups]``, of ``2**bits`` points that span each group's values and 0.

    A symmetric grid spans plus and minus the largest magnitude, so that all ``2**bits`` codes are used: its outermost
    values lie half a step outside (compressed-tensors and GPTQ do the same; at 3 bits perplexity is 2% better than
    with ``2**bits - 1`` points). A group of zeros gets scale 1.

    Args:
        w_OxI: weights ``[..., out, in]``.
        bits, group, symmetric: the grid; ``group`` 0 is one group an output channel.
        weight_I: ``E[x**2]`` of the inputs, ``[..., in]``, the diagonal of the Hessian; None: all alike.
        min_clip: with less than 1, the range of a group is clipped to a share of itself, at least ``min_clip``, where
            that lowers ``sum_i weight_i (w_i - q_i)**2``: where clipping the outermost values costs less than a finer
            grid saves.
    """
    low, high = group_range(w_OxI, group, symmetric)

    def clipped(ratio):
        scale, zero = scale_and_zero_point(ratio * low, ratio * high, bits, symmetric)
        return scale, None if zero is None else zero.astype(jnp.int8)

    if min_clip == 1:
        return clipped(1)
    groups = _in_groups(w_OxI, group)
    weight = 1 if weight_I is None else _in_groups(weight_I, group)[..., None, :, :]

    def cost(scale, zero):
        scale, zero = scale[..., None], None if zero is None else zero[..., None]
        codes = round_to_grid(groups, scale, zero, bits, 0).astype(jnp.float32)
        return jnp.sum(weight * (groups - (codes if zero is None else codes - zero) * scale) ** 2, -1)

    def keep_better(best, ratio):
        tried = clipped(ratio)
        now = (cost(*tried), tried)
        return jax.tree.map(lambda old, new: jnp.where(now[0] < best[0], new, old), best, now), None

    start = clipped(1)
    ratios = jnp.linspace(1, min_clip, max(2, round((1 - min_clip) * 100)) + 1)[1:]
    return jax.lax.scan(keep_better, (cost(*start), start), ratios)[0][1]


def group_range(w_OxI: jax.Array, group: int, symmetric: bool) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest of each group's values and 0, ``[..., out, groups]``. For a symmetric grid one is
    the negative of the other."""
    groups = _in_groups(w_OxI, group)
    low, high = jnp.minimum(groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)
    return (-jnp.maximum(-low, high), jnp.maximum(-low, high)) if symmetric else (low, high)


def scale_and_zero_point(
    low: jax.Array, high: jax.Array, bits: int, symmetric: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero point of ``2**bits`` points from ``low`` to ``high``. The zero point is an integer in the type
    of ``low``, with straight-through gradients; None for a symmetric grid."""
    span = high - low
    # The outermost value of a symmetric grid lies halfway between two codes, and rounding to even takes the outer one.
    # A slightly smaller scale keeps it there: division by a constant is compiled as multiplication, which moved half of
    # them.
    levels = (2**bits - 1) * (1 + 2**-21 if symmetric else 1)
    scale = jnp.where(span > 0, span / levels, 1)
    if symmetric:
        return scale, None
    exact = -low / scale
    return scale, straight_through(exact, jnp.round(exact)) - 2 ** (bits - 1)


def round_to_grid(w_OxI: jax.Array, scale: jax.Array, zero: jax.Array | None, bits: int, group: int) -> jax.Array:
    """The int8 codes of the grid points nearest to the weights."""
    n_in = w_OxI.shape[-1]
    codes = jnp.round(w_OxI / expand_groups(scale, group, n_in))
    if zero is not None:
        codes = codes + expand_groups(zero, group, n_in)
    return jnp.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(jnp.int8)


def _in_groups(x: jax.Array, group: int) -> jax.Array:
    """``[..., in]`` as ``[..., groups, group]``, the last group filled up with zeros."""
    n_in, size = x.shape[-1], group or x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n_in % size)]).reshape(*x.shape[:-1], -1, size)


@jax.tree_util.register_static
@dataclass(frozen=True)
class IntegerGrid:
    """The grid of a ``QArray`` as solvers take it (``column_solver.Grid``); its parameters are ``(scale, zero)``."""

    bits: int
    symmetric: bool = False
    min_clip: float = 1.0

    def fit(self, w_OxI: jax.Array, group: int, weight_I: jax.Array | None = None) -> tuple:
        return fit_grid(w_OxI, self.bits, group, self.symmetric, weight_I, self.min_clip)

    def codes(self, w_OxI: jax.Array, params: tuple, group: int = 0) -> jax.Array:
        return round_to_grid(w_OxI, *params, self.bits, group)

    def values(self, codes_OxI: jax.Array, params: tuple, group: int = 0) -> jax.Array:
        scale, zero = params
        spread_to = functools.partial(expand_groups, group=group, n_in=codes_OxI.shape[-1])
        codes = codes_OxI.astype(jnp.float32)
        return (codes if zero is None else codes - spread_to(zero)) * spread_to(scale)


@dataclass(frozen=True)
class Quantize(WeightStep):
    """Rounds weights to ``bits``, on one grid for each ``group`` of inputs (0: an output channel); see ``QArray``.

    Attributes:
        bits: 2 to 8.
        group: number of inputs that share a scale and zero point.
        symmetric: without zero points.
        act_bits: 8 rounds activations to int8 too, a scale a token, when the weight is multiplied; 0 does not.
    """

    kind: ClassVar[str] = "quantize"
    bits: int
    group: int = 0
    symmetric: bool = False
    act_bits: int = 0
    target: str = LAYER_KERNELS

    def __post_init__(self):
        check_grid(self.bits, self.group)
        if self.act_bits not in (0, 8):
            raise UserError(f"activations of {self.act_bits} bits are impossible; use 8, or 0 to leave them alone")

    @property
    def on_cpu(self) -> OnCpu:
        return "faster" if self.act_bits and not self.group else integers_on_cpu(self.group)

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        return quantize(
            dense, bits=self.bits, group=self.group, symmetric=self.symmetric, act_bits=self.act_bits, axis=axis
        )


class IntegerLayerStep(LayerStep):
    """A step that finds the codes of an integer grid with data. Without data it is ``Quantize`` on the same grid."""

    bits: int
    group: int
    symmetric: bool

    def __post_init__(self):
        check_grid(self.bits, self.group)

    @property
    def on_cpu(self) -> OnCpu:
        return integers_on_cpu(self.group)

    def without_data(self, config: ModelConfig) -> tuple[Step, ...]:
        return (Quantize(self.bits, self.group, self.symmetric, target=self.target),)
