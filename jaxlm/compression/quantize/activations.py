"""8-bit weights and activations with calibration data: SmoothQuant, and fixed ranges of activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.compression.calibration import CalibratedLayer, LayerParams
from jaxlm.compression.input_statistics import group_by_input, observe_inputs
from jaxlm.compression.observers import bin_values, histogram, moments
from jaxlm.compression.quantize.float8 import LARGEST, Float8, quantize_float8
from jaxlm.compression.quantize.fold import fold_scale, scale_mappings
from jaxlm.compression.quantize.rtn import Quantize, quantize
from jaxlm.compression.steps import LAYER_KERNELS, LayerStep, OnCpu, Step
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray
from jaxlm.nn.config import ModelConfig

__all__ = ["SmoothQuant", "StaticActivations", "clip_limit"]

_PERCENTILE = 99.99  # of the magnitudes


@dataclass(frozen=True)
class SmoothQuant(LayerStep):
    """Moves the range of activations into the weights: channel j is divided by ``max|x_j|**a / max|W_j|**(1 - a)``
    (SmoothQuant, arXiv:2211.10438, equation 4), which is folded into the norm before it. Weights stay dense."""

    kind: ClassVar[str] = "smooth"
    folds_scales: ClassVar[bool] = True
    alpha: float = 0.8
    target: str = LAYER_KERNELS

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise UserError(f"SmoothQuant with alpha {self.alpha} is impossible; use 0 to 1")

    def without_data(self, config: ModelConfig) -> tuple[Step, ...]:
        return ()

    def solve(self, layer: CalibratedLayer) -> LayerParams:
        params = dict(layer.params)
        for mapping in scale_mappings(layer.config, layer.position.side, params):
            chosen = [name for name in mapping.kernels if name in layer.targets]
            if not mapping.from_norm or not chosen:
                continue
            seen = [statistics["largest"] for statistics in layer.observe(moments, chosen).values()]
            largest_I = jnp.max(jnp.concatenate([each.reshape(-1, each.shape[-1]) for each in seen]), 0)
            rows = [jnp.abs(params[name]).max(-1) for name in chosen]
            weight_I = jnp.max(jnp.concatenate([row.reshape(-1, row.shape[-1]) for row in rows]), 0)
            scale_I = jnp.maximum(largest_I, 1e-5) ** self.alpha / jnp.maximum(weight_I, 1e-5) ** (1 - self.alpha)
            params = fold_scale(params, mapping, jnp.maximum(scale_I, 1e-5))
        return params


@dataclass(frozen=True)
class StaticActivations(LayerStep):
    """8-bit weights with a scale an output channel, and activations rounded on one grid for all tokens.

    Attributes:
        format: "int8" or "float8" (e4m3).
        range: the magnitude beyond which activations are clipped: "max", the largest magnitude seen; "percentile", the
            99.99th percentile of the magnitudes; "mse", the one of least squared error.
    """

    kind: ClassVar[str] = "static"
    format: Literal["int8", "float8"] = "int8"
    range: Literal["max", "percentile", "mse"] = "mse"
    target: str = LAYER_KERNELS

    def __post_init__(self):
        if self.format not in ("int8", "float8") or self.range not in ("max", "percentile", "mse"):
            known = "use int8 or float8, by max, percentile or mse"
            raise UserError(f"static {self.format} by {self.range} is not known; {known}")

    @property
    def on_cpu(self) -> OnCpu:
        return "faster" if self.format == "int8" else "as dense"

    def without_data(self, config: ModelConfig) -> tuple[Step, ...]:
        if self.format == "float8":
            return (Float8(target=self.target),)
        return (Quantize(8, symmetric=True, act_bits=8, target=self.target),)

    def solve(self, layer: CalibratedLayer) -> LayerParams:
        groups = list(group_by_input(layer.targets))
        seen = observe_inputs(layer, moments, groups=groups)  # raises where a kernel saw no token
        histograms = layer.observe(histogram, [names[0] for names in groups])
        params = dict(layer.params)
        for names in groups:
            largest = float(jnp.max(seen[names[0]]["largest"]))
            limit = clip_limit(np.asarray(histograms[names[0]]["counts"]), largest, self.range, self.format)
            for name in names:
                params[name] = self._round(params[name], limit)
        return params

    def _round(self, kernel: jax.Array, limit: float) -> QArray:
        scale = jnp.full((*kernel.shape[:-2], 1, 1), limit / (127 if self.format == "int8" else LARGEST), jnp.float32)
        if self.format == "float8":
            leaf = quantize_float8(kernel, act_bits=8)
        else:
            leaf = quantize(kernel, bits=8, act_bits=8)
        return QArray(leaf.codes, leaf.scale, leaf.zero, 8, 0, 8, act_scale=scale)


def clip_limit(counts: np.ndarray, largest: float, how: str, format: str = "int8") -> float:
    """The magnitude beyond which activations are clipped.

    Float8 keeps its precision over 15 powers of two, so clipping gains nothing there: with "mse" the limit is
    ``largest``.

    Args:
        counts: their histogram (``observers.histogram``).
        largest: their largest magnitude.
        how: see ``StaticActivations.range``.
        format: "int8" or "float8".
    """
    if largest <= 0:
        return 1.0
    if how == "max" or (how == "mse" and format == "float8"):
        return largest
    values = np.minimum(bin_values(), largest)
    if how == "percentile":
        share = np.cumsum(counts) / counts.sum()
        return float(min(values[np.searchsorted(share, _PERCENTILE / 100)], largest))
    limits = largest * np.linspace(0.05, 1, 96)
    errors = []
    for limit in limits:
        rounding = np.minimum((limit / 127) ** 2 / 12, values**2)  # a value that rounds to 0 has itself as its error
        errors.append(np.sum(counts * np.where(values > limit, (values - limit) ** 2, rounding)))
    return float(limits[int(np.argmin(errors))])
