"""AWQ: channels that matter are scaled up before rounding, and grids are clipped (arXiv:2306.00978)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import Block, Layer, gram, moments
from jaxlm.compression.quantize.fold import Fold, fold, folds
from jaxlm.compression.quantize.rtn import IntegerGrid
from jaxlm.compression.solvers import by_input, hessian, read_inputs
from jaxlm.compression.steps import BLOCKS, BlockStep, check_grid
from jaxlm.core.leaves import QArray

__all__ = ["Awq", "best_scale"]

_POWERS = 20  # tried: 0, 1/20, ... 19/20


@dataclass(frozen=True)
class Awq(BlockStep):
    """Scales input channels by a power of their mean magnitude, that of least output error, then rounds to nearest.

    Scales are folded into what comes before (``fold.folds``); kernels for which that cannot be are only rounded. The
    error is ``tr(E H E^T)`` with ``H = E[x x^T]``, that of the kernels' outputs.

    Attributes:
        bits, group, symmetric: the grid; see ``Quantize``.
        clip: shrinks each group's span, at most to this share, where that lowers the error weighted by E[x**2]; 1 not.

    Zeros stay zeros.
    """

    kind: ClassVar[str] = "awq"
    folds_scales: ClassVar[bool] = True
    bits: int
    group: int = 128
    symmetric: bool = False
    clip: float = 0.5
    target: str = BLOCKS

    def __post_init__(self):
        check_grid(self.bits, self.group)

    def solve(self, block: Block) -> Layer:
        layer, what = dict(block.layer), f"rounded to {self.bits} bits"
        readings, sizes = read_inputs(block, gram), read_inputs(block, moments)
        second = {name: hessian(block, name, readings[name], what) for name in block.targets}
        for each in folds(block.config, block.place.side, layer):
            chosen = [name for name in each.kernels if name in block.targets]
            if not chosen or (each.norm and "/experts/" in chosen[0]):  # experts see tokens of their own
                continue
            reading = sizes[chosen[0]]
            size_I = reading["size"] / jnp.maximum(reading["count"], 1)[..., None]
            kernels = [layer[name].swapaxes(-1, -2) for name in chosen]
            scale_I = best_scale(kernels, second[chosen[0]], size_I, each, bits=self.bits, group=self.group,
                                 symmetric=self.symmetric)
            layer = fold(layer, each, scale_I)
            for name in chosen:
                second[name] = second[name] / (scale_I[..., :, None] * scale_I[..., None, :])
        for name in (name for names in by_input(block.targets) for name in names):
            layer[name] = self._round(layer[name], second[name])
        return layer

    def _round(self, kernel: jax.Array, h: jax.Array) -> QArray:
        w_OxI = kernel.swapaxes(-1, -2).astype(jnp.float32)
        group = 0 if self.group >= w_OxI.shape[-1] else self.group
        grid = IntegerGrid(self.bits, self.symmetric, self.clip)
        scale, zero = grid.fit(w_OxI, group, jnp.diagonal(h, axis1=-2, axis2=-1))
        return QArray(grid.codes(w_OxI, (scale, zero), group), scale, zero, self.bits, group)


@functools.partial(jax.jit, static_argnames=("what", "bits", "group", "symmetric"))
def best_scale(
    kernels: Sequence[jax.Array], h_IxI: jax.Array, size_I: jax.Array, what: Fold, *, bits: int, group: int,
    symmetric: bool,
) -> jax.Array:
    """The scale ``[..., in]`` of channels of least output error.

    Args:
        kernels: ``[..., out, in]`` each.
        h_IxI: ``E[x x^T]`` of their input.
        size_I: ``E|x|``.
        what: which channels share a scale.
    """
    n_in = size_I.shape[-1]
    group = 0 if group >= n_in else group
    grid = IntegerGrid(bits, symmetric)
    w_OxI = jnp.concatenate(kernels, -2).astype(jnp.float32)
    size_I = jnp.maximum(what.tie(size_I, jnp.mean), 1e-4)

    def scale_of(power):
        scale_I = size_I**power
        spread = jnp.sqrt(jnp.max(scale_I, -1, keepdims=True) * jnp.min(scale_I, -1, keepdims=True))
        return jnp.maximum(scale_I / spread, 1e-4)

    def loss_of(power):
        scale_I = scale_of(power)[..., None, :]
        scaled_OxI = w_OxI * scale_I
        params = grid.fit(scaled_OxI, group)
        error_OxI = grid.values(grid.codes(scaled_OxI, params, group), params, group) / scale_I - w_OxI
        product = jnp.matmul(error_OxI, h_IxI, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(product * error_OxI, (-1, -2))

    powers = jnp.arange(_POWERS) / _POWERS
    losses = jax.lax.map(loss_of, powers)  # [powers, ...]
    return jax.vmap(scale_of)(powers)[jnp.argmin(losses, 0)] if losses.ndim == 1 else _of_each(scale_of, powers, losses)


def _of_each(scale_of, powers: jax.Array, losses: jax.Array) -> jax.Array:
    """Of several experts each its own."""
    scales = jax.vmap(scale_of)(powers)  # [powers, E, in]
    return jnp.take_along_axis(scales, jnp.argmin(losses, 0)[None, :, None], axis=0)[0]
