"""What decoding remembers: keys and values of every slot, as they are or rounded, and how attention reads them.

``StackConfig.kv_cache`` says how they are kept. Rounded ones have a scale for each slot and head, so that a slot is
written once and never looked at again to be rounded; reading multiplies the codes as they are and applies the scales to
what comes out, which gives the same result without a dense copy of the cache:

- ``int8``: symmetric, codes within 127 of zero.
- ``int4``: asymmetric, two codes a byte. Keys are turned by a Hadamard matrix first, and queries to meet them, which
  spreads the few large channels that keys have (arXiv:2402.02750, section 3) over all of them (arXiv:2404.00456).
- ``fp8``: e4m3, scaled so that the largest magnitude is the largest there is.

A model computes with what its cache would give back also where it reads a whole sequence at once, so that decoding and
scoring agree, and training learns to live with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.nn.attention.ring import MaskSpec, causal_mask
from jaxlm.nn.config import DecoderConfig, KVCache, ModelConfig, Seq2SeqConfig

_INT8_MAX, _INT4_MAX, _FP8_MAX = 127.0, 15.0, 448.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedKV:
    """Keys or values ``[..., S, K]`` as ``codes * scale + low``, rounded along K.

    A byte of int4 has the code of dimension i in its low and that of ``i + K / 2`` in its high bits. Float8 is kept as
    uint8, for XLA on CPU copies a whole array of float8 to write into it.
    """

    codes: jax.Array  # [..., S, K] int8, or uint8 with the bits of float8; int4: [..., S, K / 2] uint8, see below
    scale: jax.Array  # float16 [..., S]
    low: jax.Array | None  # float16 [..., S], what code 0 stands for; int4 only
    kind: KVCache = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        *lead, size = self.codes.shape
        return (*lead, 2 * size if self.kind == "int4" else size)


KVArray = jax.Array | QuantizedKV
KeyValue = tuple[KVArray, KVArray]  # [B, G, S, K] each


def quantize_kv(k: jax.Array, v: jax.Array, kind: KVCache) -> KeyValue:
    """Keys and values ``[..., S, K]`` as a cache of this kind keeps them. UserError where int4 meets an odd K."""
    if kind == "full":
        return k, v
    if kind == "int4":
        return _int4(_turn(k.astype(jnp.float32))), _int4(v)
    rounded = _int8 if kind == "int8" else _fp8
    return rounded(k), rounded(v)


def dequantize_kv(k: KVArray, v: KVArray) -> tuple[jax.Array, jax.Array]:
    """The keys and values that were kept, ``[..., S, K]``; float32 where they were rounded."""
    if not isinstance(k, QuantizedKV):
        return k, v
    return _turn(_dense(k)) if k.kind == "int4" else _dense(k), _dense(v)


def fake_quantize_kv(k: jax.Array, v: jax.Array, kind: KVCache) -> tuple[jax.Array, jax.Array]:
    """What a cache gives back; the gradient is that of the identity (straight through, arXiv:1308.3432)."""
    return (k, v) if kind == "full" else _round_trip(k, v, kind)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _round_trip(k: jax.Array, v: jax.Array, kind: KVCache) -> tuple[jax.Array, jax.Array]:
    kept = dequantize_kv(*quantize_kv(k, v, kind))
    return kept[0].astype(k.dtype), kept[1].astype(v.dtype)


@_round_trip.defjvp
def _straight_through(kind, primals, tangents):
    return _round_trip(*primals, kind), tangents


def _int8(x: jax.Array) -> QuantizedKV:
    scaled, scale = _scaled(x, 127)
    return QuantizedKV(jnp.round(scaled).astype(jnp.int8), scale, None, "int8")


def _fp8(x: jax.Array) -> QuantizedKV:
    scaled, scale = _scaled(x, 448)
    return QuantizedKV(jax.lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), jnp.uint8), scale, None, "fp8")


def _scaled(x: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(x), -1) / largest).astype(jnp.float16)
    return jnp.clip(x * _inverse(scale), -largest, largest), scale


def _int4(x: jax.Array) -> QuantizedKV:
    half, odd = divmod(x.shape[-1], 2)
    if odd:
        raise UserError(f"an int4 cache takes heads of an even size, and this model's are {x.shape[-1]}; use int8")
    x = x.astype(jnp.float32)
    low = jnp.min(x, -1).astype(jnp.float16)
    scale = ((jnp.max(x, -1) - low) / 15).astype(jnp.float16)
    codes = jnp.clip(jnp.round((x - low[..., None]) * _inverse(scale)), 0, 15).astype(jnp.uint8)
    return QuantizedKV(codes[..., :half] | codes[..., half:] << 4, scale, low, "int4")


def _inverse(scale: jax.Array) -> jax.Array:
    """``1 / scale`` to multiply vectors with; 0 where all of a vector is 0 (or too small for float16)."""
    scale = scale.astype(jnp.float32)[..., None]
    return jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)


def _dense(kept: QuantizedKV) -> jax.Array:
    x = jnp.concatenate(_parts(kept, jnp.float32), -1) * kept.scale.astype(jnp.float32)[..., None]
    return x if kept.low is None else x + kept.low.astype(jnp.float32)[..., None]


def scores(q_BxGxQxK: jax.Array, k_BxGxSxK: KVArray) -> jax.Array:
    """Products of queries and keys: ``[B, G, Q, S]`` float32."""
    dot = partial(jnp.einsum, "bgqk,bgsk->bgqs", preferred_element_type=jnp.float32)
    if not isinstance(k_BxGxSxK, QuantizedKV):
        return dot(q_BxGxQxK, k_BxGxSxK)
    k, dtype = k_BxGxSxK, q_BxGxQxK.dtype
    q = _turn(q_BxGxQxK) if k.kind == "int4" else q_BxGxQxK
    parts = _parts(k, dtype)
    products = sum(map(dot, jnp.split(q, len(parts), -1), parts)) * _a_slot(k.scale)
    return products if k.low is None else products + jnp.sum(q, -1, keepdims=True, dtype=jnp.float32) * _a_slot(k.low)


def mix(weights_BxGxQxS: jax.Array, v_BxGxSxK: KVArray, dtype: jnp.dtype) -> jax.Array:
    """Values summed by weights: ``[B, G, Q, K]`` of that type."""
    dot = partial(jnp.einsum, "bgqs,bgsk->bgqk")
    if not isinstance(v_BxGxSxK, QuantizedKV):
        return dot(weights_BxGxQxS.astype(v_BxGxSxK.dtype), v_BxGxSxK)
    v, weights = v_BxGxSxK, weights_BxGxQxS
    scaled = (weights * _a_slot(v.scale)).astype(dtype)
    out = jnp.concatenate([dot(scaled, part) for part in _parts(v, dtype)], -1)
    return out if v.low is None else out + jnp.sum(weights * _a_slot(v.low), -1, keepdims=True).astype(dtype)


def _a_slot(x_BxGxS: jax.Array) -> jax.Array:
    return x_BxGxS.astype(jnp.float32)[:, :, None]


def _parts(kept: QuantizedKV, dtype: jnp.dtype) -> list[jax.Array]:
    """The codes as numbers, in consecutive parts of K: put together, XLA on CPU would be slow at taking int4 apart."""
    codes = kept.codes
    if kept.kind == "int4":
        return [(codes & 15).astype(dtype), (codes >> 4).astype(dtype)]
    if kept.kind == "fp8":
        return [jax.lax.platform_dependent(codes, cpu=_fp8_by_bits, default=_fp8_by_cast).astype(dtype)]
    return [codes.astype(dtype)]


def _fp8_by_cast(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def _fp8_by_bits(codes: jax.Array) -> jax.Array:
    """By way of float16, whose exponent has one bit more and another bias: XLA on CPU takes 4 times as long to cast."""
    bits = codes.astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
    return half.astype(jnp.float32) * 2.0**8


def _turn(x: jax.Array) -> jax.Array:
    """``x`` along its last dimension by a Hadamard matrix, as large a one as divides it. Turned twice it is itself."""
    size = x.shape[-1]
    block = size & -size
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    turned = x.reshape(*x.shape[:-1], size // block, block) @ jnp.asarray(matrix * block**-0.5, x.dtype)
    return turned.reshape(x.shape)


def cache_bytes_per_token(config: ModelConfig) -> int:
    """What the cache takes for each token of a text; of a translation, for each target token and each source token.
    0 where there is no cache (the LSTM)."""
    if not isinstance(config, DecoderConfig | Seq2SeqConfig):
        return 0
    layers, stack = (
        (config.layers, config) if isinstance(config, DecoderConfig) else (config.decoder_layers, config.decoder)
    )
    one = empty((stack.n_kv_heads, 1, stack.d_head), stack.kv_cache, stack.dtype)
    return layers * sum(x.nbytes for x in jax.tree.leaves(one))


def empty(shape: tuple[int, ...], kind: KVCache, dtype: str) -> KeyValue:
    """Zeros ``[..., S, K]``, kept as this kind does."""
    dense = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    like = jax.eval_shape(partial(quantize_kv, kind=kind), dense, dense)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What decoding remembers of a batch: keys and values of the slots written so far.

    A row's sequence may begin late: slots before ``start`` are padding at the left, never looked at.

    In beam search each of the B sentences has several rows, its beams, one after the other. A beam writes slots of its
    own and looks at those of all beams of its sentence, as far as they are its past: ``writer`` says which beam wrote
    what it remembers in each slot. So giving a beam another past copies nothing, and a memory is there once a sentence.
    """

    keys: tuple[KVArray, ...]  # a layer group: [L, B, G, beams, slots, K]
    values: tuple[KVArray, ...]
    index: jax.Array  # int32 scalar, the next slot to write
    start: jax.Array  # int32 [B], each sentence's first real slot
    memory: tuple[KeyValue, ...] = ()  # cross-attention keys and values a layer group, each [L, B, G, M, K]
    memory_mask: jax.Array | None = None  # bool [B, M]
    writer: jax.Array | None = None  # int32 [B, beams, slots]; None: one beam

    @classmethod
    def empty(
        cls, layers: tuple[int, ...], batch: int, heads: int, slots: int, size: int, kind: KVCache, dtype: str
    ) -> Cache:
        """A cache of ``batch`` rows for layer groups of so many layers with ``heads`` key/value heads of ``size``."""

        layer_groups = [empty((count, batch, heads, 1, slots, size), kind, dtype) for count in layers]
        keys, values = zip(*layer_groups, strict=True)
        return cls(keys, values, jnp.int32(0), jnp.zeros(batch, jnp.int32))

    def replace(self, **changes: Any) -> Cache:
        return replace(self, **changes)

    def extend(self, count: int) -> tuple[Cache, MaskSpec, jax.Array, jax.Array]:
        """With room for ``count`` more slots: who may look at whom, as a mask too, and the positions of the new ones,
        ``[B * beams, count]``."""
        beams, slots = self.keys[0].shape[3:5]
        new_T = self.index + jnp.arange(count)
        slots_q, slots_k = jnp.tile(new_T, beams)[None], jnp.tile(jnp.arange(slots), beams)[None]
        mask = causal_mask(slots_q, slots_k) & (slots_k >= self.start[:, None])[:, None, :]
        cache = self
        if self.writer is not None:
            own = jnp.arange(beams)[:, None]
            written = jnp.broadcast_to(own, (*self.writer.shape[:2], count))
            cache = replace(self, writer=jax.lax.dynamic_update_slice(self.writer, written, (0, 0, self.index)))
            remembered_BxKxKxS = cache.writer[:, :, None] == own
            mask &= jnp.repeat(remembered_BxKxKxS.reshape(-1, beams, beams * slots), count, axis=1)
        positions = jnp.maximum(new_T - jnp.repeat(self.start, beams)[:, None], 0)
        return cache, MaskSpec(slots_q, slots_k), mask, positions

    def layer_group(self, i: int) -> LayerCache:
        """That of the first layer of a layer_group."""
        return LayerCache(self.keys[i], self.values[i], jnp.int32(0), self.index)

    def written(self, layer_groups: list[LayerCache], count: int) -> Cache:
        """With what the layers wrote: ``count`` slots."""
        keys, values = (tuple(getattr(each, name) for each in layer_groups) for name in ("keys", "values"))
        return replace(self, keys=keys, values=values, index=self.index + count)

    def fork(self, beams: int) -> Cache:
        """Every row as ``beams`` equal rows."""
        keys, values = jax.tree.map(lambda x: jnp.repeat(x, beams, 3), (self.keys, self.values))
        batch, slots = keys[0].shape[1], keys[0].shape[4]
        writer = jnp.broadcast_to(jnp.arange(beams)[:, None], (batch, beams, slots))
        return replace(self, keys=keys, values=values, writer=writer)

    def grow(self, count: int) -> Cache:
        """With room for ``count`` more slots."""

        def longer(x, axis: int):
            return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])

        keys, values = jax.tree.map(partial(longer, axis=4), (self.keys, self.values))
        return replace(self, keys=keys, values=values, writer=jax.tree.map(partial(longer, axis=2), self.writer))

    def take(self, rows_B: jax.Array) -> Cache:
        """That of some of the sentences."""
        keys, values, memory = jax.tree.map(lambda x: x[:, rows_B], (self.keys, self.values, self.memory))
        start, mask, writer = jax.tree.map(lambda x: x[rows_B], (self.start, self.memory_mask, self.writer))
        return replace(
            self, keys=keys, values=values, memory=memory, start=start, memory_mask=mask, writer=writer
        )

    def reorder(self, beams_BxK: jax.Array) -> Cache:
        """After ``fork``: beam k goes on from what the given beam of its sentence remembers."""
        return replace(self, writer=jnp.take_along_axis(self.writer, beams_BxK[:, :, None], axis=1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's place in a layer group's cache. The whole cache is carried through the scan and written in place:
    as scanned inputs and outputs it would be copied at every step."""

    keys: KVArray  # [L, B, G, beams, slots, K]
    values: KVArray
    layer: jax.Array
    index: jax.Array

    def write(self, k_RxGxTxK: KVArray, v_RxGxTxK: KVArray) -> LayerCache:
        """With T more slots, kept as those of the cache are."""

        def into(cache, new):
            by_beam = new.reshape(cache.shape[1], -1, *new.shape[1:]).swapaxes(1, 2)
            at = (self.layer, 0, 0, 0, self.index, 0)[: cache.ndim]
            return jax.lax.dynamic_update_slice(cache, by_beam[None].astype(cache.dtype), at)

        keys, values = jax.tree.map(into, (self.keys, self.values), (k_RxGxTxK, v_RxGxTxK))
        return replace(self, keys=keys, values=values)

    def read(self) -> KeyValue:
        """``[B, G, beams * slots, K]`` each."""

        def of(cache):
            layer = jax.lax.dynamic_index_in_dim(cache, self.layer, keepdims=False)
            return layer.reshape(*layer.shape[:2], -1, *layer.shape[4:])

        return jax.tree.map(of, (self.keys, self.values))
