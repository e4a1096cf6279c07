"""Structured pruning as a step: heads, feed-forward channels, experts or channels of the residual stream are removed.

The result is a smaller dense model, which runs, trains and is saved like any other. ``units`` says how units are
scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import CalibratedLayer, Calibration, LayerParams, solve_layers
from jaxlm.compression.observers import Statistics, gram
from jaxlm.compression.prune.feed_forward import prune_experts, prune_ffn
from jaxlm.compression.prune.heads import prune_heads
from jaxlm.compression.prune.units import InputData
from jaxlm.compression.prune.width import prune_width
from jaxlm.compression.steps import Data, ModelStep, OnCpu
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params
from jaxlm.nn.config import ModelConfig

__all__ = ["StructuredPrune"]

_READERS = ("q", "k", "v", "gate", "up", "router")  # kernels that read the residual stream
_WRITERS = ("o", "down")


@dataclass(frozen=True)
class StructuredPrune(ModelStep):
    """Removes about the share ``share`` of the units of a kind from every layer.

    With data, what remains makes up for what was removed, by least squares; see ``heads``, ``feed_forward`` and
    ``width``.

    Attributes:
        what: "heads" (key/value heads with the query heads that read them), "ffn" (channels of the feed-forward blocks,
            and of experts), "experts", or "width" (channels of the residual stream).
        share: 0 to 1.
    """

    kind: ClassVar[str] = "prune"
    data: ClassVar[Data] = "of use"
    what: Literal["heads", "ffn", "experts", "width"]
    share: float

    @property
    def on_cpu(self) -> OnCpu:
        return "faster"

    def __call__(
        self, config: ModelConfig, params: Params, calibration: Calibration | None, notes: list[str]
    ) -> tuple[ModelConfig, Params]:
        if self.what == "experts":
            return prune_experts(config, params, self.share, loads=_loads(config, params, calibration))
        if self.what == "width":
            return prune_width(config, params, self.share, grams=_grams(config, params, calibration, _READERS))
        prune = {"heads": prune_heads, "ffn": prune_ffn}.get(self.what)
        if prune is None:
            raise UserError(f"pruning {self.what!r} is not known; use heads, ffn, experts or width")
        return prune(config, params, self.share, grams=_grams(config, params, calibration, _WRITERS))


def _loads(config: ModelConfig, params: Params, calibration: Calibration | None) -> InputData | None:
    """The number of tokens of each expert, ``[L, E]``, by the path of the router's kernel; None without data."""
    if calibration is None:
        return None
    statistics = _observe(config, params, calibration, _WRITERS)
    return {
        path.replace("experts/down", "router"): each["count"]
        for path, each in statistics.items()
        if "/experts/" in path
    }


def _grams(
    config: ModelConfig, params: Params, calibration: Calibration | None, names: Sequence[str]
) -> InputData | None:
    """``E[x x^T]`` of the inputs of kernels, by path; None without data."""
    if calibration is None:
        return None
    statistics = _observe(config, params, calibration, names)
    return {path: each["gram"] / jnp.maximum(each["count"], 1)[..., None, None] for path, each in statistics.items()}


def _observe(
    config: ModelConfig, params: Params, calibration: Calibration, names: Sequence[str]
) -> dict[str, Statistics]:
    """The statistics of ``observers.gram``, ``[L, ...]``, by the paths of the kernels with these names."""
    found: dict[str, list[Statistics]] = {}

    def observe(layer: CalibratedLayer) -> LayerParams:
        for name, statistics in layer.observe(gram).items():
            found.setdefault(layer.path(name), []).append(statistics)
        return layer.params

    wanted = tuple(f"/{name}/kernel" for name in names)
    solve_layers(config, params, calibration, observe, lambda path: path.endswith(wanted), [])
    return {path: jax.tree.map(lambda *rows: jnp.stack(rows), *each) for path, each in found.items()}
