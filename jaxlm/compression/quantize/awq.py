"""AWQ (arXiv:2306.00978): salient input channels are scaled up before rounding, and grids are clipped."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import CalibratedLayer, LayerParams
from jaxlm.compression.input_statistics import group_by_input, observe_inputs, second_moment
from jaxlm.compression.observers import gram, moments
from jaxlm.compression.quantize.fold import ScaleMapping, fold_scale, scale_mappings
from jaxlm.compression.quantize.rtn import IntegerGrid, IntegerLayerStep
from jaxlm.compression.steps import LAYER_KERNELS
from jaxlm.core.leaves import QArray

__all__ = ["Awq", "best_scale"]

_POWERS = 20  # the search tries the powers 0, 1/20, ... 19/20


@dataclass(frozen=True)
class Awq(IntegerLayerStep):
    """Scales input channels by a power of their mean magnitude and rounds to nearest. The power is the one of least
    error ``tr(E H E^T)`` of the kernels' outputs, with ``H = E[x x^T]``.

    Scales are folded into what computes the inputs (``fold.scale_mappings``). Kernels that allow no folding are only
    rounded. Zeros stay zeros.

    Attributes:
        bits, group, symmetric: the grid; see ``Quantize``.
        clip: clips each group's range to a share of itself, at least this one, where that lowers the error weighted by
            E[x**2]; 1: no clipping.
    """

    kind: ClassVar[str] = "awq"
    folds_scales: ClassVar[bool] = True
    bits: int
    group: int = 128
    symmetric: bool = False
    clip: float = 0.5
    target: str = LAYER_KERNELS

    def solve(self, layer: CalibratedLayer) -> LayerParams:
        params, action = dict(layer.params), f"rounded to {self.bits} bits"
        grams, sizes = observe_inputs(layer, gram), observe_inputs(layer, moments)
        second = {name: second_moment(layer, name, grams[name], action) for name in layer.targets}
        for mapping in scale_mappings(layer.config, layer.position.side, params):
            chosen = [name for name in mapping.kernels if name in layer.targets]
            if not chosen or (mapping.from_norm and "/experts/" in chosen[0]):  # each expert sees tokens of its own
                continue
            statistics = sizes[chosen[0]]
            size_I = statistics["size"] / jnp.maximum(statistics["count"], 1)[..., None]
            kernels = [params[name].swapaxes(-1, -2) for name in chosen]
            scale_I = best_scale(
                kernels, second[chosen[0]], size_I, mapping, bits=self.bits, group=self.group, symmetric=self.symmetric
            )
            params = fold_scale(params, mapping, scale_I)
            for name in chosen:
                second[name] = second[name] / (scale_I[..., :, None] * scale_I[..., None, :])
        for name in (name for names in group_by_input(layer.targets) for name in names):
            params[name] = self._round(params[name], second[name])
        return params

    def _round(self, kernel: jax.Array, h: jax.Array) -> QArray:
        w_OxI = kernel.swapaxes(-1, -2).astype(jnp.float32)
        group = 0 if self.group >= w_OxI.shape[-1] else self.group
        grid = IntegerGrid(self.bits, self.symmetric, self.clip)
        scale, zero = grid.fit(w_OxI, group, jnp.diagonal(h, axis1=-2, axis2=-1))
        return QArray(grid.codes(w_OxI, (scale, zero), group), scale, zero, self.bits, group)


@functools.partial(jax.jit, static_argnames=("mapping", "bits", "group", "symmetric"))
def best_scale(
    kernels: Sequence[jax.Array], h_IxI: jax.Array, size_I: jax.Array, mapping: ScaleMapping, *, bits: int, group: int,
    symmetric: bool,
) -> jax.Array:
    """The scales ``[..., in]`` of the input channels that give the least output error.

    Args:
        kernels: ``[..., out, in]`` each.
        h_IxI: ``E[x x^T]`` of their input.
        size_I: ``E|x|`` of their input.
        mapping: says which channels share a scale.
        bits, group, symmetric: the grid.
    """
    n_in = size_I.shape[-1]
    group = 0 if group >= n_in else group
    grid = IntegerGrid(bits, symmetric)
    w_OxI = jnp.concatenate(kernels, -2).astype(jnp.float32)
    size_I = jnp.maximum(mapping.share_within_heads(size_I, jnp.mean), 1e-4)

    def scale_of(power):
        scale_I = size_I**power
        middle = jnp.sqrt(jnp.max(scale_I, -1, keepdims=True) * jnp.min(scale_I, -1, keepdims=True))
        return jnp.maximum(scale_I / middle, 1e-4)

    def loss_of(power):
        scale_I = scale_of(power)[..., None, :]
        scaled_OxI = w_OxI * scale_I
        params = grid.fit(scaled_OxI, group)
        error_OxI = grid.values(grid.codes(scaled_OxI, params, group), params, group) / scale_I - w_OxI
        product = jnp.matmul(error_OxI, h_IxI, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(product * error_OxI, (-1, -2))

    powers = jnp.arange(_POWERS) / _POWERS
    losses = jax.lax.map(loss_of, powers)  # [powers, ...]
    scales = jax.vmap(scale_of)(powers)  # [powers, ..., in]
    if losses.ndim == 1:
        return scales[jnp.argmin(losses, 0)]
    return jnp.take_along_axis(scales, jnp.argmin(losses, 0)[None, :, None], axis=0)[0]
