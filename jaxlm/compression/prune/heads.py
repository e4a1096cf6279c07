"""Pruning of attention heads: a smaller dense model with fewer heads in every layer.

Which heads are removed is decided in each layer on its own; how many is the same in all layers, since one configuration
describes them all.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.compression.prune.units import InputData, importance, keep_inputs, remaining, select, top_indices
from jaxlm.compression.residual_stream import Leaves, dense_leaves, replace_leaves
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params
from jaxlm.nn.config import ModelConfig, QKNorm, Seq2SeqConfig, StackConfig

__all__ = ["head_size", "prune_heads"]


def prune_heads(
    config: ModelConfig,
    params: Params,
    share: float,
    *,
    by: Literal["group", "query"] = "group",
    mean_squares: InputData | None = None,
    means: InputData | None = None,
    grams: InputData | None = None,
    damping: float = 1e-3,
) -> tuple[ModelConfig, Params]:
    """Removes about the share ``share`` of the attention heads, in self- and cross-attention alike.

    The size of a head stays as it is, so that ``heads * head_dim`` is less than the width: only families of Hugging
    Face that have a field ``head_dim`` can hold such a model, unless the width is pruned by the same share. Where the
    bias of relative positions is shared by all layers, the same heads are removed from all layers.

    Args:
        config, params: a dense Transformer.
        share: of the heads, 0 to 1.
        by: "group" removes key/value heads with the query heads that read them; "query" removes equally many query
            heads of each key/value head.
        mean_squares, means, grams: about the inputs of the kernels ``o``; see ``units``. Without them the score of a
            head is the norm of its value kernel times its output kernel.
        damping: see ``units.refit``.

    Raises:
        UserError: when the heads of encoder and decoder differ in size, and when all heads or none would remain.
    """
    leaves = dense_leaves(config, params, "pruning heads")
    size = head_size(config)
    prefixes = [path.removesuffix("/o/kernel") for path in leaves if path.endswith("/o/kernel")]
    scores = {prefix: _head_scores(leaves, prefix, size, mean_squares, means, grams) for prefix in prefixes}
    for table in (path for path in leaves if path.endswith("/rel/table")):
        shared = [each for each in prefixes if re.match(rf"{table.split('/')[0]}/layers/\d+/attn", each)]
        total = sum((scores[each] / _total(scores[each])).sum(0) for each in shared)
        scores |= {each: jnp.broadcast_to(total, scores[each].shape) for each in shared}
    new, counts = dict(leaves), {}
    for prefix, score_LxGxR in scores.items():
        query, kv = _chosen_heads(score_LxGxR, share, by)
        _keep_heads(new, prefix, query, kv, size, config.qk_norm, means, grams, damping)
        side = prefix.split("/")[0]
        counts[side] = (query.shape[-1], kv.shape[-1])
        if (sinks := f"{prefix}/sinks") in leaves:
            new[sinks] = select(leaves[sinks], query, -1)
        if (table := f"{side}/rel/table") in leaves and prefix.endswith("/attn"):
            new[table] = select(leaves[table], query[0], -1)
    return _with_heads(config, size, counts), replace_leaves(params, new)


def _chosen_heads(score_LxGxR: jax.Array, share: float, by: Literal["group", "query"]) -> tuple[jax.Array, jax.Array]:
    """The indices of the query heads and of the key/value heads that remain."""
    groups, ratio = score_LxGxR.shape[-2:]
    if by == "group":
        kv = top_indices(score_LxGxR.sum(-1), remaining(groups, share, "key/value heads"))
        query = kv[..., None] * ratio + jnp.arange(ratio)
    else:
        each = top_indices(score_LxGxR, remaining(ratio, share, "query heads of a key/value head"))
        kv = jnp.broadcast_to(jnp.arange(groups), (*score_LxGxR.shape[:-2], groups))
        query = jnp.arange(groups)[:, None] * ratio + each
    return query.reshape(*query.shape[:-2], -1), kv


def _with_heads(config: ModelConfig, size: int, counts: dict[str, tuple[int, int]]) -> ModelConfig:
    """The configuration with heads of ``size`` dimensions, and for each side (query heads, key/value heads)."""
    changes = {"head_dim": size}
    if isinstance(config, Seq2SeqConfig):
        changes |= {"heads": counts["encoder"][0]}
        changes |= {"decoder_heads": counts["decoder"][0]} if config.decoder_heads else {}
    else:
        changes |= {"heads": counts["decoder"][0]}
    changes |= {"kv_heads": counts["decoder"][1]} if config.kv_heads else {}
    return dataclasses.replace(config, **changes)


def _total(score_LxGxR: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(score_LxGxR, (-2, -1), keepdims=True), 1e-30)


def head_size(config: StackConfig) -> int:
    """The size of the heads of both sides, as ``head_dim`` states it; raises UserError where the sides differ."""
    size = config.d_head
    if isinstance(config, Seq2SeqConfig) and config.decoder.d_head != size:
        sizes = f"{size} dimensions and those of the decoder {config.decoder.d_head}"
        raise UserError(f"heads of the encoder have {sizes}; no smaller configuration can state both")
    return size


def _head_scores(
    leaves: Leaves, prefix: str, size: int, mean_squares: InputData | None, means: InputData | None,
    grams: InputData | None,
) -> jax.Array:
    """The score of each query head by its key/value head, ``[L, G, R]``."""
    out, value = leaves[f"{prefix}/o/kernel"], leaves[f"{prefix}/v/kernel"].astype(jnp.float32)
    groups = value.shape[-1] // size
    found = importance(f"{prefix}/o/kernel", out, f"{prefix}/o/bias" in leaves, mean_squares, means, grams)
    if found is not None:
        return found.reshape(len(out), groups, -1, size).sum(-1)
    if f"{prefix}/v/bias" in leaves:
        value = jnp.concatenate([value, leaves[f"{prefix}/v/bias"][:, None]], 1)
    value = value.reshape(*value.shape[:2], groups, size)
    out = out.astype(jnp.float32).reshape(len(out), groups, -1, size, out.shape[-1])
    inner_LxGxKxK = jnp.einsum("ldgk,ldgj->lgkj", value, value)
    return jnp.einsum("lgkj,lgrkd,lgrjd->lgr", inner_LxGxKxK, out, out)  # |values @ outputs|^2


def _keep_heads(
    new: Leaves, prefix: str, query: jax.Array, kv: jax.Array, size: int, qk_norm: QKNorm, means: InputData | None,
    grams: InputData | None, damping: float,
) -> None:
    """Cuts one attention down to the heads with these indices, in place."""
    normed = qk_norm == "width"
    if qk_norm == "each_head":
        for name, heads in (("q", query), ("k", kv)):
            new[f"{prefix}/{name}_norm/scale"] = select(new[f"{prefix}/{name}_norm/scale"], heads, -2)

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
            # Where the removed features were zero, the norm over the others divides by the same mean square as before.
            factor = (before / kept.shape[-1]) ** 0.5 if normed and name != "v" else 1.0
            if factor != 1.0 and not path.endswith("_norm/bias"):
                new[path] = new[path] * (factor if "_norm/" in path else 1 / factor)
    keep_inputs(new, f"{prefix}/o", query, means, grams, damping)
