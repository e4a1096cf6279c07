"""Cross-entropy, summed over tokens so that sharding and accumulation stay exact.

A loss is a function ``(model, batch, key) -> (objective, sums)``: ``objective`` is the quantity to differentiate,
``sums`` holds ``"nll"`` (plain negative log-likelihood in nats, whatever the objective adds) and ``"weight"`` (how many
tokens count). All three are sums over the batch; whoever divides does so once, by the total weight of a step.
``key`` is a PRNG key for dropout, or None for a deterministic forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.core.sharding import ways
from jaxlm.nn.config import ModelConfig

__all__ = ["Batch", "Loss", "Sums", "cross_entropy", "lm_loss", "make_loss", "seq2seq_loss"]

Batch = dict[str, Array]
Sums = dict[str, Array]
Loss = Callable[[Any, Batch, Array | None], tuple[Array, Sums]]


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
    target_BxT = _chosen(logits_BxTxV, targets_BxT)
    nll_BxT = lse_BxT - target_BxT
    objective_BxT = nll_BxT
    if label_smoothing:
        objective_BxT += label_smoothing * (target_BxT - jnp.mean(logits_BxTxV, axis=-1))
    if z_loss:
        objective_BxT += z_loss * lse_BxT**2
    return objective_BxT, nll_BxT, lse_BxT


def _chosen(logits_BxTxV, targets_BxT):
    """The logits of the targets. A vocabulary split over devices is summed behind a mask, which GSPMD splits too under
    any mesh; it cannot split an indexed lookup in all of them."""
    if ways("vocab") == 1:
        return jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    hit_BxTxV = jax.lax.broadcasted_iota(jnp.int32, logits_BxTxV.shape, 2) == targets_BxT[..., None]
    return jnp.sum(jnp.where(hit_BxTxV, logits_BxTxV, 0), -1)


def _cross_entropy_fwd(logits_BxTxV, targets_BxT, label_smoothing, z_loss):
    objective_BxT, nll_BxT, lse_BxT = _forward(logits_BxTxV, targets_BxT, label_smoothing, z_loss)
    return (objective_BxT, nll_BxT), (logits_BxTxV, targets_BxT, lse_BxT)


def _cross_entropy_bwd(label_smoothing, z_loss, residuals, cotangents):
    logits_BxTxV, targets_BxT, lse_BxT = residuals
    objective_BxT, nll_BxT = cotangents
    softmax_BxT = nll_BxT + objective_BxT * (1 + 2 * z_loss * lse_BxT)  # what multiplies each of the three terms
    target_BxT = nll_BxT + objective_BxT * (1 - label_smoothing)
    uniform_BxT = objective_BxT * (label_smoothing / logits_BxTxV.shape[-1])
    hit_BxTxV = jax.lax.broadcasted_iota(jnp.int32, logits_BxTxV.shape, 2) == targets_BxT[..., None]
    grad_BxTxV = softmax_BxT[..., None] * jnp.exp(logits_BxTxV - lse_BxT[..., None])
    grad_BxTxV -= jnp.where(hit_BxTxV, target_BxT[..., None], 0) + uniform_BxT[..., None]
    return grad_BxTxV, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _summed(logits_BxTxV: Array, batch: Batch, label_smoothing: float, z_loss: float) -> tuple[Array, Sums]:
    weights_BxT = batch["weights"]
    objective_BxT, nll_BxT = cross_entropy(logits_BxTxV, batch["targets"], label_smoothing, z_loss)
    sums = {"nll": jnp.sum(weights_BxT * nll_BxT), "weight": jnp.sum(weights_BxT)}
    return jnp.sum(weights_BxT * objective_BxT), jax.lax.stop_gradient(sums)


def lm_loss(
    model, batch: Batch, key: Array | None = None, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Sums]:
    """Next-token loss. ``batch``: inputs, targets, weights ``[B, T]``; segments, positions if documents are packed."""
    packing = {f"{name}_BxT": batch[name] for name in ("segments", "positions") if name in batch}
    return _summed(model(batch["inputs"], key=key, **packing), batch, label_smoothing, z_loss)


def seq2seq_loss(
    model, batch: Batch, key: Array | None = None, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Sums]:
    """Teacher-forced translation loss. ``batch``: src ``[B, S]``; inputs, targets, weights ``[B, T]``."""
    return _summed(model(batch["src"], batch["inputs"], key=key), batch, label_smoothing, z_loss)


def make_loss(config: ModelConfig, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Loss:
    """The loss that fits a model's kind: translation for ``seq2seq``, next-token for the rest."""
    loss = seq2seq_loss if config.kind == "seq2seq" else lm_loss
    return partial(loss, label_smoothing=label_smoothing, z_loss=z_loss)
