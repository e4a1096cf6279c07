"""Scales of the input channels of kernels, folded into what computes the inputs: the model computes the same function.

``x / s`` times ``s * W`` is ``x W``; the division is folded into the norm or the linear map that computes ``x``. So
channels become easier to round at no cost (SmoothQuant, arXiv:2211.10438; AWQ, arXiv:2306.00978).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import LayerParams
from jaxlm.nn.config import ModelConfig

__all__ = ["ScaleMapping", "fold_scale", "scale_mappings"]


@dataclass(frozen=True)
class ScaleMapping:
    """Kernels of a layer with the same input, and the producer of that input, which takes up the inverse scale.

    Attributes:
        kernels: the names of the kernels.
        producer: the norm or linear map, "attn_norm", "attn/v", "mlp/up", ...: it has a scale or a kernel, maybe a
            bias.
        heads: (key/value heads, query heads for each of them, size of a head) where the input is attention's values.
            Query heads that read the same key/value head share its scales.
    """

    kernels: tuple[str, ...]
    producer: str
    heads: tuple[int, int, int] | None = None

    @property
    def from_norm(self) -> bool:
        return self.producer.endswith("_norm")

    def share_within_heads(self, statistic_I: jax.Array, reduce: Callable = jnp.max) -> jax.Array:
        """The statistic ``[..., I]`` with one value for all channels that must share a scale."""
        if self.heads is None:
            return statistic_I
        by_head = statistic_I.reshape(*statistic_I.shape[:-1], *self.heads)
        return jnp.broadcast_to(reduce(by_head, -2, keepdims=True), by_head.shape).reshape(statistic_I.shape)


def scale_mappings(config: ModelConfig, side: str, params: LayerParams) -> list[ScaleMapping]:
    """The mappings that a layer of the model allows, in the order in which they run.

    A norm is a producer only where kernels alone read its output, not the residual stream. A linear map is one only
    where everything between commutes with scales: the weighted sums of attention, a gate, ReLU.
    """
    config = config.side(side)
    found = []

    def add(kernels: list[str], producer: str, heads: tuple[int, int, int] | None = None) -> None:
        kernels = [f"{kernel}/kernel" for kernel in kernels if f"{kernel}/kernel" in params]
        if kernels and (f"{producer}/scale" in params or f"{producer}/kernel" in params):
            found.append(ScaleMapping(tuple(kernels), producer, heads))

    heads = (config.n_kv_heads, config.heads // config.n_kv_heads, config.d_head)
    pre_norm = config.norm_position in ("pre", "sandwich")
    into_mlp = [f"mlp/{part}{name}" for part in ("", "experts/", "shared/") for name in ("gate", "up")]
    into_mlp = ["mlp/router", "mlp/shared_gate", *into_mlp]
    shared = config.parallel and config.shared_norm
    for part in ("attn", "cross"):
        if pre_norm:
            readers = [f"{part}/{each}" for each in ("qkv" if part == "attn" else "q")]
            add(readers + into_mlp if shared and part == "attn" else readers, f"{part}_norm")
        if not config.clip_qkv:
            add([f"{part}/o"], f"{part}/v", heads)
    if pre_norm and not shared:
        add(into_mlp, "mlp_norm")
    if config.activation != "clamped_swiglu" and (config.gated or config.activation == "relu"):
        for part in ("", "experts/", "shared/"):
            add([f"mlp/{part}down"], f"mlp/{part}up")
    return found


def fold_scale(params: LayerParams, mapping: ScaleMapping, scale_I: jax.Array) -> LayerParams:
    """The layer with the inputs of the mapping's kernels divided by ``scale_I`` and the kernels multiplied by it.
    Experts may have scales of their own, ``[E, I]``."""
    new = dict(params)
    for name in mapping.kernels:
        new[name] = params[name] * scale_I[..., :, None]
    divisor = scale_I
    if mapping.heads is not None:
        divisor = scale_I.reshape(mapping.heads)[:, 0].reshape(-1)
    for part in ("scale", "bias") if mapping.from_norm else ("kernel", "bias"):
        name = f"{mapping.producer}/{part}"
        if name in params:
            new[name] = params[name] / (divisor[..., None, :] if part == "kernel" else divisor)
    return new
