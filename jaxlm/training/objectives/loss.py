"""Cross-entropy losses, summed over tokens so that sharding and accumulation stay exact.

A loss is a function ``(model, batch, key) -> (objective, sums)``: ``objective`` is the quantity to differentiate,
``sums`` holds ``"nll"`` (the plain negative log-likelihood in nats, without what the objective adds) and ``"weight"``
(the number of tokens that count). All three are sums over the batch; the step divides once, by its total weight.
``key`` is a PRNG key for dropout, or None for a deterministic forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.core.sharding import num_shards
from jaxlm.data.batches.batch import Batch
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.models import batch_arguments
from jaxlm.nn.moe.routing import Routing

__all__ = ["Loss", "LossSums", "RouterWeights", "cross_entropy", "lm_loss", "make_loss", "router_loss", "seq2seq_loss"]

LossSums = dict[str, Array]
Loss = Callable[[Any, Batch, Array | None], tuple[Array, LossSums]]
RouterWeights = tuple[float, float]  # the weights of the two terms of ``router_loss``


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cross_entropy(
    logits_BxTxV: Array, targets_BxT: Array, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """Per-token training objective and negative log-likelihood, both ``[B, T]`` float32 in nats.

    With ``lse = logsumexp(logits)``, smoothing ``e`` (towards the uniform distribution over all V classes, as in
    arXiv:1512.00567, section 7) and z-loss weight ``z`` (arXiv:2204.02311, section 5)::

        nll = lse - logits[target]
        objective = lse - (1 - e) * logits[target] - e * mean(logits) + z * lse**2

    No one-hot array and no second [B, T, V] residual: the backward pass recomputes the softmax from the logits and
    ``lse`` in one fused elementwise pass.
    """
    objective, nll, _ = _forward(logits_BxTxV, targets_BxT, label_smoothing, z_loss)
    return objective, nll


def _forward(logits_BxTxV, targets_BxT, label_smoothing, z_loss):
    lse_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    target_BxT = _target_logits(logits_BxTxV, targets_BxT)
    nll_BxT = lse_BxT - target_BxT
    objective_BxT = nll_BxT
    if label_smoothing:
        objective_BxT += label_smoothing * (target_BxT - jnp.mean(logits_BxTxV, axis=-1))
    if z_loss:
        objective_BxT += z_loss * lse_BxT**2
    return objective_BxT, nll_BxT, lse_BxT


def _target_logits(logits_BxTxV, targets_BxT):
    """The logits of the targets. Where the vocabulary is split over devices this is a masked sum, which GSPMD splits
    under any mesh; it cannot split an indexed lookup under all of them."""
    if num_shards("vocab") == 1:
        return jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    hit_BxTxV = jax.lax.broadcasted_iota(jnp.int32, logits_BxTxV.shape, 2) == targets_BxT[..., None]
    return jnp.sum(jnp.where(hit_BxTxV, logits_BxTxV, 0), -1)


def _cross_entropy_fwd(logits_BxTxV, targets_BxT, label_smoothing, z_loss):
    objective_BxT, nll_BxT, lse_BxT = _forward(logits_BxTxV, targets_BxT, label_smoothing, z_loss)
    return (objective_BxT, nll_BxT), (logits_BxTxV, targets_BxT, lse_BxT)


def _cross_entropy_bwd(label_smoothing, z_loss, residuals, cotangents):
    logits_BxTxV, targets_BxT, lse_BxT = residuals
    objective_BxT, nll_BxT = cotangents
    softmax_BxT = nll_BxT + objective_BxT * (1 + 2 * z_loss * lse_BxT)  # the factor of each of the three terms
    target_BxT = nll_BxT + objective_BxT * (1 - label_smoothing)
    uniform_BxT = objective_BxT * (label_smoothing / logits_BxTxV.shape[-1])
    hit_BxTxV = jax.lax.broadcasted_iota(jnp.int32, logits_BxTxV.shape, 2) == targets_BxT[..., None]
    grad_BxTxV = softmax_BxT[..., None] * jnp.exp(logits_BxTxV - lse_BxT[..., None])
    grad_BxTxV -= jnp.where(hit_BxTxV, target_BxT[..., None], 0) + uniform_BxT[..., None]
    return grad_BxTxV, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def router_loss(routing: Routing, weights: RouterWeights) -> Array:
    """The loss that keeps the load of experts even and the logits of routers small, in nats, summed over layers.

    The first term is E * sum(f * P) over the E experts, where f is the share of the choices that an expert got and P
    its mean probability (arXiv:2101.03961, equation 4); the second is the mean of log(Z)^2, where Z is the
    normalizer of the router's softmax (arXiv:2202.08906, equation 5). Both count all tokens, padding too.
    """
    share_LxE = routing.chosen_E / jnp.sum(routing.chosen_E, -1, keepdims=True)
    probability_LxE = routing.probability_E / routing.tokens[..., None]
    balance = share_LxE.shape[-1] * jnp.sum(share_LxE * probability_LxE)
    return weights[0] * balance + weights[1] * jnp.sum(routing.square / routing.tokens)


def _token_sums(
    model, batch: Batch, label_smoothing: float, z_loss: float, router: RouterWeights | None, key: Array | None
) -> tuple[Array, LossSums]:
    inputs, named = batch_arguments(model.config, batch)
    call = model.forward if router else lambda *inputs, **named: (model(*inputs, **named), None)
    logits_BxTxV, routing = call(*inputs, key=key, **named)
    weights_BxT = batch["weights"]
    objective_BxT, nll_BxT = cross_entropy(logits_BxTxV, batch["targets"], label_smoothing, z_loss)
    sums = {"nll": jnp.sum(weights_BxT * nll_BxT), "weight": jnp.sum(weights_BxT)}
    objective = jnp.sum(weights_BxT * objective_BxT)
    if router:
        objective += sums["weight"] * router_loss(routing, router)
        if model.config.expert_routing == "capacity":
            sums["dropped"] = sums["weight"] * jnp.sum(routing.dropped) / jnp.sum(routing.chosen_E)
    return objective, jax.lax.stop_gradient(sums)


def lm_loss(
    model, batch: Batch, key: Array | None = None, *, label_smoothing: float = 0.0, z_loss: float = 0.0,
    router: RouterWeights | None = None,
) -> tuple[Array, LossSums]:
    """Next-token loss. ``batch``: inputs, targets, weights ``[B, T]``; segment_ids, positions if documents are packed.

    With ``router`` the ``router_loss`` of the batch is added to the loss of each token. Where experts have a capacity
    the sums have ``"dropped"``: the share of expert choices over capacity, times the weight.
    """
    return _token_sums(model, batch, label_smoothing, z_loss, router, key)


def seq2seq_loss(
    model, batch: Batch, key: Array | None = None, *, label_smoothing: float = 0.0, z_loss: float = 0.0,
    router: RouterWeights | None = None,
) -> tuple[Array, LossSums]:
    """Translation loss with teacher forcing, otherwise as ``lm_loss``. ``batch``: src ``[B, S]``; inputs, targets,
    weights ``[B, T]``."""
    return _token_sums(model, batch, label_smoothing, z_loss, router, key)


def make_loss(
    config: ModelConfig, *, label_smoothing: float = 0.0, z_loss: float = 0.0, router: RouterWeights | None = None
) -> Loss:
    """The loss for a model's kind: translation for ``seq2seq``, next-token prediction for the others. ``router`` is
    used where the model has experts."""
    loss = seq2seq_loss if config.kind == "seq2seq" else lm_loss
    router = router if config.experts else None
    return partial(loss, label_smoothing=label_smoothing, z_loss=z_loss, router=router)
