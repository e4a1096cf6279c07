"""Scales of a kernel's input channels, made up for in what comes before it: the model computes what it did.

``x / s`` times ``s * W`` is ``x W``; the division is folded into the norm, or the linear map, that made ``x``. So
channels are made easier to round at no cost (SmoothQuant, arXiv:2211.10438; AWQ, arXiv:2306.00978).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import Layer

__all__ = ["Fold", "fold", "folds"]


@dataclass(frozen=True)
class Fold:
    """Kernels of a layer with the same input, and what made that input.

    ``heads`` is (key/value heads, query heads for each, size of a head) where the input are values of attention: what
    query heads read of one head has one scale.
    """

    kernels: tuple[str, ...]
    maker: str  # "attn_norm", "attn/v", "mlp/up", ...: has a scale or a kernel, and maybe a bias
    heads: tuple[int, int, int] | None = None

    @property
    def norm(self) -> bool:
        return self.maker.endswith("_norm")

    def tie(self, statistic_I: jax.Array, of: Callable = jnp.max) -> jax.Array:
        """The statistic of channels ``[..., I]`` with channels that must have one scale given one value."""
        if self.heads is None:
            return statistic_I
        by_head = statistic_I.reshape(*statistic_I.shape[:-1], *self.heads)
        return jnp.broadcast_to(of(by_head, -2, keepdims=True), by_head.shape).reshape(statistic_I.shape)


def folds(config: Any, side: str, layer: Layer) -> list[Fold]:
    """What can be folded in a layer of the model, in the order it runs.

    Norms only where their output goes to kernels alone, not into the residual stream; a linear map only where nothing
    but scales that it commutes with comes between: the sums of attention, a gate, ReLU.
    """
    config = config.side(side)
    found = []

    def add(kernels: list[str], maker: str, heads: tuple[int, int, int] | None = None) -> None:
        kernels = [f"{kernel}/kernel" for kernel in kernels if f"{kernel}/kernel" in layer]
        if kernels and (f"{maker}/scale" in layer or f"{maker}/kernel" in layer):
            found.append(Fold(tuple(kernels), maker, heads))

    heads = (config.n_kv_heads, config.heads // config.n_kv_heads, config.d_head)
    before = config.norm_position in ("pre", "sandwich")
    for part in ("attn", "cross"):
        if before:
            add([f"{part}/{each}" for each in ("qkv" if part == "attn" else "q")], f"{part}_norm")
        add([f"{part}/o"], f"{part}/v", heads)
    if before:
        add(["mlp/gate", "mlp/up", "mlp/router", "mlp/experts/gate", "mlp/experts/up"], "mlp_norm")
    if config.gated or config.activation == "relu":
        add(["mlp/down"], "mlp/up")
        add(["mlp/experts/down"], "mlp/experts/up")
    return found


def fold(layer: Layer, what: Fold, scale_I: jax.Array) -> Layer:
    """The layer with the input channels of the fold's kernels divided by ``scale_I`` (``[E, I]`` of experts' own)."""
    new = dict(layer)
    for name in what.kernels:
        new[name] = layer[name] * scale_I[..., :, None]
    divisor = scale_I
    if what.heads is not None:
        divisor = scale_I.reshape(what.heads)[:, 0].reshape(-1)
    for part in ("scale", "bias") if what.norm else ("kernel", "bias"):
        name = f"{what.maker}/{part}"
        if name in layer:
            new[name] = layer[name] / (divisor[..., None, :] if part == "kernel" else divisor)
    return new
