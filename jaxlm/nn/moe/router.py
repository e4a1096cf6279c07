"""Chooses the experts of each token: scores of all experts, the choice among them, and the weights of the chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import Linear, ParamKeys
from jaxlm.nn.moe.routing import Routing

__all__ = ["Router"]

_LEAST_SUM = 1e-20  # of the scores of a token's experts


class Router(Linear):
    """A linear map to one logit for each expert; the softmax or sigmoid of the logits are the scores.

    A token goes to the ``experts_per_token`` experts with the highest scores. With a ``correction_bias`` the highest
    sums of score and bias count (arXiv:2408.15664), and with ``n_group`` groups only experts of the ``topk_group``
    groups whose two best experts have the largest sum (arXiv:2412.19437, section 2.1.2). The weights of the chosen are
    their scores, which ``expert_renormalize`` divides by their sum. A softmax over the logits of the chosen alone is
    the same as the softmax of all, renormalized.
    """

    def __init__(self, config: StackConfig, *, keys: ParamKeys):
        super().__init__(config.width, config.experts, ("embed", "experts"), bias=config.router_bias, keys=keys)
        self.config = config
        corrected = config.correction_bias
        self.correction_bias = nnx.Param(jnp.zeros(config.experts), axes=("experts",)) if corrected else None

    def choose(self, x_MxD: jax.Array) -> tuple[jax.Array, jax.Array, Routing]:
        """Weights (float32) and numbers of each token's experts, ``[M, K]`` each, the best first; and statistics."""
        config = self.config
        if self.correction_bias is not None:
            x_MxD = x_MxD.astype(jnp.float32)  # the bias is added to small differences
        logits_MxE = self(x_MxD).astype(jnp.float32)
        if config.router_scores == "sigmoid":
            scores_MxE = jax.nn.sigmoid(logits_MxE)
            probabilities_MxE = scores_MxE / jnp.maximum(jnp.sum(scores_MxE, -1, keepdims=True), _LEAST_SUM)
        else:
            scores_MxE = probabilities_MxE = jax.nn.softmax(logits_MxE, -1)
        _, experts_MxK = jax.lax.top_k(self._ranking(scores_MxE), config.experts_per_token)
        weights_MxK = jnp.take_along_axis(scores_MxE, experts_MxK, -1)
        if config.expert_renormalize:
            weights_MxK /= jnp.maximum(jnp.sum(weights_MxK, -1, keepdims=True), _LEAST_SUM)
        if config.routed_scaling_factor != 1:
            weights_MxK *= config.routed_scaling_factor
        routing = Routing(
            tokens=jnp.asarray(len(x_MxD), jnp.float32),
            chosen_E=jnp.zeros(config.experts).at[experts_MxK.reshape(-1)].add(1.0),
            probability_E=jnp.sum(probabilities_MxE, 0),
            square=jnp.sum(jnp.square(jax.nn.logsumexp(logits_MxE, -1))),
            dropped=jnp.zeros(()),
        )
        return weights_MxK, experts_MxK, routing

    def _ranking(self, scores_MxE: jax.Array) -> jax.Array:
        """By what experts are chosen, the highest first."""
        config = self.config
        ranking_MxE = scores_MxE
        if self.correction_bias is not None:
            ranking_MxE = ranking_MxE + self.correction_bias.get_value().astype(jnp.float32)
        if config.n_group == 1:
            return ranking_MxE
        groups_MxNxE = ranking_MxE.reshape(len(scores_MxE), config.n_group, -1)
        best_MxN = jnp.sum(jax.lax.top_k(groups_MxNxE, 2)[0], -1)
        _, kept_MxG = jax.lax.top_k(best_MxN, config.topk_group)
        is_kept_MxN = jnp.any(jax.nn.one_hot(kept_MxG, config.n_group, dtype=bool), 1)
        return jnp.where(is_kept_MxN[..., None], groups_MxNxE, -jnp.inf).reshape(scores_MxE.shape)
