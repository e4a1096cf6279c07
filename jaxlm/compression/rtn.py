"""Rounding to nearest on a uniform grid: the quantizer behind ``w8a8-dynamic`` and ``wNa16-rtn``.

``grid`` and ``round_to`` are apart so that a solver can pick its grid here and its codes elsewhere.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxlm.core.leaves import QArray, spread


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


def grid(w_OxI: jax.Array, bits: int, group: int, symmetric: bool) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero, ``[..., out, groups]``, of ``2**bits`` points that span each group's values and 0.

    A symmetric grid spans plus and minus the largest magnitude, so that all ``2**bits`` codes are used: its outermost
    values lie half a step outside (compressed-tensors and GPTQ do the same; at 3 bits perplexity is 2% better than
    with ``2**bits - 1`` points). A group of zeros gets scale 1.
    """
    n_in, size = w_OxI.shape[-1], group or w_OxI.shape[-1]
    padded = jnp.pad(w_OxI, [(0, 0)] * (w_OxI.ndim - 1) + [(0, -n_in % size)])
    groups = padded.reshape(*padded.shape[:-1], -1, size)
    low, high = jnp.minimum(groups.min(-1), 0), jnp.maximum(groups.max(-1), 0)
    span = 2 * jnp.maximum(-low, high) if symmetric else high - low
    scale = jnp.where(span > 0, span / (2**bits - 1), 1)
    if symmetric:
        return scale, None
    return scale, (jnp.round(-low / scale) - 2 ** (bits - 1)).astype(jnp.int8)


def round_to(w_OxI: jax.Array, scale: jax.Array, zero: jax.Array | None, bits: int, group: int) -> jax.Array:
    """The int8 codes of the grid points nearest to the weights."""
    n_in = w_OxI.shape[-1]
    codes = jnp.round(w_OxI / spread(scale, group, n_in))
    if zero is not None:
        codes = codes + spread(zero, group, n_in)
    return jnp.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(jnp.int8)
