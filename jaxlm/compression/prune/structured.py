"""Structured pruning: heads, feed-forward channels and experts go, and a smaller dense model is left.

Every function takes a configuration and its parameters and gives those of the smaller model, which runs, trains and is
saved like any other. Which units go is decided in each layer on its own; how many is the same in all, since one
configuration describes them all. See ``compression.prune.units`` for how they are judged, ``compression.prune.depth`` for layers
and ``compression.prune.width`` for the residual stream.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.compression.prune.units import Statistics, importance, largest, of, refit, remaining, select, squares
from jaxlm.compression.residual_stream import Leaves, dense_leaves, replace_leaves
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params
from jaxlm.nn.config import ModelConfig, Seq2SeqConfig, StackConfig


def prune_heads(
    config: ModelConfig,
    params: Params,
    share: float,
    *,
    by: Literal["group", "query"] = "group",
    statistics: Statistics | None = None,
    means: Statistics | None = None,
    grams: Statistics | None = None,
    damping: float = 1e-3,
) -> tuple[ModelConfig, Params]:
    """About ``share`` of the attention heads go, in self- and cross-attention alike.

    By "group", key/value heads go with the query heads that read them; by "query", each key/value head loses equally
    many query heads. A head is judged by the norm of its values' kernel times its outputs'; statistics are those of the
    kernels ``o``. Where positions are a bias a head shared by all layers, the same heads go in all layers.

    The size of a head stays as it is, so ``heads * head_dim`` is less than the width: of Hugging Face's families only
    those with a ``head_dim`` of their own can be such a model, unless the width is pruned alike.
    UserError where the encoder's and the decoder's heads differ in size.
    """
    leaves = dense_leaves(config, params, "pruning heads")
    size = head_size(config)
    prefixes = [path.removesuffix("/o/kernel") for path in leaves if path.endswith("/o/kernel")]
    scores = {prefix: _head_scores(leaves, prefix, size, statistics, means, grams) for prefix in prefixes}
    for table in (path for path in leaves if path.endswith("/rel/table")):
        shared = [each for each in prefixes if re.match(rf"{table.split('/')[0]}/layers/\d+/attn", each)]
        total = sum((scores[each] / _total(scores[each])).sum(0) for each in shared)
        scores |= {each: jnp.broadcast_to(total, scores[each].shape) for each in shared}
    new, sizes = dict(leaves), {}
    for prefix, score_LxGxR in scores.items():
        groups, ratio = score_LxGxR.shape[-2:]
        if by == "group":
            kv = largest(score_LxGxR.sum(-1), remaining(groups, share, "key/value heads"))
            query = kv[..., None] * ratio + jnp.arange(ratio)
        else:
            each = largest(score_LxGxR, remaining(ratio, share, "query heads of a key/value head"))
            kv = jnp.broadcast_to(jnp.arange(groups), (*score_LxGxR.shape[:-2], groups))
            query = jnp.arange(groups)[:, None] * ratio + each
        query = query.reshape(*query.shape[:-2], -1)
        _cut_heads(new, prefix, query, kv, size, config.qk_norm == "width", means, grams, damping)
        side = prefix.split("/")[0]
        sizes[side] = (query.shape[-1], kv.shape[-1])
        if (table := f"{side}/rel/table") in leaves and prefix.endswith("/attn"):
            new[table] = select(leaves[table], query[0], -1)
    changes = {"head_dim": size}
    if isinstance(config, Seq2SeqConfig):
        changes |= {"heads": sizes["encoder"][0]}
        changes |= {"decoder_heads": sizes["decoder"][0]} if config.decoder_heads else {}
    else:
        changes |= {"heads": sizes["decoder"][0]}
    changes |= {"kv_heads": sizes["decoder"][1]} if config.kv_heads else {}
    return dataclasses.replace(config, **changes), replace_leaves(params, new)


def _total(score_LxGxR: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(score_LxGxR, (-2, -1), keepdims=True), 1e-30)


def head_size(config: StackConfig) -> int:
    """That of both sides, to be told in ``head_dim``."""
    size = config.d_head
    if isinstance(config, Seq2SeqConfig) and config.decoder.d_head != size:
        sizes = f"{size} dimensions and those of the decoder {config.decoder.d_head}"
        raise UserError(f"heads of the encoder have {sizes}; no smaller configuration can tell both")
    return size


def _head_scores(leaves: Leaves, prefix: str, size: int, statistics, means, grams) -> jax.Array:
    """``[L, G, R]``: of each key/value head's query heads."""
    out, value = leaves[f"{prefix}/o/kernel"], leaves[f"{prefix}/v/kernel"].astype(jnp.float32)
    groups = value.shape[-1] // size
    found = importance(f"{prefix}/o/kernel", out, f"{prefix}/o/bias" in leaves, statistics, means, grams)
    if found is not None:
        return found.reshape(len(out), groups, -1, size).sum(-1)
    if f"{prefix}/v/bias" in leaves:
        value = jnp.concatenate([value, leaves[f"{prefix}/v/bias"][:, None]], 1)
    value = value.reshape(*value.shape[:2], groups, size)
    out = out.astype(jnp.float32).reshape(len(out), groups, -1, size, out.shape[-1])
    inner_LxGxKxK = jnp.einsum("ldgk,ldgj->lgkj", value, value)
    return jnp.einsum("lgkj,lgrkd,lgrjd->lgr", inner_LxGxKxK, out, out)  # |values @ outputs|^2


def _cut_heads(new: Leaves, prefix: str, query, kv, size: int, normed: bool, means, grams, damping: float) -> None:
    def features(heads):
        return (heads[..., None] * size + jnp.arange(size)).reshape(*heads.shape[:-1], -1)

    query, kv = features(query), features(kv)
    for name, kept in (("q", query), ("k", kv), ("v", kv)):
        before = new[f"{prefix}/{name}/kernel"].shape[-1]
        for path in (f"{prefix}/{name}/kernel", f"{prefix}/{name}/bias", f"{prefix}/{name}_norm/scale",
                     f"{prefix}/{name}_norm/bias"):
            if path not in new or "_norm/" in path and not normed:
                continue
            new[path] = select(new[path], kept, -1)
            # A norm over fewer features of which the others were zero: the same mean square, and the same output.
            more = (before / kept.shape[-1]) ** 0.5 if normed and name != "v" else 1.0
            if more != 1.0 and not path.endswith("_norm/bias"):
                new[path] = new[path] * (more if "_norm/" in path else 1 / more)
    _cut_inputs(new, f"{prefix}/o", query, means, grams, damping)


def _cut_inputs(new: Leaves, linear: str, kept: jax.Array, means, grams, damping: float) -> None:
    path, bias = f"{linear}/kernel", new.get(f"{linear}/bias")
    mean = None if means is None or bias is None else of(means, path)
    gram = None if grams is None else of(grams, path)
    new[path], bias = refit(new[path], bias, kept, mean, gram, damping)
    if bias is not None:
        new[f"{linear}/bias"] = bias


# Feed-forward channels and experts ------------------------------------------------------------------------------------


def prune_ffn(
    config: ModelConfig,
    params: Params,
    share: float,
    *,
    multiple: int = 1,
    statistics: Statistics | None = None,
    means: Statistics | None = None,
    grams: Statistics | None = None,
    damping: float = 1e-3,
) -> tuple[ModelConfig, Params]:
    """About ``share`` of the channels of every MLP and of every expert go; ``multiple`` divides what is left.

    A channel is judged by the product of the norms of its weights; statistics are those of the kernels ``down``.
    """
    leaves = dense_leaves(config, params, "pruning the feed-forward blocks")
    new = dict(leaves)
    for prefix in [path.removesuffix("/down/kernel") for path in leaves if path.endswith("/down/kernel")]:
        down = leaves[f"{prefix}/down/kernel"]
        left = remaining(down.shape[-2], share, "channels", multiple)
        score = importance(f"{prefix}/down/kernel", down, f"{prefix}/down/bias" in leaves, statistics, means, grams)
        kept = largest(_channel_sizes(leaves, prefix) if score is None else score, left)
        for name in ("gate", "up"):
            for path in (f"{prefix}/{name}/kernel", f"{prefix}/{name}/bias"):
                if path in leaves:
                    new[path] = select(leaves[path], kept, -1)
        _cut_inputs(new, f"{prefix}/down", kept, means, grams, damping)
    changes = {"ffn": remaining(config.d_ffn, share, "channels", multiple)}
    if config.experts:
        changes["expert_ffn"] = remaining(config.d_expert, share, "channels", multiple)
    if isinstance(config, Seq2SeqConfig) and config.decoder_ffn:
        changes["decoder_ffn"] = remaining(config.decoder_ffn, share, "channels", multiple)
    return dataclasses.replace(config, **changes), replace_leaves(params, new)


def _channel_sizes(leaves: Leaves, prefix: str) -> jax.Array:
    """``[L, F]``, or of experts ``[L, E, F]``: squared norms of the weights into and out of a channel, multiplied."""
    score = squares(leaves[f"{prefix}/down/kernel"], -1)
    for name in ("gate", "up"):
        if f"{prefix}/{name}/kernel" in leaves:
            into = squares(leaves[f"{prefix}/{name}/kernel"], -2)
            bias = leaves.get(f"{prefix}/{name}/bias")
            score = score * (into if bias is None else into + jnp.square(bias.astype(jnp.float32)))
    return score


def prune_experts(
    config: ModelConfig,
    params: Params,
    share: float,
    *,
    statistics: Statistics | None = None,
    loads: Statistics | None = None,
) -> tuple[ModelConfig, Params]:
    """About ``share`` of the experts of every layer go, with their columns of the router.

    An expert is judged by the products of the norms of its channels' weights; with the statistics of its kernel
    ``down``, by the mean square of its output. Either is multiplied by its load, the share of tokens that go to it
    (``[L, E]`` by the path of the router's kernel), where that is given. Each token still goes to
    ``experts_per_token`` of those left.
    """
    leaves = dense_leaves(config, params, "pruning experts")
    if not config.experts:
        raise UserError("this model has no experts to prune")
    left = remaining(config.experts, share, "experts")
    if left < config.experts_per_token:
        raise UserError(f"{left} experts would be left and each token goes to {config.experts_per_token}; prune fewer")
    new = dict(leaves)
    for router in [path for path in leaves if path.endswith("/router/kernel")]:
        prefix = router.removesuffix("/router/kernel") + "/experts"
        down = leaves[f"{prefix}/down/kernel"]
        score = importance(f"{prefix}/down/kernel", down, False, statistics, None, None)
        score = (_channel_sizes(leaves, prefix) if score is None else score).sum(-1)
        kept = largest(score if loads is None else score * of(loads, router), left)
        new[router] = select(leaves[router], kept, -1)
        for path in (each for each in leaves if each.startswith(f"{prefix}/")):
            new[path] = select(leaves[path], kept, -3)
    return dataclasses.replace(config, experts=left), replace_leaves(params, new)
