"""Calibration: runs data through a model layer by layer, and lets a step replace each layer's weights on the way.

The inputs of a layer come from the layers before it as they already are, compressed; so each step corrects for what was
lost before it (GPTQ, arXiv:2210.17323, section 4). The hidden states of one layer are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.compression.observers import Observe, Statistics, add_statistics
from jaxlm.core.leaves import Observer
from jaxlm.core.progress import Progress
from jaxlm.core.tree import Leaf, Params, flatten
from jaxlm.nn.config import ModelConfig

__all__ = ["CalibratedLayer", "Calibration", "LayerwiseModel", "layer_params", "solve_layers"]

TokenBatch = tuple[jax.Array, ...]  # (tokens [B, T],), or (source [B, S], decoder inputs [B, T])
LayerParams = dict[str, Leaf]  # path within a layer, as "attn/q/kernel" -> its leaf, without the layer dimension

_ON_DEVICE = 4 << 30  # bytes of hidden states; more of them wait in host memory


class LayerwiseModel(Protocol):
    """A model one layer at a time; see ``jaxlm.nn.layerwise.LayerwiseModel``. A position says where the
    parameters of a layer are."""

    config: ModelConfig

    def layer_positions(self) -> Iterable[Any]: ...
    def embed(self, params: Params, batch: TokenBatch) -> Any: ...
    def enter_decoder(self, params: Params, batch: TokenBatch, state: Any) -> Any: ...
    def run_layer(self, params: Params, position: Any, layer: LayerParams, batch: TokenBatch, state: Any) -> Any: ...
    def logits(self, params: Params, state: Any) -> jax.Array: ...
    def row_weights(self, position: Any, name: str, batch: TokenBatch) -> jax.Array | None: ...


@dataclass(frozen=True)
class Calibration:
    """Data to calibrate with.

    Attributes:
        batches: tokens ``[B, T]``, or sources ``[B, S]`` and decoder inputs ``[B, T]``.
        layerwise: makes the layer-by-layer form of the model that a configuration describes.
        seed: of what a step draws at random.
        progress: called with ``task``, the number of finished layers and the number of all layers.
    """

    batches: Sequence[TokenBatch]
    layerwise: Callable[[ModelConfig], LayerwiseModel]
    seed: int = 0
    progress: Progress | None = None
    task: str = "solving layers"


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer as a step sees it: its parameters and the hidden states that run through it.

    Attributes:
        model: the model, layer by layer.
        model_params: the parameters of the whole model.
        position: where the layer's parameters are.
        params: the layer's parameters.
        targets: the names of the kernels to replace, ``[in, out]`` or ``[experts, in, out]``.
        batches: the tokens.
        inputs: the hidden states that the layer is given, for each batch.
        dense_outputs: what the layer gave before any layer was replaced, for each batch; empty unless asked for.
        seed: of what a step draws at random.
        notes: lines for the user, shared by all layers.
    """

    model: LayerwiseModel
    model_params: Params
    position: Any
    params: LayerParams
    targets: tuple[str, ...]
    batches: Sequence[TokenBatch]
    inputs: Sequence[Any]
    dense_outputs: Sequence[Any] = ()
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def path(self, name: str) -> str:
        """The path of a kernel within the whole model."""
        return self.position.prefix + name

    def observe(
        self, how: Observe, names: Iterable[str] | None = None, params: LayerParams | None = None
    ) -> dict[str, Statistics]:
        """Statistics of the inputs of kernels over all batches, by name.

        Args:
            how: the observer.
            names: the kernels; None: the targets.
            params: the layer's parameters; None: as they are.
        """
        names, params = tuple(self.targets if names is None else names), self.params if params is None else params
        total = None
        for batch, state in zip(self.batches, self.inputs, strict=True):
            new = _observe(self.model, how, names, self.model_params, self.position, params, batch, state)
            total = new if total is None else add_statistics(total, new)
        return total

    def outputs(self, params: LayerParams) -> list[Any]:
        """What the layer gives with these parameters, for each batch."""
        return _run_batches(self.model, self.model_params, self.position, params, self.batches, self.inputs)


def _run_batches(
    model: LayerwiseModel, model_params: Params, position: Any, params: LayerParams, batches: Sequence[TokenBatch],
    states: Sequence[Any],
) -> list[Any]:
    return [_run_layer(model, model_params, position, params, *each) for each in zip(batches, states, strict=True)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _observe(
    model: LayerwiseModel, how: Observe, names: tuple[str, ...], model_params: Params, position: Any,
    params: LayerParams, batch: TokenBatch, state: Any,
) -> dict[str, Statistics]:
    """Statistics of one batch: the gradients with respect to those of the observers."""

    def total(statistics):
        observed = dict(params)
        for name in names:
            weight_M = model.row_weights(position, name, batch)
            observed[name] = Observer(params[name], statistics[name], weight_M, how)
        return jnp.sum(model.run_layer(model_params, position, observed, batch, state)[0].astype(jnp.float32))

    def zeros(leaf):
        *experts, n_in, _ = leaf.shape
        sizes = jnp.zeros(experts[0], jnp.int32) if experts else None
        like = jax.eval_shape(partial(how, weight_M=None), jnp.zeros((1, n_in)), sizes_E=sizes)
        return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), like)

    return jax.grad(total)({name: zeros(params[name]) for name in names})


_embed = jax.jit(lambda model, *args: model.embed(*args), static_argnums=0)
_enter_decoder = jax.jit(lambda model, *args: model.enter_decoder(*args), static_argnums=0)
_run_layer = jax.jit(lambda model, *args: model.run_layer(*args), static_argnums=0)


def layer_params(params: Params, position: Any) -> LayerParams:
    """The parameters of the layer at ``position``, without the layer dimension."""
    return {
        path.removeprefix(position.prefix): jax.tree.map(lambda part: part[position.row], leaf)
        for path, leaf in flatten(params).items()
        if path.startswith(position.prefix)
    }


def solve_layers(
    config: ModelConfig,
    params: Params,
    calibration: Calibration,
    solve: Callable[[CalibratedLayer], LayerParams],
    targets: Callable[[str], bool],
    notes: list[str],
    dense_outputs: bool = False,
) -> list[tuple[Any, LayerParams]]:
    """Runs through the model and lets ``solve`` replace the parameters of each layer in turn.

    Args:
        config, params: the model.
        calibration: the data.
        solve: gives the new parameters of a layer.
        targets: whether the kernel at a path is to be replaced. A layer without targets stays as it is.
        notes: gets lines for the user.
        dense_outputs: gives each layer ``CalibratedLayer.dense_outputs``; twice as many hidden states are in memory.

    Returns:
        The position and the parameters of every layer; see ``layer_groups.join``.
    """
    model = calibration.layerwise(config)
    positions = list(model.layer_positions())
    batches = calibration.batches
    states = [_embed(model, params, batch) for batch in batches]
    dense = states if dense_outputs else ()
    keep = np.asarray if sum(x.nbytes for x in jax.tree.leaves((states, dense))) > _ON_DEVICE else lambda x: x
    solved, side = [], positions[0].side
    for done, position in enumerate(positions):
        if position.side != side:  # from the encoder to the decoder
            states, dense = (
                [_enter_decoder(model, params, *each) for each in zip(batches, some, strict=True)] if some else some
                for some in (states, dense)
            )
            side = position.side
        each = layer_params(params, position)
        if dense_outputs:
            dense = _run_batches(model, params, position, each, batches, dense)
        states, dense = jax.tree.map(keep, (states, dense))
        names = tuple(name for name in each if targets(position.prefix + name))
        layer = CalibratedLayer(
            model, params, position, each, names, batches, states, dense, calibration.seed + done, notes
        )
        if names:
            each = solve(layer)
        solved.append((position, each))
        if done + 1 < len(positions):
            states = layer.outputs(each)
        if calibration.progress is not None:
            calibration.progress(calibration.task, done + 1, len(positions))
    return solved
