"""Removes whole layers: a shallower model of the same width."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.compression.calibration import CalibratedLayer, Calibration, LayerParams, solve_layers
from jaxlm.compression.residual_stream import dense_leaves
from jaxlm.compression.steps import Data, ModelStep, OnCpu
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params, path_str
from jaxlm.nn.config import ModelConfig, Seq2SeqConfig

__all__ = ["DropLayers", "block_influence", "drop_layers", "layers_to_drop"]


def block_influence(x_in: jax.Array, x_out: jax.Array) -> jax.Array:
    """How much a layer changes the residual stream ``[..., D]``: 1 minus the mean cosine of its input and output (Block
    Influence of ShortGPT, arXiv:2403.03853)."""
    x_in, x_out = x_in.astype(jnp.float32), x_out.astype(jnp.float32)
    norms = jnp.linalg.norm(x_in, axis=-1) * jnp.linalg.norm(x_out, axis=-1)
    return 1 - jnp.mean(jnp.sum(x_in * x_out, -1) / jnp.maximum(norms, 1e-30))


def layers_to_drop(total: int, count: int, influence: Sequence[float] | None = None) -> tuple[int, ...]:
    """The indices of ``count`` of ``total`` layers: those of least influence, or, without it, evenly spaced ones
    between the first and the last.

    Raises:
        UserError: when ``count`` is not between 1 and ``total - 1``.
    """
    if not 0 < count < total:
        raise UserError(f"dropping {count} of {total} layers is impossible; use 1 to {total - 1}")
    if influence is None:
        kept = np.round(np.linspace(0, total - 1, total - count)).astype(int)
        return tuple(sorted(set(range(total)) - set(kept.tolist())))
    if len(influence) != total:
        raise UserError(f"there are {total} layers and {len(influence)} influences")
    return tuple(sorted(np.argsort(np.asarray(influence, np.float64), kind="stable")[:count].tolist()))


def drop_layers(
    config: ModelConfig, params: Params, layers: Sequence[int], *, side: Literal["encoder", "decoder"] = "decoder"
) -> tuple[ModelConfig, Params]:
    """The model without the ``layers`` (indices from 0) of its decoder or encoder.

    Raises:
        UserError: when a layer does not exist, when no layer would remain, and when the remaining layers of encoder and
            decoder would have windows or experts that one configuration cannot describe.
    """
    leaves = dense_leaves(config, params, "dropping layers")
    pattern = re.compile(rf"{side}/layers/(\d+)/.*")
    lengths = {int(match[1]): len(leaf) for path, leaf in leaves.items() if (match := pattern.fullmatch(path))}
    total = sum(lengths.values())
    if not set(layers) <= set(range(total)) or not 0 < len(set(layers)) < total:
        raise UserError(f"cannot drop layers {sorted(set(layers))} of the {side}, which has layers 0 to {total - 1}")
    kept = [layer for layer in range(total) if layer not in set(layers)]
    starts = dict(zip(lengths, itertools.accumulate(lengths.values(), initial=0), strict=False))
    # The rows of each layer group that remain, and the new numbers of the groups that have any.
    rows = {i: [layer - starts[i] for layer in kept if 0 <= layer - starts[i] < lengths[i]] for i in sorted(lengths)}
    numbers = {old: new for new, old in enumerate(old for old, found in rows.items() if found)}
    flat = []
    for path, variable in nnx.to_flat_state(params):
        if match := pattern.fullmatch(path_str(path)):
            layer_group = int(match[1])
            if layer_group not in numbers:
                continue
            path = (*path[:2], numbers[layer_group], *path[3:])
            variable = variable.replace(variable.get_value()[np.array(rows[layer_group])])
        flat.append((path, variable))
    counts = tuple(len(rows[old]) for old in numbers)
    return _with_layers(config, kept, counts, side), nnx.from_flat_state(flat)


def _with_layers(config: ModelConfig, kept: list[int], counts: tuple[int, ...], side: str) -> ModelConfig:
    """The configuration with only the layers ``kept`` of a side, in layer groups of ``counts`` layers."""
    prefix = f"{side}_" if isinstance(config, Seq2SeqConfig) else ""
    other = 0
    if isinstance(config, Seq2SeqConfig):
        other = config.encoder_layers if side == "decoder" else config.decoder_layers
    cycle, dense, nope = config.windows or (0,), set(config.dense_layers), set(config.nope_layers)
    kinds = [(cycle[layer % len(cycle)], layer in dense, layer in nope) for layer in kept]
    others = [(cycle[layer % len(cycle)], layer in dense, layer in nope) for layer in range(other)]
    longer, shorter = sorted((kinds, others), key=len, reverse=True)
    if longer[: len(shorter)] != shorter:
        raise UserError(
            "without these layers those of encoder and decoder would have different windows, experts or positions; "
            "drop others"
        )
    windows = tuple(window for window, _, _ in longer)
    if windows == tuple(cycle[i % len(cycle)] for i in range(len(windows))):
        windows = config.windows
    changes = {
        f"{prefix}layers": len(kept), "windows": windows,
        "dense_layers": tuple(i for i, (_, is_dense, _) in enumerate(longer) if is_dense),
        "nope_layers": tuple(i for i, (_, _, is_nope) in enumerate(longer) if is_nope),
    }
    runs = tuple(len(list(run)) for _, run in itertools.groupby(kinds, lambda kind: config.experts > 0 and not kind[1]))
    explicit = config.side_layer_groups(side)
    changes[f"{prefix}layer_groups"] = counts if explicit or counts != runs else ()
    return dataclasses.replace(config, **changes)


@dataclass(frozen=True)
class DropLayers(ModelStep):
    """Removes ``count`` layers: with data those that change the residual stream least (ShortGPT, arXiv:2403.03853),
    else evenly spaced ones. ``side`` says which stack of an encoder-decoder loses them."""

    kind: ClassVar[str] = "drop_layers"
    data: ClassVar[Data] = "of use"
    count: int
    side: Literal["encoder", "decoder"] = "decoder"

    @property
    def on_cpu(self) -> OnCpu:
        return "faster"

    def __call__(
        self, config: ModelConfig, params: Params, calibration: Calibration | None, notes: list[str]
    ) -> tuple[ModelConfig, Params]:
        total = config.side_layers(self.side)
        influence = None if calibration is None else self._influence(config, params, calibration)
        dropped = layers_to_drop(total, self.count, influence)
        notes.append(f"dropped layers {', '.join(map(str, dropped))} of the {self.side}'s {total}")
        return drop_layers(config, params, dropped, side=self.side)

    def _influence(self, config: ModelConfig, params: Params, calibration: Calibration) -> list[float]:
        influence = []

        def measure(layer: CalibratedLayer) -> LayerParams:
            if layer.position.side == self.side:
                after = layer.outputs(layer.params)
                each = [block_influence(x, y) for (x, _), (y, _) in zip(layer.inputs, after, strict=True)]
                influence.append(float(jnp.mean(jnp.stack(each))))
            return layer.params

        solve_layers(config, params, calibration, measure, lambda path: path.endswith("/kernel"), [])
        return influence
