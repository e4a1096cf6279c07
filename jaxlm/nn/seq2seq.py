"""The encoder-decoder translation model (arXiv:1706.03762)."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx

from jaxlm.nn.attention.kv_cache import Cache
from jaxlm.nn.config import Seq2SeqConfig, layer_groups_of
from jaxlm.nn.embeddings import embed, head_logits, output_head
from jaxlm.nn.layers import Embedding, ParamKeys
from jaxlm.nn.moe.routing import Routing, concat_routings
from jaxlm.nn.rereading import read_again
from jaxlm.nn.stack import Stack

__all__ = ["Seq2Seq"]


class Seq2Seq(nnx.Module):
    """From source tokens and the beginning of the target to the logits of the target tokens that follow."""

    def __init__(self, config: Seq2SeqConfig, *, keys: ParamKeys):
        self.config = config
        std = config.width**-0.5 if config.embed_scale else 0.02
        self.embed = Embedding(config.vocab_size, config.width, ("vocab", "embed"), keys=keys, std=std)
        rows, axes = config.src_vocab_size, ("vocab", "embed")
        self.src_embed = Embedding(rows, config.width, axes, keys=keys, std=std) if rows else None
        self.encoder = Stack(config.encoder, layer_groups_of(config, "encoder"), causal=False, cross=False, keys=keys)
        self.decoder = Stack(config.decoder, layer_groups_of(config, "decoder"), causal=True, cross=True, keys=keys)
        self.head, self.logits_bias = output_head(config, keys=keys)

    def __call__(
        self,
        src_BxS: jax.Array,
        tgt_BxT: jax.Array,
        *,
        src_mask_BxS: jax.Array | None = None,
        length_B: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits ``[B, T, V]`` in float32: ``forward`` without the routing."""
        return self.forward(src_BxS, tgt_BxT, src_mask_BxS=src_mask_BxS, length_B=length_B, key=key)[0]

    def forward(
        self,
        src_BxS: jax.Array,
        tgt_BxT: jax.Array,
        *,
        src_mask_BxS: jax.Array | None = None,
        length_B: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """Logits ``[B, T, V]`` in float32, and what the routers did, the encoder's first (None without experts).

        Args:
            tgt_BxT: the decoder's input, which begins with ``bos_id``.
            src_mask_BxS: false for source tokens that are padding; default: those that are ``pad_id``.
            length_B: the tokens of each target that are no padding, for a config that ``rotates_by_length``.
            key: for dropout; without it there is none.
        """
        x_BxTxD, routing, _ = self._encode_decode(src_BxS, tgt_BxT, src_mask_BxS, length_B, key)
        return head_logits(self, x_BxTxD), routing

    def with_hidden_states(
        self, src_BxS: jax.Array, tgt_BxT: jax.Array, *, length_B: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits as of a call, and the output of each layer of the decoder, ``[L, B, T, D]``."""
        x_BxTxD, _, states_LxBxTxD = self._encode_decode(src_BxS, tgt_BxT, None, length_B, key, hidden_states=True)
        return head_logits(self, x_BxTxD), states_LxBxTxD

    def _encode_decode(self, src_BxS, tgt_BxT, src_mask_BxS, length_B, key, *, hidden_states: bool = False):
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        src_mask_BxS = self.source_mask(src_BxS, src_mask_BxS)
        memory_BxSxD, encoder_routing, _ = self._encode(src_BxS, src_mask_BxS, encoder_key)
        x_BxTxD, decoder_routing, states_LxBxTxD = self.decoder(
            embed(self.embed, tgt_BxT, self.config),
            length_B=length_B,
            memory_BxMxD=memory_BxSxD,
            memory_mask_BxM=src_mask_BxS,
            key=decoder_key,
            hidden_states=hidden_states,
        )
        return x_BxTxD, concat_routings([encoder_routing, decoder_routing]), states_LxBxTxD

    def encode(self, src_BxS: jax.Array, src_mask_BxS: jax.Array | None = None) -> jax.Array:
        """The encoder's output ``[B, S, D]``."""
        return self._encode(src_BxS, self.source_mask(src_BxS, src_mask_BxS), None)[0]

    def init_cache(self, memory_BxSxD: jax.Array, src_mask_BxS: jax.Array, length: int) -> Cache:
        """A cache for targets of at most ``length`` tokens, with keys and values of the encoder's output for every
        layer."""
        cache = self.decoder.init_cache(memory_BxSxD.shape[0], length)
        return cache.replace(memory=self.decoder.memory_key_values(memory_BxSxD), memory_mask=src_mask_BxS)

    def decode(self, tokens_BxT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Appends T target tokens to every row: their logits ``[B, T, V]``, and the cache with them."""
        to_input = partial(embed, self.embed, config=self.config)
        cache = read_again(self.decoder, to_input, tokens_BxT, cache)
        x_BxTxD, cache = self.decoder.decode(to_input(tokens_BxT), cache)
        return head_logits(self, x_BxTxD), cache

    def source_mask(self, src_BxS: jax.Array, src_mask_BxS: jax.Array | None = None) -> jax.Array:
        """Bool ``[B, S]``, false for padding: as given, else where the token is ``pad_id``."""
        return src_BxS != self.config.pad_id if src_mask_BxS is None else src_mask_BxS

    def embed_source(self, src_BxS: jax.Array) -> jax.Array:
        """The embeddings of source tokens, ``[B, S, D]``."""
        return embed(self.embed if self.src_embed is None else self.src_embed, src_BxS, self.config)

    def _encode(self, src_BxS: jax.Array, src_mask_BxS: jax.Array, key: jax.Array | None):
        return self.encoder(self.embed_source(src_BxS), real_BxT=src_mask_BxS, key=key)
