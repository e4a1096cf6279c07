"""How much the loss of a model rises with errors of each kernel, from one pass through the model and back.

The loss of next tokens rises, to second order, by half the Fisher information in the direction of a change. At labels
drawn from the model itself that is the Gauss-Newton matrix (Martens, arXiv:1412.1193, section 9). Kronecker-factored
(K-FAC, arXiv:1503.05671), with the gradients' factor reduced to its diagonal, an error ``E = Q - W`` of a kernel costs

    1/2 sum_o g_o (E H E^T)_oo,   H = E[x x^T] of its inputs,   g_o = sum of squared gradients of output o, a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import Calibration, LayerParams, LayerwiseModel, TokenBatch, layer_params
from jaxlm.compression.input_statistics import group_by_input
from jaxlm.compression.observers import Statistics, gram
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Observer
from jaxlm.core.tree import Params

__all__ = ["LayerStatistics", "layer_statistics", "loss_increase"]

_AT_ONCE = 4 << 30  # bytes of the second moments of all layers, beyond which they are left out


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the inputs and the outputs of one layer's kernels, by the names of the kernels in the layer.

    Attributes:
        fisher: ``g`` of the module's formula, ``[out]`` or ``[experts, out]``, in nats a token for unit errors.
        inputs: readings of ``calibration.gram``; None where those of all layers would not fit into memory.
    """

    fisher: dict[str, jax.Array]
    inputs: dict[str, Statistics] | None


def layer_statistics(
    config: Any, params: Params, calibration: Calibration, targets: Callable[[str], bool]
) -> list[LayerStatistics]:
    """The statistics of each layer's kernels whose paths are ``targets``. Labels are drawn with the calibration's seed.

    Raises:
        UserError: a kernel saw no token of the data.
    """
    model = calibration.layerwise(config)
    positions = list(model.layer_positions())
    layers = [layer_params(params, position) for position in positions]
    names = [
        tuple(name for name in layer if targets(position.prefix + name))
        for position, layer in zip(positions, layers, strict=True)
    ]
    fits = sum(_gram_bytes(layer, some) for layer, some in zip(layers, names, strict=True)) <= _AT_ONCE
    passes = _Passes(model, params, positions, layers, names, fits)
    squares, inputs, tokens = None, None, 0.0
    for number, batch in enumerate(calibration.batches):
        key = jax.random.fold_in(jax.random.key(calibration.seed), number)
        last, states, read = passes.forward(batch)
        count, gradient = _draw(model, params, positions[-1], batch, last, key)
        found = list(passes.backward(batch, states, gradient))
        squares = found if squares is None else jax.tree.map(jnp.add, squares, found)
        inputs = read if inputs is None else _add(inputs, read)
        tokens += float(count)
        if calibration.progress is not None:
            calibration.progress("measuring the layers", number + 1, len(calibration.batches))
    return [
        LayerStatistics(
            {name: reading["square"] / tokens for name, reading in square.items()},
            _of_all(position.prefix, some, read) if fits else None,
        )
        for position, some, square, read in zip(positions, names, reversed(squares), inputs, strict=True)
    ]


@jax.jit
def loss_increase(error_IxO: jax.Array, gram_IxI: jax.Array, fisher_O: jax.Array) -> jax.Array:
    """What an error of a kernel costs in nats a token (see the module); all experts together where there are some."""
    product = jnp.matmul(gram_IxI, error_IxO, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * jnp.sum(fisher_O * jnp.sum(error_IxO * product, -2))


@dataclass(frozen=True)
class _Passes:
    """A model whose layers are run one after the other, and their kernels observed."""

    model: LayerwiseModel
    params: Params
    positions: list[Any]
    layers: list[LayerParams]
    names: list[tuple[str, ...]]
    observe_inputs: bool

    def forward(self, batch: TokenBatch) -> tuple[Any, list[Any], list[dict[str, Statistics]]]:
        """What the last layer gives, what each layer is given, and statistics of the kernels' inputs, one for each."""
        state, states, inputs = _embed(self.model, self.params, batch), [], []
        for at, (position, layer, names) in enumerate(zip(self.positions, self.layers, self.names, strict=True)):
            if self._decoder_begins(at):
                state = _enter_decoder(self.model, self.params, batch, state)
            states.append(state)
            first = tuple(group[0] for group in group_by_input(names)) if self.observe_inputs else ()
            readings, state = _forward(self.model, first, self.params, position, layer, batch, state)
            inputs.append(readings)
        return state, states, inputs

    def backward(self, batch: TokenBatch, states: list[Any], gradient: Any) -> Iterator[dict[str, Statistics]]:
        """The squares of the gradients of each layer's kernels' outputs, from the last layer to the first."""
        for at in reversed(range(len(self.positions))):
            position, layer = self.positions[at], self.layers[at]
            readings, gradient = _backward(
                self.model, self.names[at], self.params, position, layer, batch, states[at], gradient
            )
            yield readings
            if self._decoder_begins(at):
                before = (self.positions[at - 1], self.layers[at - 1], batch, states[at - 1])
                _, encoded = _forward(self.model, (), self.params, *before)
                gradient = _leave_decoder(self.model, self.params, batch, encoded, gradient)

    def _decoder_begins(self, at: int) -> bool:
        return at > 0 and self.positions[at].side != self.positions[at - 1].side


def _gram_bytes(layer: LayerParams, names: tuple[str, ...]) -> int:
    first = [layer[group[0]].shape for group in group_by_input(names)]
    return sum(4 * math.prod(shape[:-2]) * shape[-2] ** 2 for shape in first)


def _of_all(prefix: str, names: tuple[str, ...], readings: dict[str, Statistics]) -> dict[str, Statistics]:
    """Readings for all kernels, from those of one kernel for each input."""
    for name, reading in readings.items():
        if not float(jnp.sum(reading["count"])) > 0:
            raise UserError(f"{prefix}{name} saw no token of the calibration data; give more")
    return {name: readings[group[0]] for group in group_by_input(names) for name in group}


def _squares(g_MxO: jax.Array, weight_M: jax.Array | None, sizes_E: jax.Array | None) -> Statistics:
    square_MxO = g_MxO.astype(jnp.float32) ** 2
    if sizes_E is None:
        return {"square": jnp.sum(square_MxO, 0)}
    expert_M = jnp.repeat(jnp.arange(len(sizes_E)), sizes_E, total_repeat_length=len(g_MxO))
    return {"square": jax.ops.segment_sum(square_MxO, expert_M, len(sizes_E))}


_embed = jax.jit(lambda model, *args: model.embed(*args), static_argnums=0)
_enter_decoder = jax.jit(lambda model, *args: model.enter_decoder(*args), static_argnums=0)
_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


@partial(jax.jit, static_argnums=(0, 1))
def _forward(
    model: LayerwiseModel, names: tuple[str, ...], params: Params, position: Any, layer: LayerParams,
    batch: TokenBatch, state: Any,
) -> tuple[dict[str, Statistics], Any]:
    """Readings of the inputs of some kernels of a layer, and what the layer gives."""

    def total(readings):
        observed = dict(layer)
        for name in names:
            weight_M = model.row_weights(position, name, batch)
            observed[name] = Observer(layer[name], readings[name], weight_M, gram)
        after = model.run_layer(params, position, observed, batch, state)
        return jnp.sum(after[0].astype(jnp.float32)), after

    if not names:
        return {}, model.run_layer(params, position, layer, batch, state)
    zeros = {}
    for name in names:
        *experts, n_in, _ = layer[name].shape
        zeros[name] = {"gram": jnp.zeros((*experts, n_in, n_in)), "count": jnp.zeros(experts)}
    return jax.grad(total, has_aux=True)(zeros)


@partial(jax.jit, static_argnums=0)
def _draw(model: LayerwiseModel, params: Params, position: Any, batch: TokenBatch, state: Any, key: jax.Array):
    """How many tokens count, and the gradient of their summed loss at labels that the model draws."""
    logits, pull = jax.vjp(lambda state: model.logits(params, state), state)
    drawn = jax.nn.one_hot(jax.random.categorical(key, logits), logits.shape[-1])
    weight = model.row_weights(position, "", batch)
    weight = jnp.ones(logits.shape[:-1]) if weight is None else weight.reshape(logits.shape[:-1])
    change = weight[..., None] * (jax.nn.softmax(logits) - drawn)
    return jnp.sum(weight), pull(change.astype(logits.dtype))[0]


@partial(jax.jit, static_argnums=(0, 1))
def _backward(
    model: LayerwiseModel, names: tuple[str, ...], params: Params, position: Any, layer: LayerParams,
    batch: TokenBatch, state: Any, gradient: Any,
) -> tuple[dict[str, Statistics], Any]:
    """The squares of the gradients of a layer's kernels' outputs, and the gradient of what the layer is given."""

    def through(readings, state):
        observed = {
            name: Observer(leaf, readings[name], None, _squares, gradient=True) if name in readings else leaf
            for name, leaf in layer.items()
        }
        return model.run_layer(params, position, observed, batch, state)

    zeros = {name: {"square": jnp.zeros((*layer[name].shape[:-2], layer[name].shape[-1]))} for name in names}
    return jax.vjp(through, zeros, state)[1](gradient)


@partial(jax.jit, static_argnums=0)
def _leave_decoder(model: LayerwiseModel, params: Params, batch: TokenBatch, state: Any, gradient: Any) -> Any:
    """The gradient of what the encoder gives, from that of what the decoder is given."""
    return jax.vjp(lambda state: model.enter_decoder(params, batch, state), state)[1](gradient)[0]
