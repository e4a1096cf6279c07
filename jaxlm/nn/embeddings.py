"""From tokens to embeddings and from the last layer to logits, the same in decoders and encoder-decoders."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core.sharding import constrain
from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import Embedding, Linear, ParamKeys, softcap

__all__ = ["HasHead", "embed", "head_logits", "output_head"]


class HasHead(Protocol):
    """A model with an output head; ``head`` is None where the embedding is the head."""

    config: StackConfig
    embed: Embedding
    head: Linear | None
    logits_bias: nnx.Param | None


def embed(table: Embedding, tokens_BxT: jax.Array, config: StackConfig) -> jax.Array:
    """The embeddings of tokens ``[B, T, D]``, scaled if the model does so."""
    x_BxTxD = table(tokens_BxT, jnp.dtype(config.dtype))
    factor = (config.width**0.5 if config.embed_scale else 1.0) * config.embedding_multiplier
    return x_BxTxD if factor == 1.0 else x_BxTxD * jnp.asarray(factor, x_BxTxD.dtype)


def output_head(config: StackConfig, *, keys: ParamKeys) -> tuple[Linear | None, nnx.Param | None]:
    """The output head (None if it is the embedding), and the bias of the logits (None without one)."""
    width, rows, axes = config.width, config.vocab_size, ("embed", "vocab")
    untied = None if config.tie_embeddings else Linear(width, rows, axes, bias=False, keys=keys)
    return untied, nnx.Param(jnp.zeros(rows), axes=("vocab",)) if config.logits_bias else None


def head_logits(model: HasHead, x_BxTxD: jax.Array) -> jax.Array:
    """Logits ``[B, T, V]`` in float32, from the output of the model's decoder."""
    logits_BxTxV = model.embed.logits(x_BxTxD) if model.head is None else model.head(x_BxTxD)
    logits_BxTxV = constrain(logits_BxTxV.astype(jnp.float32), ("batch", "length", "vocab"))
    logits_BxTxV = logits_BxTxV if model.logits_bias is None else logits_BxTxV + model.logits_bias.get_value()
    if model.config.logits_multiplier != 1.0:
        logits_BxTxV = logits_BxTxV * model.config.logits_multiplier
    return softcap(logits_BxTxV, model.config.logit_softcap)
