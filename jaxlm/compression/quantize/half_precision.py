"""16-bit floats for what stays dense, and for scales."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from jaxlm.compression.calibration import Calibration
from jaxlm.compression.steps import ModelStep
from jaxlm.core.leaves import LowRank, is_leaf
from jaxlm.core.tree import Leaf, Params, map_params
from jaxlm.nn.config import ModelConfig

__all__ = ["HalfPrecision"]


@dataclass(frozen=True)
class HalfPrecision(ModelStep):
    """Stores what is dense in bfloat16, and scales of quantized weights in float16 where its range allows. Put it last.

    It rounds a weight by at most a part in 512 and a scale by a part in 2,048, which is little beside codes of a few
    bits.
    """

    kind: ClassVar[str] = "half"

    def __call__(
        self, config: ModelConfig, params: Params, calibration: Calibration | None, notes: list[str]
    ) -> tuple[ModelConfig, Params]:
        return config, map_params(lambda path, leaf: self._round(leaf), params)

    def _round(self, leaf: Leaf) -> Leaf:
        if isinstance(leaf, LowRank):
            return LowRank(self._round(leaf.a), self._round(leaf.b))
        if not is_leaf(leaf):
            return leaf.astype(jnp.bfloat16)
        if leaf.scale is None:
            return leaf
        limits = jnp.finfo(jnp.float16)
        in_range = (leaf.scale >= limits.tiny) & (leaf.scale <= limits.max)
        scale = jnp.where(in_range, leaf.scale.astype(jnp.float16).astype(jnp.float32), leaf.scale)
        return dataclasses.replace(leaf, scale=scale)
