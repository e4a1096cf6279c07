"""The decoder-only language model."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx

from jaxlm.nn.attention.kv_cache import Cache
from jaxlm.nn.attention.paged import PagePool
from jaxlm.nn.config import DecoderConfig, layer_groups_of
from jaxlm.nn.embeddings import embed, head_logits, output_head
from jaxlm.nn.layers import Embedding, ParamKeys
from jaxlm.nn.moe.routing import Routing
from jaxlm.nn.rereading import read_again
from jaxlm.nn.stack import C, Stack

__all__ = ["DecoderLM"]


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
        length_B: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits ``[B, T, V]`` in float32: ``forward`` without the routing."""
        return self.forward(
            tokens_BxT, segment_ids_BxT=segment_ids_BxT, positions_BxT=positions_BxT, length_B=length_B, key=key
        )[0]

    def forward(
        self,
        tokens_BxT: jax.Array,
        *,
        segment_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        length_B: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """Logits ``[B, T, V]`` in float32, and what the routers did (None without experts).

        Args:
            segment_ids_BxT: numbers the documents that share a row; a token attends only to its own document.
            positions_BxT: the position of each token in its document; default: its slot in the row.
            length_B: the tokens of each row that are no padding at its end, for a config that ``rotates_by_length``.
            key: for dropout; without it there is none.
        """
        x_BxTxD, routing, _ = self.decoder(
            embed(self.embed, tokens_BxT, self.config), segment_ids_BxT=segment_ids_BxT, positions_BxT=positions_BxT,
            length_B=length_B, key=key,
        )
        return head_logits(self, x_BxTxD), routing

    def with_hidden_states(
        self,
        tokens_BxT: jax.Array,
        *,
        segment_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        length_B: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits as of a call, and the output of each layer, ``[L, B, T, D]``."""
        x_BxTxD, _, states_LxBxTxD = self.decoder(
            embed(self.embed, tokens_BxT, self.config), segment_ids_BxT=segment_ids_BxT, positions_BxT=positions_BxT,
            length_B=length_B, key=key, hidden_states=True,
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
        to_input = partial(embed, self.embed, config=self.config)
        cache = read_again(self.decoder, to_input, tokens_BxT, cache)
        x_BxTxD, cache = self.decoder.decode(to_input(tokens_BxT), cache)
        return head_logits(self, x_BxTxD), cache
