"""How much the loss of a model minds errors in what each kernel gives: one pass back through the model.

The loss of next tokens rises, to second order, by half the Fisher information in the direction of a change; at labels
drawn from the model itself that is the Gauss-Newton matrix (Martens, arXiv:1412.1193, section 9). Kronecker-factored
(K-FAC, arXiv:1503.05671), with the gradients' factor reduced to its diagonal, an error ``E = Q - W`` of a kernel costs

    1/2 sum_o g_o (E H E^T)_oo,   H = E[x x^T] of its inputs,   g_o = sum of squared gradients of output o, a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import Calibration, LayerParams, LayerwiseModel, TokenBatch, layer_params
from jaxlm.compression.observers import Statistics
from jaxlm.core.leaves import Observer
from jaxlm.core.tree import Params

__all__ = ["loss_increase", "output_fisher"]


def output_fisher(
    config: Any, params: Params, calibration: Calibration, targets: Callable[[str], bool]
) -> list[dict[str, jax.Array]]:
    """``g`` of the module's formula for the kernels that are ``targets`` (of their paths): for each layer by name,
    ``[out]`` or ``[experts, out]``, in nats a token for unit errors. Labels are drawn with the calibration's seed."""
    walk = calibration.layerwise(config)
    places = list(walk.layer_positions())
    layers = [layer_params(params, place) for place in places]
    names = [
        tuple(name for name in layer if targets(place.prefix + name))
        for place, layer in zip(places, layers, strict=True)
    ]
    totals, tokens = None, 0.0
    for number, batch in enumerate(calibration.batches):
        key = jax.random.fold_in(jax.random.key(calibration.seed), number)
        state, states = _enter(walk, params, batch), []
        for at, (place, layer) in enumerate(zip(places, layers, strict=True)):
            if at and place.side != places[at - 1].side:
                state = _turn(walk, params, batch, state)
            states.append(state)
            state = _forward(walk, params, place, layer, batch, state)
        count, gradient = _draw(walk, params, places[-1], batch, state, key)
        found: list[dict[str, Statistics]] = []
        for at in reversed(range(len(places))):
            readings, gradient = _back(walk, names[at], params, places[at], layers[at], batch, states[at], gradient)
            found.append(readings)
            if at and places[at].side != places[at - 1].side:
                last = _forward(walk, params, places[at - 1], layers[at - 1], batch, states[at - 1])
                gradient = _turn_back(walk, params, batch, last, gradient)
        totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
        tokens += float(count)
    return [{name: reading["square"] / tokens for name, reading in layer.items()} for layer in reversed(totals)]


@jax.jit
def loss_increase(error_IxO: jax.Array, gram_IxI: jax.Array, sensitivity_O: jax.Array) -> jax.Array:
    """What an error of a kernel costs in nats a token (see the module); all experts together where there are some."""
    product = jnp.matmul(gram_IxI, error_IxO, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * jnp.sum(sensitivity_O * jnp.sum(error_IxO * product, -2))


def _squares(g_MxO: jax.Array, weight_M: jax.Array | None, sizes_E: jax.Array | None) -> Statistics:
    square_MxO = g_MxO.astype(jnp.float32) ** 2
    if sizes_E is None:
        return {"square": jnp.sum(square_MxO, 0)}
    expert_M = jnp.repeat(jnp.arange(len(sizes_E)), sizes_E, total_repeat_length=len(g_MxO))
    return {"square": jax.ops.segment_sum(square_MxO, expert_M, len(sizes_E))}


_enter = jax.jit(lambda walk, *args: walk.embed(*args), static_argnums=0)
_turn = jax.jit(lambda walk, *args: walk.enter_decoder(*args), static_argnums=0)
_forward = jax.jit(lambda walk, *args: walk.run_layer(*args), static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _draw(walk: LayerwiseModel, params: Params, place: Any, batch: TokenBatch, state: Any, key: jax.Array):
    """How many tokens count, and the gradient of their summed loss at labels that the model draws."""
    logits, pull = jax.vjp(lambda state: walk.logits(params, state), state)
    drawn = jax.nn.one_hot(jax.random.categorical(key, logits), logits.shape[-1])
    weight = walk.row_weights(place, "", batch)
    weight = jnp.ones(logits.shape[:-1]) if weight is None else weight.reshape(logits.shape[:-1])
    change = weight[..., None] * (jax.nn.softmax(logits) - drawn)
    return jnp.sum(weight), pull(change.astype(logits.dtype))[0]


@partial(jax.jit, static_argnums=(0, 1))
def _back(walk: LayerwiseModel, names: tuple[str, ...], params: Params, place: Any, layer: LayerParams, batch, state, gradient):
    """What is measured of the gradients of a layer's kernels, and the gradient of what the layer is given."""

    def through(readings, state):
        tapped = {
            name: Observer(leaf, readings[name], None, _squares, gradient=True) if name in readings else leaf
            for name, leaf in layer.items()
        }
        return walk.run_layer(params, place, tapped, batch, state)

    zeros = {name: {"square": jnp.zeros((*layer[name].shape[:-2], layer[name].shape[-1]))} for name in names}
    return jax.vjp(through, zeros, state)[1](gradient)


@partial(jax.jit, static_argnums=0)
def _turn_back(walk: LayerwiseModel, params: Params, batch: TokenBatch, state: Any, gradient: Any) -> Any:
    return jax.vjp(lambda state: walk.enter_decoder(params, batch, state), state)[1](gradient)[0]
