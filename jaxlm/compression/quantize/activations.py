"""Steps for weights and activations of 8 bits: SmoothQuant, and ranges of activations fixed beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from jaxlm.compression.calibration import Block, Layer, bin_values, histogram, moments
from jaxlm.compression.quantize.float8 import LARGEST, quantize_float8
from jaxlm.compression.quantize.fold import fold, folds
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.compression.solvers import by_input, read_inputs
from jaxlm.compression.steps import BLOCKS, BlockStep
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray

__all__ = ["Smooth", "Static", "clip_of"]

_PERCENTILE = 99.99


@dataclass(frozen=True)
class Smooth(BlockStep):
    """Moves the range of activations into weights: channel j is divided by ``max|x_j|**a / max|W_j|**(1 - a)``
    (SmoothQuant, arXiv:2211.10438, equation 4), folded into the norms before. Weights stay dense."""

    kind: ClassVar[str] = "smooth"
    folds_scales: ClassVar[bool] = True
    alpha: float = 0.8
    target: str = BLOCKS

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise UserError(f"SmoothQuant with alpha {self.alpha} is impossible; use 0 to 1")

    def solve(self, block: Block) -> Layer:
        layer = dict(block.layer)
        for each in folds(block.config, block.place.side, layer):
            chosen = [name for name in each.kernels if name in block.targets]
            if not each.norm or not chosen:
                continue
            seen = [reading["largest"] for reading in block.measure(moments, chosen).values()]
            largest_I = jnp.max(jnp.concatenate([reading.reshape(-1, reading.shape[-1]) for reading in seen]), 0)
            rows = [jnp.abs(layer[name]).max(-1) for name in chosen]
            weight_I = jnp.max(jnp.concatenate([row.reshape(-1, row.shape[-1]) for row in rows]), 0)
            scale_I = jnp.maximum(largest_I, 1e-5) ** self.alpha / jnp.maximum(weight_I, 1e-5) ** (1 - self.alpha)
            layer = fold(layer, each, jnp.maximum(scale_I, 1e-5))
        return layer


@dataclass(frozen=True)
class Static(BlockStep):
    """Weights of 8 bits a channel, and activations rounded on a grid that is the same for all tokens.

    Attributes:
        format: "int8" or "float8" (e4m3).
        range: what the largest code of an activation stands for: "max", the largest magnitude seen; "percentile", that
            of 99.99% of them; "mse", the one of least squared error.
    """

    kind: ClassVar[str] = "static"
    format: Literal["int8", "float8"] = "int8"
    range: Literal["max", "percentile", "mse"] = "mse"
    target: str = BLOCKS

    def __post_init__(self):
        if self.format not in ("int8", "float8") or self.range not in ("max", "percentile", "mse"):
            known = "use int8 or float8, by max, percentile or mse"
            raise UserError(f"static {self.format} by {self.range} is not known; {known}")

    def solve(self, block: Block) -> Layer:
        groups = list(by_input(block.targets))
        names = [group[0] for group in groups]
        seen = read_inputs(block, moments, groups=groups)  # complains about what no token came by
        readings = block.measure(histogram, names)
        layer = dict(block.layer)
        for group in groups:
            largest = float(jnp.max(seen[group[0]]["largest"]))
            limit = clip_of(np.asarray(readings[group[0]]["counts"]), largest, self.range, self.format)
            for name in group:
                layer[name] = self._round(layer[name], limit)
        return layer

    def _round(self, kernel, limit: float) -> QArray:
        scale = jnp.full((*kernel.shape[:-2], 1, 1), limit / (127 if self.format == "int8" else LARGEST), jnp.float32)
        if self.format == "float8":
            leaf = quantize_float8(kernel, act_bits=8)
        else:
            leaf = quantize(kernel, bits=8, act_bits=8)
        return QArray(leaf.codes, leaf.scale, leaf.zero, 8, 0, 8, act_scale=scale)


def clip_of(counts: np.ndarray, largest: float, how: str, format: str = "int8") -> float:
    """The magnitude beyond which activations are clipped, from their histogram (``calibrate.histogram``).

    Float8 keeps its precision over 15 powers of two, so that clipping gains it nothing: by "mse" it is ``largest``.
    """
    if largest <= 0:
        return 1.0
    if how == "max" or (how == "mse" and format == "float8"):
        return largest
    values = np.minimum(bin_values(), largest)
    if how == "percentile":
        upto = np.cumsum(counts) / counts.sum()
        return float(min(values[np.searchsorted(upto, _PERCENTILE / 100)], largest))
    limits = largest * np.linspace(0.05, 1, 96)
    errors = []
    for limit in limits:
        rounding = np.minimum((limit / 127) ** 2 / 12, values**2)  # what rounds to 0 is off by itself
        errors.append(np.sum(counts * np.where(values > limit, (values - limit) ** 2, rounding)))
    return float(limits[int(np.argmin(errors))])
