"""Direct preference optimization (arXiv:2305.18290): the preferred one of two answers becomes more likely."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.data.batches.batch import Batch
from jaxlm.nn.models import batch_arguments
from jaxlm.training.config import DpoConfig
from jaxlm.training.objectives.loss import LossSums, cross_entropy

__all__ = ["dpo_loss"]

_FIELDS = ("inputs", "targets", "weights")


def dpo_loss(
    model: Any, batch: Batch, key: Array | None, reference: Any, *, config: DpoConfig
) -> tuple[Array, LossSums]:
    """The loss, summed over pairs.

    ``batch``: chosen_inputs, chosen_targets, chosen_weights ``[B, T]`` of the preferred answers with their prompts, and
    the same for ``rejected``, as ``data.batches.preferences`` makes them; weights are 0 outside of
    answers. With smoothing e and
    ``h = log(p(preferred) / p_ref(preferred)) - log(p(rejected) / p_ref(rejected))``::

        sigmoid: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)        (equation 7)
        ipo:     (h - 1 / (2 beta))**2                                        (arXiv:2310.12036, equation 17)

    Each pair has the weight 1, or 0 where it is padding. Sums: "nll", the loss; "accuracy", the pairs with h > 0;
    "margin", beta h; "weight", the pairs; "tokens", the tokens of all answers.
    """
    # Answers of one pair are adjacent rows, so that each device keeps the rows that it has.
    both = {name: jnp.stack([batch[f"{side}_{name}"] for side in ("chosen", "rejected")], 1) for name in _FIELDS}
    both = {name: x.reshape(-1, x.shape[-1]) for name, x in both.items()}
    wanted_Bx2 = _log_likelihood(model, both, key)
    before_Bx2 = jax.lax.stop_gradient(_log_likelihood(reference, both, None))
    h_B = (wanted_Bx2 - before_Bx2) @ jnp.array([1.0, -1.0])
    margin_B = config.beta * h_B
    if config.loss == "ipo":
        loss_B = jnp.square(h_B - 1 / (2 * config.beta))
    else:
        smoothing = config.label_smoothing
        loss_B = -(1 - smoothing) * jax.nn.log_sigmoid(margin_B) - smoothing * jax.nn.log_sigmoid(-margin_B)
    pairs_B = jnp.any(batch["chosen_weights"] > 0, -1).astype(jnp.float32)
    sums = {
        "nll": jnp.sum(pairs_B * loss_B), "weight": jnp.sum(pairs_B), "accuracy": jnp.sum(pairs_B * (h_B > 0)),
        "margin": jnp.sum(pairs_B * margin_B), "tokens": jnp.sum(both["weights"]),
    }
    return sums["nll"], jax.lax.stop_gradient(sums)


def _log_likelihood(model: Any, batch: Batch, key: Array | None) -> Array:
    """The log-likelihood of both answers of each pair, in nats: ``[B, 2]``."""
    inputs, named = batch_arguments(model.config, batch)
    _, nll_NxT = cross_entropy(model(*inputs, key=key, **named), batch["targets"])
    return -jnp.sum(batch["weights"] * nll_NxT, -1).reshape(-1, 2)
