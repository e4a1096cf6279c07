"""The encoder-decoder translation model (arXiv:1706.03762)."""

from __future__ import annotations

import jax
from flax import nnx

from jaxlm.nn.attention.kv_cache import Cache
from jaxlm.nn.config import Seq2SeqConfig
from jaxlm.nn.decoder import embed, head, head_logits
from jaxlm.nn.layers import Embedding
from jaxlm.nn.moe.routing import Routing, joined
from jaxlm.nn.stack import Stack, layer_groups_of


class Seq2Seq(nnx.Module):
    """Source tokens and target prefix to the logits of the next target token."""

    def __init__(self, config: Seq2SeqConfig, *, rngs: nnx.Rngs):
        self.config = config
        std = config.width**-0.5 if config.embed_scale else 0.02
        self.embed = Embedding(config.vocab_size, config.width, ("vocab", "embed"), rngs=rngs, std=std)
        rows, axes = config.src_vocab_size, ("vocab", "embed")
        self.src_embed = Embedding(rows, config.width, axes, rngs=rngs, std=std) if rows else None
        self.encoder = Stack(config.encoder, layer_groups_of(config, "encoder"), causal=False, cross=False, rngs=rngs)
        self.decoder = Stack(config.decoder, layer_groups_of(config, "decoder"), causal=True, cross=True, rngs=rngs)
        self.head, self.logits_bias = head(config, rngs=rngs)

    def __call__(
        self,
        src_BxS: jax.Array,
        tgt_BxT: jax.Array,
        *,
        src_mask_BxS: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits ``[B, T, V]`` in float32: ``forward`` without the routing."""
        return self.forward(src_BxS, tgt_BxT, src_mask_BxS=src_mask_BxS, key=key)[0]

    def forward(
        self,
        src_BxS: jax.Array,
        tgt_BxT: jax.Array,
        *,
        src_mask_BxS: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """Logits ``[B, T, V]`` in float32, and what the routers did, where there are experts, the encoder's first.

        ``tgt`` is the decoder's input, beginning with ``bos_id``.
        The mask says which source tokens are real (default: those that are not ``pad_id``). Dropout needs a ``key``.
        """
        x_BxTxD, routing, _ = self._translate(src_BxS, tgt_BxT, src_mask_BxS, key)
        return head_logits(self, x_BxTxD), routing

    def with_states(
        self, src_BxS: jax.Array, tgt_BxT: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Logits as of a call, and what each layer of the decoder gave, ``[L, B, T, D]``."""
        x_BxTxD, _, states_LxBxTxD = self._translate(src_BxS, tgt_BxT, None, key, states=True)
        return head_logits(self, x_BxTxD), states_LxBxTxD

    def _translate(self, src_BxS, tgt_BxT, src_mask_BxS, key, *, states: bool = False):
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        src_mask_BxS = self.source_mask(src_BxS, src_mask_BxS)
        memory_BxSxD, of_encoder, _ = self._encode(src_BxS, src_mask_BxS, encoder_key)
        x_BxTxD, of_decoder, states_LxBxTxD = self.decoder(
            embed(self.embed, tgt_BxT, self.config),
            memory_BxMxD=memory_BxSxD,
            memory_mask_BxM=src_mask_BxS,
            key=decoder_key,
            states=states,
        )
        return x_BxTxD, joined([of_encoder, of_decoder]), states_LxBxTxD

    def encode(self, src_BxS: jax.Array, src_mask_BxS: jax.Array | None = None) -> jax.Array:
        """The encoder's output ``[B, S, D]``."""
        return self._encode(src_BxS, self.source_mask(src_BxS, src_mask_BxS), None)[0]

    def init_cache(self, memory_BxSxD: jax.Array, src_mask_BxS: jax.Array, length: int) -> Cache:
        """A cache for targets of at most ``length`` tokens, with the memory projected once for every layer."""
        cache = self.decoder.init_cache(memory_BxSxD.shape[0], length)
        return cache.replace(memory=self.decoder.memory_key_values(memory_BxSxD), memory_mask=src_mask_BxS)

    def decode(self, tokens_BxT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Appends T target tokens to every row: their logits ``[B, T, V]`` and the longer cache."""
        x_BxTxD, cache = self.decoder.decode(embed(self.embed, tokens_BxT, self.config), cache)
        return head_logits(self, x_BxTxD), cache

    def source_mask(self, src_BxS: jax.Array, src_mask_BxS: jax.Array | None = None) -> jax.Array:
        """Which source tokens are real, bool ``[B, S]``: as given, else those that are not padding."""
        return src_BxS != self.config.pad_id if src_mask_BxS is None else src_mask_BxS

    def embed_source(self, src_BxS: jax.Array) -> jax.Array:
        """``[B, S, D]``, from the table of the source's vocabulary."""
        return embed(self.embed if self.src_embed is None else self.src_embed, src_BxS, self.config)

    def _encode(self, src_BxS: jax.Array, src_mask_BxS: jax.Array, key: jax.Array | None):
        return self.encoder(self.embed_source(src_BxS), real_BxT=src_mask_BxS, key=key)
