"""Pruning of feed-forward channels and of experts: a smaller dense model with fewer of them in every layer.

Which ones are removed is decided in each layer on its own; how many is the same in all layers, since one configuration
describes them all.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.compression.prune.units import (
    InputData,
    data_of,
    importance,
    keep_inputs,
    remaining,
    select,
    squared_norm,
    top_indices,
)
from jaxlm.compression.residual_stream import Leaves, dense_leaves, replace_leaves
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params
from jaxlm.nn.config import ModelConfig, Seq2SeqConfig

__all__ = ["prune_experts", "prune_ffn"]


def prune_ffn(
    config: ModelConfig,
    params: Params,
    share: float,
    *,
    multiple: int = 1,
    mean_squares: InputData | None = None,
    means: InputData | None = None,
    grams: InputData | None = None,
    damping: float = 1e-3,
) -> tuple[ModelConfig, Params]:
    """Removes about the share ``share`` of the channels of every feed-forward block and of every expert.

    Args:
        config, params: a dense Transformer.
        share: of the channels, 0 to 1.
        multiple: divides the number of channels that remain.
        mean_squares, means, grams: about the inputs of the kernels ``down``; see ``units``. Without them the score of a
            channel is the product of the norms of its weights.
        damping: see ``units.refit``.

    Raises:
        UserError: when all channels or none would remain.
    """
    leaves = dense_leaves(config, params, "pruning the feed-forward blocks")
    new = dict(leaves)
    for prefix in [path.removesuffix("/down/kernel") for path in leaves if path.endswith("/down/kernel")]:
        down = leaves[f"{prefix}/down/kernel"]
        left = remaining(down.shape[-2], share, "channels", multiple)
        score = importance(f"{prefix}/down/kernel", down, f"{prefix}/down/bias" in leaves, mean_squares, means, grams)
        kept = top_indices(_channel_scores(leaves, prefix) if score is None else score, left)
        for name in ("gate", "up"):
            for path in (f"{prefix}/{name}/kernel", f"{prefix}/{name}/bias"):
                if path in leaves:
                    new[path] = select(leaves[path], kept, -1)
        keep_inputs(new, f"{prefix}/down", kept, means, grams, damping)
    changes = {"ffn": remaining(config.d_ffn, share, "channels", multiple)}
    if config.experts:
        changes["expert_ffn"] = remaining(config.d_expert, share, "channels", multiple)
        if config.shared_expert_ffn:
            changes["shared_expert_ffn"] = remaining(config.shared_expert_ffn, share, "channels", multiple)
    if isinstance(config, Seq2SeqConfig) and config.decoder_ffn:
        changes["decoder_ffn"] = remaining(config.decoder_ffn, share, "channels", multiple)
    return dataclasses.replace(config, **changes), replace_leaves(params, new)


def _channel_scores(leaves: Leaves, prefix: str) -> jax.Array:
    """The product of the squared norms of the weights into and out of each channel, ``[L, F]``; ``[L, E, F]`` of
    experts."""
    score = squared_norm(leaves[f"{prefix}/down/kernel"], -1)
    for name in ("gate", "up"):
        if f"{prefix}/{name}/kernel" in leaves:
            into = squared_norm(leaves[f"{prefix}/{name}/kernel"], -2)
            bias = leaves.get(f"{prefix}/{name}/bias")
            score = score * (into if bias is None else into + jnp.square(bias.astype(jnp.float32)))
    return score


def prune_experts(
    config: ModelConfig,
    params: Params,
    share: float,
    *,
    mean_squares: InputData | None = None,
    loads: InputData | None = None,
) -> tuple[ModelConfig, Params]:
    """Removes about the share ``share`` of the experts of every layer, with their columns of the router.

    Each token still goes to ``experts_per_token`` of the experts that remain.

    Args:
        config, params: a dense mixture of experts.
        share: of the experts, 0 to 1.
        mean_squares: about the inputs of the kernels ``down``: the score of an expert is the mean square of its output.
            Without them it is the sum over channels of the products of the norms of their weights.
        loads: the share of tokens that go to each expert, ``[L, E]`` by the path of the router's kernel, which
            multiplies the score.

    Raises:
        UserError: when there are no experts, and when fewer than ``experts_per_token`` would remain.
    """
    leaves = dense_leaves(config, params, "pruning experts")
    if not config.experts:
        raise UserError("this model has no experts to prune")
    if config.n_group > 1:
        raise UserError("the experts of this model are in groups of equal size (n_group), which pruning would not keep")
    left = remaining(config.experts, share, "experts")
    if left < config.experts_per_token:
        raise UserError(f"{left} experts would be left and each token goes to {config.experts_per_token}; prune fewer")
    new = dict(leaves)
    for router in [path for path in leaves if path.endswith("/router/kernel")]:
        prefix = router.removesuffix("/router/kernel") + "/experts"
        down = leaves[f"{prefix}/down/kernel"]
        score = importance(f"{prefix}/down/kernel", down, False, mean_squares, None, None)
        score = (_channel_scores(leaves, prefix) if score is None else score).sum(-1)
        kept = top_indices(score if loads is None else score * data_of(loads, router), left)
        for path in (each for each in leaves if each.startswith(router.removesuffix("kernel"))):
            new[path] = select(leaves[path], kept, -1)
        for path in (each for each in leaves if each.startswith(f"{prefix}/")):
            new[path] = select(leaves[path], kept, -2 if path.endswith("/bias") else -3)
    return dataclasses.replace(config, experts=left), replace_leaves(params, new)
