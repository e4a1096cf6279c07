"""Steps that change the shape of a model, or the basis it computes in: each leaves a dense model with its own
configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import Block, Calibration, Layer, Measure, gram, solve_blocks
from jaxlm.compression.low_rank import low_rank, rank_for
from jaxlm.compression.prune.depth import block_influence, drop_layers, layers_to_drop
from jaxlm.compression.prune.structured import prune_experts, prune_ffn, prune_heads
from jaxlm.compression.prune.width import prune_width
from jaxlm.compression.quantize.rotate import rotate
from jaxlm.compression.solvers import hessian, read_inputs
from jaxlm.compression.steps import BLOCKS, BlockStep, ModelStep
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import LowRank
from jaxlm.core.tree import Params

__all__ = ["DropLayers", "Factor", "KeepCache", "Prune", "Rotate"]

_READERS = ("q", "k", "v", "gate", "up", "router")  # of the residual stream
_WRITERS = ("o", "down")


def _read(
    config: Any, params: Params, calibration: Calibration, how: Measure, parts: Sequence[str]
) -> dict[str, dict[str, jax.Array]]:
    """What ``how`` measures, ``[L, ...]``, by the paths of the kernels with these names, in the model as it is."""
    found: dict[str, list] = {}

    def note(block: Block) -> Layer:
        for name, reading in block.measure(how).items():
            found.setdefault(block.path(name), []).append(reading)
        return block.layer

    wanted = tuple(f"/{part}/kernel" for part in parts)
    solve_blocks(config, params, calibration, note, lambda path: path.endswith(wanted), [])
    return {path: jax.tree.map(lambda *rows: jnp.stack(rows), *readings) for path, readings in found.items()}


def _grams(config: Any, params: Params, calibration: Calibration | None, parts: Sequence[str]):
    """``E[x x^T]`` of the inputs of kernels, by path; None without data."""
    if calibration is None:
        return None
    readings = _read(config, params, calibration, gram, parts)
    return {path: each["gram"] / jnp.maximum(each["count"], 1)[..., None, None] for path, each in readings.items()}


@dataclass(frozen=True)
class Prune(ModelStep):
    """About ``share`` of the units of a kind go from every layer: "heads" (key/value heads with the query heads that
    read them), "ffn" (channels of the feed-forward blocks, and of experts), "experts", "width" (of the residual
    stream).

    With data what is left makes up for what went, by least squares; see ``structured`` and ``width``.
    """

    kind: ClassVar[str] = "prune"
    what: Literal["heads", "ffn", "experts", "width"]
    share: float

    def __call__(self, config: Any, params: Params, calibration: Calibration | None, notes: list[str]):
        if self.what == "experts":
            if calibration is None:
                return prune_experts(config, params, self.share)
            readings = _read(config, params, calibration, gram, _WRITERS)
            loads = {path.replace("experts/down", "router"): each["count"] for path, each in readings.items()
                     if "/experts/" in path}
            return prune_experts(config, params, self.share, loads=loads)
        if self.what == "width":
            return prune_width(config, params, self.share, grams=_grams(config, params, calibration, _READERS))
        prune = {"heads": prune_heads, "ffn": prune_ffn}.get(self.what)
        if prune is None:
            raise UserError(f"pruning {self.what!r} is not known; use heads, ffn, experts or width")
        return prune(config, params, self.share, grams=_grams(config, params, calibration, _WRITERS))


@dataclass(frozen=True)
class DropLayers(ModelStep):
    """``count`` whole layers go: with data those that turn the residual stream least (ShortGPT, arXiv:2403.03853),
    without evenly spaced ones. Of an encoder-decoder, the decoder's, or the ``side`` that is named."""

    kind: ClassVar[str] = "drop_layers"
    count: int
    side: Literal["encoder", "decoder"] = "decoder"

    def __call__(self, config: Any, params: Params, calibration: Calibration | None, notes: list[str]):
        total = config.side_layers(self.side)
        influence = None if calibration is None else self._influence(config, params, calibration)
        gone = layers_to_drop(total, self.count, influence)
        notes.append(f"dropped layers {', '.join(map(str, gone))} of the {self.side}'s {total}")
        return drop_layers(config, params, gone, side=self.side)

    def _influence(self, config: Any, params: Params, calibration: Calibration) -> list[float]:
        influence = []

        def note(block: Block) -> Layer:
            if block.place.side == self.side:
                after = block.outputs(block.layer)
                each = [block_influence(x, y) for (x, _), (y, _) in zip(block.states, after, strict=True)]
                influence.append(float(jnp.mean(jnp.stack(each))))
            return block.layer

        solve_blocks(config, params, calibration, note, lambda path: path.endswith("/kernel"), [])
        return influence


@dataclass(frozen=True)
class Rotate(ModelStep):
    """Turns the residual stream and the values of heads by random Hadamard matrices, folded into the weights, so that
    weights and activations have fewer outliers (QuaRot, arXiv:2404.00456). What the model computes stays the same."""

    kind: ClassVar[str] = "rotate"
    folds_scales: ClassVar[bool] = True
    seed: int = 0

    def __call__(self, config: Any, params: Params, calibration: Calibration | None, notes: list[str]):
        tied = config.tie_embeddings
        config, params = rotate(config, params, jax.random.key(self.seed))
        if tied and not config.tie_embeddings:
            notes.append("rotated: the output head is no longer the embedding, whose scale by channel differs")
        return config, params


@dataclass(frozen=True)
class KeepCache(ModelStep):
    """How decoding keeps keys and values: see ``nn.attention.kv_cache``."""

    kind: ClassVar[str] = "kv_cache"
    format: Literal["int8", "int4", "fp8"]

    def __call__(self, config: Any, params: Params, calibration: Calibration | None, notes: list[str]):
        if config.kind == "lstm":
            raise UserError("an LSTM has no cache of keys and values")
        return dataclasses.replace(config, kv_cache=self.format), params


@dataclass(frozen=True)
class Factor(BlockStep):
    """Each weight becomes a product of two of a lower rank, with ``share`` of the weight's entries: the one of least
    output error (SVD-LLM, arXiv:2403.07378)."""

    kind: ClassVar[str] = "factor"
    share: float
    target: str = BLOCKS

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise UserError(f"low rank with {self.share:.0%} of the entries is impossible; use 1% to 99%")

    def solve(self, block: Block) -> Layer:
        readings = read_inputs(block, gram)

        def factored(name: str) -> LowRank:
            kernel = block.layer[name]
            h = hessian(block, name, readings[name], "factored")
            return LowRank(*low_rank(kernel, rank_for(kernel.shape, self.share), gram=h))

        return block.layer | {name: factored(name) for name in block.targets}
