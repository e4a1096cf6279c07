"""The cache of decoding: keys and values of every slot written so far, one contiguous array for each layer group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn.attention.masks import MaskSpec, causal_mask
from jaxlm.nn.attention.quantized_kv import KeyValue, KVArray, empty_kv
from jaxlm.nn.config import DecoderConfig, KVCache, ModelConfig, Seq2SeqConfig

__all__ = ["Cache", "LayerCache", "cache_bytes_per_token"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of a batch.

    A row may be padded at the left: slots before ``start`` are padding, and no query attends to them.

    In beam search each of the B sentences has several rows, its beams, one after the other. A beam writes slots of its
    own and attends to those slots of all beams of its sentence that are its past: ``writer`` says which beam wrote the
    past of a beam in each slot. So giving a beam another past copies nothing, and the encoder's memory is stored once a
    sentence.
    """

    keys: tuple[KVArray, ...]  # for each layer group [L, B, G, beams, slots, K]
    values: tuple[KVArray, ...]
    index: jax.Array  # int32 scalar, the next slot to write
    start: jax.Array  # int32 [B], the first slot of each sentence that is not padding
    memory: tuple[KeyValue, ...] = ()  # cross-attention keys and values, for each layer group [L, B, G, M, K] each
    memory_mask: jax.Array | None = None  # bool [B, M]
    writer: jax.Array | None = None  # int32 [B, beams, slots]; None: one beam
    # Of a model that ``rotates_by_length`` (see ``nn.rereading``), otherwise None:
    tokens: jax.Array | None = None  # int32 [B, beams, slots]: what each beam wrote
    rotary_length: jax.Array | None = None  # int32 [B]: keys are rotated as those of a text of this length

    @classmethod
    def empty(
        cls, layers: tuple[int, ...], batch: int, heads: int, slots: int, size: int, kind: KVCache, dtype: str
    ) -> Cache:
        """A cache of ``batch`` rows for layer groups of these lengths, with ``heads`` key/value heads of ``size``."""
        groups = [empty_kv((count, batch, heads, 1, slots, size), kind, dtype) for count in layers]
        keys, values = zip(*groups, strict=True)
        return cls(keys, values, jnp.int32(0), jnp.zeros(batch, jnp.int32))

    def replace(self, **changes: Any) -> Cache:
        return replace(self, **changes)

    def with_text(self) -> Cache:
        """An empty cache that also keeps the tokens."""
        batch, beams, slots = self.keys[0].shape[1], *self.keys[0].shape[3:5]
        tokens = jnp.zeros((batch, beams, slots), jnp.int32)
        return replace(self, tokens=tokens, rotary_length=jnp.zeros(batch, jnp.int32))

    def append_text(self, tokens_RxT: jax.Array) -> Cache:
        """The cache with the tokens, not yet the keys and values, of the next slots."""
        new = tokens_RxT.reshape(*self.tokens.shape[:2], -1)
        cache = self._own(tokens_RxT.shape[1])
        return replace(cache, tokens=jax.lax.dynamic_update_slice(self.tokens, new, (0, 0, self.index)))

    def text(self) -> jax.Array:
        """The tokens of the past of every row, ``[B * beams, slots]``."""
        tokens = self.tokens if self.writer is None else jnp.take_along_axis(self.tokens, self.writer, axis=1)
        return tokens.reshape(-1, tokens.shape[-1])

    def at_start(self, rotary_length_B: jax.Array) -> Cache:
        """The cache with its text, in which every beam is about to write all slots itself."""
        start = replace(self, index=jnp.int32(0), rotary_length=rotary_length_B)
        return replace(start._own(self.tokens.shape[2]), tokens=self.text().reshape(self.tokens.shape))

    @property
    def rotary_length_Rx1(self) -> jax.Array | None:
        """``rotary_length`` of every row, ``[B * beams, 1]``."""
        if self.rotary_length is None:
            return None
        return jnp.repeat(self.rotary_length, self.tokens.shape[1])[:, None]

    def extend(self, count: int) -> tuple[Cache, MaskSpec, jax.Array, jax.Array]:
        """Makes room for ``count`` more slots.

        Returns:
            The cache, the mask of the new slots as a spec and as an array, and their positions ``[B * beams, count]``.
        """
        beams, slots = self.keys[0].shape[3:5]
        new_T = self.index + jnp.arange(count)
        slots_q, slots_k = jnp.tile(new_T, beams)[None], jnp.tile(jnp.arange(slots), beams)[None]
        mask = causal_mask(slots_q, slots_k) & (slots_k >= self.start[:, None])[:, None, :]
        cache = self._own(count)
        if cache.writer is not None:
            is_past_BxKxKxS = cache.writer[:, :, None] == jnp.arange(beams)[:, None]
            mask &= jnp.repeat(is_past_BxKxKxS.reshape(-1, beams, beams * slots), count, axis=1)
        positions = jnp.maximum(new_T - jnp.repeat(self.start, beams)[:, None], 0)
        return cache, MaskSpec(slots_q, slots_k), mask, positions

    def _own(self, count: int) -> Cache:
        """The cache in which every beam writes the next ``count`` slots of its past itself."""
        if self.writer is None:
            return self
        own = jnp.broadcast_to(jnp.arange(self.writer.shape[1])[:, None], (*self.writer.shape[:2], count))
        return replace(self, writer=jax.lax.dynamic_update_slice(self.writer, own, (0, 0, self.index)))

    def first_layer(self, group: int) -> LayerCache:
        """The cache of the first layer of a layer group."""
        return LayerCache(self.keys[group], self.values[group], jnp.int32(0), self.index)

    def with_groups(self, groups: list[LayerCache], count: int) -> Cache:
        """The cache after every layer group wrote ``count`` slots."""
        keys, values = tuple(each.keys for each in groups), tuple(each.values for each in groups)
        return replace(self, keys=keys, values=values, index=self.index + count)

    def fork(self, beams: int) -> Cache:
        """Every row as ``beams`` equal rows."""
        keys, values = jax.tree.map(lambda x: jnp.repeat(x, beams, 3), (self.keys, self.values))
        batch, slots = keys[0].shape[1], keys[0].shape[4]
        writer = jnp.broadcast_to(jnp.arange(beams)[:, None], (batch, beams, slots))
        tokens = jax.tree.map(lambda x: jnp.repeat(x, beams, 1), self.tokens)
        return replace(self, keys=keys, values=values, writer=writer, tokens=tokens)

    def grow(self, count: int) -> Cache:
        """The same content with ``count`` more slots."""

        def longer(x, axis: int):
            return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])

        keys, values = jax.tree.map(partial(longer, axis=4), (self.keys, self.values))
        writer, tokens = jax.tree.map(partial(longer, axis=2), (self.writer, self.tokens))
        return replace(self, keys=keys, values=values, writer=writer, tokens=tokens)

    def take(self, rows_B: jax.Array) -> Cache:
        """The cache of some of the sentences."""
        keys, values, memory = jax.tree.map(lambda x: x[:, rows_B], (self.keys, self.values, self.memory))
        names = ("start", "memory_mask", "writer", "tokens", "rotary_length")
        arrays = jax.tree.map(lambda x: x[rows_B], {name: getattr(self, name) for name in names})
        return replace(self, keys=keys, values=values, memory=memory, **arrays)

    def reorder(self, beams_BxK: jax.Array) -> Cache:
        """After ``fork``: beam k continues from the past of the given beam of its sentence."""
        return replace(self, writer=jnp.take_along_axis(self.writer, beams_BxK[:, :, None], axis=1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer: its index in the arrays of its layer group.

    ``lax.scan`` carries the whole arrays and a layer writes into them in place. As scanned inputs and outputs they
    would be copied at every step.
    """

    keys: KVArray  # [L, B, G, beams, slots, K]
    values: KVArray
    layer: jax.Array  # int32 scalar
    index: jax.Array  # int32 scalar, the next slot to write

    def write(self, k_RxGxTxK: KVArray, v_RxGxTxK: KVArray) -> LayerCache:
        """The cache with T more slots of every row, which come in the format of the cache."""

        def into(cache, new):
            by_beam = new.reshape(cache.shape[1], -1, *new.shape[1:]).swapaxes(1, 2)
            at = (self.layer, 0, 0, 0, self.index, 0)[: cache.ndim]
            return jax.lax.dynamic_update_slice(cache, by_beam[None].astype(cache.dtype), at)

        keys, values = jax.tree.map(into, (self.keys, self.values), (k_RxGxTxK, v_RxGxTxK))
        return replace(self, keys=keys, values=values)

    def read(self) -> KeyValue:
        """Keys and values of the layer, ``[B, G, beams * slots, K]`` each."""

        def of_layer(cache):
            layer = jax.lax.dynamic_index_in_dim(cache, self.layer, keepdims=False)
            return layer.reshape(*layer.shape[:2], -1, *layer.shape[4:])

        return jax.tree.map(of_layer, (self.keys, self.values))


def cache_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of the cache for each token of a text; for a translation, for each target and each source token.

    0 for a model without a cache (the LSTM).
    """
    if not isinstance(config, DecoderConfig | Seq2SeqConfig):
        return 0
    layers, stack = (
        (config.layers, config) if isinstance(config, DecoderConfig) else (config.decoder_layers, config.decoder)
    )
    one = empty_kv((stack.n_kv_heads, 1, stack.d_head), stack.kv_cache, stack.dtype)
    return layers * sum(x.nbytes for x in jax.tree.leaves(one))
