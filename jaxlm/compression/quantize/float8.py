"""Rounding to float8 e4m3 (arXiv:2209.05433): the quantizer behind ``fp8``."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxlm.core.leaves import QArray

__all__ = ["LARGEST", "quantize_float8"]

LARGEST = float(jnp.finfo(jnp.float8_e4m3fn).max)


@functools.partial(jax.jit, static_argnames=("act_bits", "axis"))
def quantize_float8(dense: jax.Array, *, act_bits: int = 0, axis: int = -2) -> QArray:
    """``dense`` as float8, scaled so that the largest magnitude of an output channel is the largest value, 448.

    ``axis`` is the contraction axis: -2 for a kernel ``[in, out]``, -1 for a table. ``act_bits``: see ``QArray``.
    """
    w_OxI = (dense.swapaxes(-1, -2) if axis == -2 else dense).astype(jnp.float32)
    scale = jnp.max(jnp.abs(w_OxI), -1, keepdims=True) / LARGEST
    scale = jnp.where(scale > 0, scale, 1)
    return QArray((w_OxI / scale).astype(jnp.float8_e4m3fn), scale, None, 8, 0, act_bits, axis)
