"""Rounding to float8 e4m3 (arXiv:2209.05433): the quantizer behind ``fp8``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.compression.steps import LAYER_KERNELS, WeightStep
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray
from jaxlm.core.tree import Leaf

__all__ = ["LARGEST", "Float8", "quantize_float8"]

LARGEST = float(jnp.finfo(jnp.float8_e4m3fn).max)


@functools.partial(jax.jit, static_argnames=("act_bits", "axis"))
def quantize_float8(dense: jax.Array, *, act_bits: int = 0, axis: int = -2) -> QArray:
    """``dense`` as float8, scaled so that the largest magnitude of an output channel becomes the largest float8, 448.

    ``axis`` is the contraction axis: -2 for a kernel ``[in, out]``, -1 for a table. ``act_bits``: see ``QArray``.
    """
    w_OxI = (dense.swapaxes(-1, -2) if axis == -2 else dense).astype(jnp.float32)
    scale = jnp.max(jnp.abs(w_OxI), -1, keepdims=True) / LARGEST
    scale = jnp.where(scale > 0, scale, 1)
    return QArray((w_OxI / scale).astype(jnp.float8_e4m3fn), scale, None, 8, 0, act_bits, axis)


@dataclass(frozen=True)
class Float8(WeightStep):
    """Rounds weights to float8 e4m3 with a scale an output channel, and activations too, a scale a token, if
    ``act_bits`` is 8."""

    kind: ClassVar[str] = "float8"
    act_bits: int = 8
    target: str = LAYER_KERNELS

    def __post_init__(self):
        if self.act_bits not in (0, 8):
            raise UserError(f"activations of {self.act_bits} bits are impossible; use 8, or 0 to leave them alone")

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        return quantize_float8(dense, act_bits=self.act_bits, axis=axis)
