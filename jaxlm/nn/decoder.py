"""The decoder-only language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core.sharding import constrain
from jaxlm.nn.attention.kv_cache import Cache
from jaxlm.nn.attention.paged import PagePool
from jaxlm.nn.config import DecoderConfig, StackConfig, layer_groups_of
from jaxlm.nn.layers import Embedding, Linear, ParamKeys, softcap
from jaxlm.nn.moe.routing import Routing
from jaxlm.nn.stack import C, Stack

if TYPE_CHECKING:
    from jaxlm.nn.seq2seq import Seq2Seq

__all__ = ["DecoderLM", "embed", "head_logits", "output_head"]


class DecoderLM(nnx.Module):
    """From tokens to the logits of the tokens that follow them. Every variant is configuration."""

    def __init__(self, config: DecoderConfig, *, keys: ParamKeys):
        self.config = config
        std = config.width**-0.5 if config.embed_scale else 0.02
        self.embed = Embedding(config.vocab_size, config.width, ("vocab", "embed"), keys=keys, std=std)
        self.decoder = Stack(config, layer_groups_of(config, "decoder"), causal=True, cross=False, keys=keys)
        self.head, self.logits_bias = output_head(config, keys=keys)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        *,
        segment_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits ``[B, T, V]`` in float32: ``forward`` without the routing."""
        return self.forward(
            tokens_BxT, segment_ids_BxT=segment_ids_BxT, positions_BxT=positions_BxT, key=key
        )[0]

    def forward(
        self,
        tokens_BxT: jax.Array,
        *,
        segment_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """Logits ``[B, T, V]`` in float32, and what the routers did (None without experts).

        Args:
            segment_ids_BxT: numbers the documents that share a row; a token attends only to its own document.
            positions_BxT: the position of each token in its document; default: its slot in the row.
            key: for dropout; without it there is none.
        """
        x_BxTxD, routing, _ = self.decoder(
            embed(self.embed, tokens_BxT, self.config), segment_ids_BxT=segment_ids_BxT, positions_BxT=positions_BxT,
            key=key,
        )
        return head_logits(self, x_BxTxD), routing

    def with_hidden_states(
        self,
        tokens_BxT: jax.Array,
        *,
        segment_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits as of a call, and the output of each layer, ``[L, B, T, D]``."""
        x_BxTxD, _, states_LxBxTxD = self.decoder(
            embed(self.embed, tokens_BxT, self.config), segment_ids_BxT=segment_ids_BxT, positions_BxT=positions_BxT,
            key=key, hidden_states=True,
        )
        return head_logits(self, x_BxTxD), states_LxBxTxD

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for ``batch`` rows of at most ``length`` tokens."""
        return self.decoder.init_cache(batch, length)

    def init_pages(self, pages: int, size: int) -> PagePool:
        """An empty pool of ``pages`` pages with ``size`` tokens each (``nn.attention.paged``)."""
        return self.decoder.init_pages(pages, size)

    def decode(self, tokens_BxT: jax.Array, cache: C) -> tuple[jax.Array, C]:
        """Appends T tokens to every row: their logits ``[B, T, V]``, and the cache with them."""
        x_BxTxD, cache = self.decoder.decode(embed(self.embed, tokens_BxT, self.config), cache)
        return head_logits(self, x_BxTxD), cache


def embed(table: Embedding, tokens_BxT: jax.Array, config: StackConfig) -> jax.Array:
    """The embeddings of tokens ``[B, T, D]``, scaled if the model does so."""
    x_BxTxD = table(tokens_BxT, jnp.dtype(config.dtype))
    return x_BxTxD * jnp.asarray(config.width**0.5, x_BxTxD.dtype) if config.embed_scale else x_BxTxD


def output_head(config: StackConfig, *, keys: ParamKeys) -> tuple[Linear | None, nnx.Param | None]:
    """The output head (None if it is the embedding), and the bias of the logits (None without one)."""
    width, rows, axes = config.width, config.vocab_size, ("embed", "vocab")
    untied = None if config.tie_embeddings else Linear(width, rows, axes, bias=False, keys=keys)
    return untied, nnx.Param(jnp.zeros(rows), axes=("vocab",)) if config.logits_bias else None


def head_logits(model: DecoderLM | Seq2Seq, x_BxTxD: jax.Array) -> jax.Array:
    """Logits ``[B, T, V]`` in float32, from the output of the model's decoder."""
    logits_BxTxV = model.embed.logits(x_BxTxD) if model.head is None else model.head(x_BxTxD)
    logits_BxTxV = constrain(logits_BxTxV.astype(jnp.float32), ("batch", "length", "vocab"))
    logits_BxTxV = logits_BxTxV if model.logits_bias is None else logits_BxTxV + model.logits_bias.get_value()
    return softcap(logits_BxTxV, model.config.logit_softcap)
