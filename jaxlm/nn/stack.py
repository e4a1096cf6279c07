"""A stack of Transformer layers: encoder or decoder, full sequence or cached, scanned in segments.

A segment is a run of layers of one shape and one representation. It is a ``Block`` whose every parameter has a
leading layer dimension; ``lax.scan`` walks it, so that compile time does not grow with depth.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core.sharding import constrain
from jaxlm.nn.attention import Attention, causal_mask, window_mask
from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import Embedding, Mlp, Norm, dropout, split_key
from jaxlm.nn.positions import RelativeBias, rotary_angles, sinusoids

KeyValue = tuple[jax.Array, jax.Array]
ACTIVATION_AXES = ("batch", "length", "features")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What decoding remembers of a batch: keys and values of the slots written so far.

    A row's sequence may begin late: slots before ``start`` are padding at the left, never looked at.

    In beam search each of the B sentences has several rows, its beams, one after the other. A beam writes slots of its
    own and looks at those of all beams of its sentence, as far as they are its past: ``writer`` says which beam wrote
    what it remembers in each slot. So giving a beam another past copies nothing, and a memory is there once a sentence.
    """

    keys: tuple[jax.Array, ...]  # a segment: [L, B, G, beams, slots, K]
    values: tuple[jax.Array, ...]
    index: jax.Array  # int32 scalar, the next slot to write
    start: jax.Array  # int32 [B], each sentence's first real slot
    memory: tuple[KeyValue, ...] = ()  # cross-attention keys and values a segment, each [L, B, G, M, K]
    memory_mask: jax.Array | None = None  # bool [B, M]
    writer: jax.Array | None = None  # int32 [B, beams, slots]; None: one beam

    def replace(self, **changes: Any) -> Cache:
        return replace(self, **changes)

    def fork(self, beams: int) -> Cache:
        """Every row as ``beams`` equal rows."""
        keys, values = jax.tree.map(lambda x: jnp.repeat(x, beams, 3), (self.keys, self.values))
        batch, slots = keys[0].shape[1], keys[0].shape[4]
        writer = jnp.broadcast_to(jnp.arange(beams)[:, None], (batch, beams, slots))
        return replace(self, keys=keys, values=values, writer=writer)

    def reorder(self, beams_BxK: jax.Array) -> Cache:
        """After ``fork``: beam k goes on from what the given beam of its sentence remembers."""
        return replace(self, writer=jnp.take_along_axis(self.writer, beams_BxK[:, :, None], axis=1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """What all layers of a stack share: positions, and who may look at whom."""

    slots_q: jax.Array  # [B or 1, T]
    slots_k: jax.Array  # [B or 1, S]
    mask_BxTxS: jax.Array | None
    bias_BxHxTxS: jax.Array | None = None
    angles: tuple[jax.Array, jax.Array] | None = None
    memory_mask: jax.Array | None = None  # [B, 1, M]


class Block(nnx.Module):
    """One layer: self-attention, cross-attention where there is a memory, feed-forward; pre- or post-norm."""

    def __init__(self, config: StackConfig, *, cross: bool, depth: int, rngs: nnx.Rngs):
        scale = (2 * depth) ** -0.5
        self.config = config
        self.attn = Attention(config, rngs=rngs, scale=scale)
        self.attn_norm = Norm(config.width, config)
        self.cross = Attention(config, rngs=rngs, scale=scale) if cross else None
        self.cross_norm = Norm(config.width, config) if cross else None
        self.mlp = Mlp(config, rngs=rngs, scale=scale)
        self.mlp_norm = Norm(config.width, config)

    def __call__(self, x_BxTxD, view: View, *, mask_BxTxS, past: LayerCache | None, memory: KeyValue | None, key):
        """Returns the layer's output and its cache with the new slots written (None without one)."""
        keys = iter(split_key(key, 6))

        def attention(h):
            nonlocal past
            q = self.attn.query(h, view.angles)
            k, v = self.attn.key_value(h, view.angles)
            if past is not None:
                past = past.write(k, v)
                k, v = past.read()
            return self.attn(q, k, v, mask_BxTxS, view.bias_BxHxTxS, key=next(keys))

        def cross_attention(h):
            return self.cross(self.cross.query(h, None), *memory, view.memory_mask, key=next(keys))

        x_BxTxD = self._residual(x_BxTxD, self.attn_norm, attention, keys)
        if self.cross is not None:
            x_BxTxD = self._residual(x_BxTxD, self.cross_norm, cross_attention, keys)
        x_BxTxD = self._residual(x_BxTxD, self.mlp_norm, lambda h: self.mlp(h, next(keys)), keys)
        return x_BxTxD, past

    def _residual(self, x, norm: Norm, inner, keys: Iterator) -> jax.Array:
        pre = self.config.norm_position == "pre"
        y = dropout(inner(norm(x) if pre else x), self.config.dropout, next(keys))
        y = constrain(x + y, ACTIVATION_AXES)
        return y if pre else norm(y)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's place in a segment's cache. The whole cache is carried through the scan and written in place:
    as scanned inputs and outputs it would be copied at every step."""

    keys: jax.Array  # [L, B, G, beams, slots, K]
    values: jax.Array
    layer: jax.Array
    index: jax.Array

    def write(self, k_RxGxTxK: jax.Array, v_RxGxTxK: jax.Array) -> LayerCache:
        def into(cache, new):
            by_beam = new.reshape(cache.shape[1], -1, *new.shape[1:]).swapaxes(1, 2)
            at = (self.layer, 0, 0, 0, self.index, 0)
            return jax.lax.dynamic_update_slice(cache, by_beam[None].astype(cache.dtype), at)

        return replace(self, keys=into(self.keys, k_RxGxTxK), values=into(self.values, v_RxGxTxK))

    def read(self) -> KeyValue:
        """``[B, G, beams * slots, K]`` each."""

        def of(cache):
            layer = jax.lax.dynamic_index_in_dim(cache, self.layer, keepdims=False)
            return layer.reshape(*layer.shape[:2], -1, layer.shape[-1])

        return of(self.keys), of(self.values)


def segment(config: StackConfig, layers: int, *, cross: bool, depth: int, rngs: nnx.Rngs) -> Block:
    """A Block whose parameters are those of ``layers`` layers, stacked."""

    def one(key):
        return nnx.state(Block(config, cross=cross, depth=depth, rngs=nnx.Rngs(params=key)))

    state = jax.vmap(one)(jax.random.split(rngs.params(), layers))
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata("axes", ("layers", *variable.get_metadata("axes")))
    template = nnx.eval_shape(lambda: Block(config, cross=cross, depth=depth, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(template), state)


class Stack(nnx.Module):
    """Layers with what surrounds them: absolute positions before, the final norm after."""

    def __init__(self, config: StackConfig, segments: tuple[int, ...], *, causal: bool, cross: bool, rngs: nnx.Rngs):
        self.config, self.causal, self.depth = config, causal, sum(segments)
        learned, rows = config.positions == "learned", config.max_positions + config.position_offset
        self.pos = Embedding(rows, config.width, ("positions", "embed"), rngs=rngs) if learned else None
        self.rel = RelativeBias(config, bidirectional=not causal) if config.positions == "relative" else None
        self.embed_norm = Norm(config.width, config) if config.embed_norm else None
        self.layers = nnx.List(
            [segment(config, count, cross=cross, depth=self.depth, rngs=rngs) for count in segments]
        )
        self.final_norm = Norm(config.width, config) if config.norm_position == "pre" else None

    def __call__(
        self,
        x_BxTxD: jax.Array,
        *,
        mask_BxTxS: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        memory_BxMxD: jax.Array | None = None,
        memory_mask_BxM: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The whole sequence at once. The mask says what may be looked at besides causality."""
        slots = jnp.arange(x_BxTxD.shape[1])[None]
        if self.causal:
            causal = causal_mask(slots, slots)
            mask_BxTxS = causal if mask_BxTxS is None else causal & mask_BxTxS
        positions = slots if positions_BxT is None else positions_BxT
        view = self._view(slots, slots, positions, mask_BxTxS, memory_mask_BxM)
        keys = split_key(key, len(self.layers) + 1)
        x_BxTxD = self._enter(x_BxTxD, positions, keys[-1])
        for block, layer_keys in zip(self.layers, keys, strict=False):
            x_BxTxD, _ = self._run(block, x_BxTxD, view, memory=memory_BxMxD, key=layer_keys)
        return x_BxTxD if self.final_norm is None else self.final_norm(x_BxTxD)

    def decode(self, x_BxTxD: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The next T slots of every row, written to the cache and looking back at it."""
        T, (beams, slots) = x_BxTxD.shape[1], cache.keys[0].shape[3:5]
        new_T = cache.index + jnp.arange(T)
        slots_q, slots_k = jnp.tile(new_T, beams)[None], jnp.tile(jnp.arange(slots), beams)[None]
        mask = causal_mask(slots_q, slots_k) & (slots_k >= cache.start[:, None])[:, None, :]
        if cache.writer is not None:
            own = jnp.arange(beams)[:, None]
            written = jnp.broadcast_to(own, (*cache.writer.shape[:2], T))
            cache = cache.replace(writer=jax.lax.dynamic_update_slice(cache.writer, written, (0, 0, cache.index)))
            remembered_BxKxKxS = cache.writer[:, :, None] == own
            mask &= jnp.repeat(remembered_BxKxKxS.reshape(-1, beams, beams * slots), T, axis=1)
        positions = jnp.maximum(new_T - jnp.repeat(cache.start, beams)[:, None], 0)
        view = self._view(slots_q, slots_k, positions, mask, cache.memory_mask)
        x_BxTxD = self._enter(x_BxTxD, positions, None)
        keys, values = [], []
        for i, block in enumerate(self.layers):
            past = (cache.keys[i], cache.values[i], cache.index)
            memory = cache.memory[i] if cache.memory else None
            x_BxTxD, (k, v) = self._run(block, x_BxTxD, view, past=past, memory_kv=memory)
            keys.append(k)
            values.append(v)
        x_BxTxD = x_BxTxD if self.final_norm is None else self.final_norm(x_BxTxD)
        index = cache.index + x_BxTxD.shape[1]
        return x_BxTxD, cache.replace(keys=tuple(keys), values=tuple(values), index=index)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for ``batch`` rows of at most ``length`` slots."""
        config = self.config
        shapes = [
            (block.attn_norm.scale.shape[0], batch, config.n_kv_heads, 1, length, config.d_head)
            for block in self.layers
        ]
        empty = tuple(jnp.zeros(shape, config.dtype) for shape in shapes)
        return Cache(empty, jax.tree.map(jnp.copy, empty), jnp.int32(0), jnp.zeros(batch, jnp.int32))

    def memory_key_values(self, memory_BxMxD: jax.Array) -> tuple[KeyValue, ...]:
        """Cross-attention keys and values of every layer, ``[L, B, G, M, K]`` a segment."""

        def of_segment(block):
            graphdef, params = nnx.split(block.cross)
            return jax.lax.map(lambda layer: nnx.merge(graphdef, layer).key_value(memory_BxMxD, None), params)

        return tuple(of_segment(block) for block in self.layers)

    def _view(self, slots_q, slots_k, positions, mask_BxTxS, memory_mask_BxM) -> View:
        config = self.config
        return View(
            slots_q,
            slots_k,
            mask_BxTxS,
            bias_BxHxTxS=None if self.rel is None else self.rel(slots_q, slots_k),
            angles=rotary_angles(positions, config.d_head, config.rope_theta) if config.positions == "rotary" else None,
            memory_mask=None if memory_mask_BxM is None else memory_mask_BxM[:, None, :],
        )

    def _enter(self, x_BxTxD: jax.Array, positions: jax.Array, key: jax.Array | None) -> jax.Array:
        config = self.config
        positions = positions + config.position_offset
        if self.pos is not None:
            x_BxTxD = x_BxTxD + self.pos(positions, x_BxTxD.dtype)
        elif config.positions == "sinusoidal":
            x_BxTxD = x_BxTxD + sinusoids(positions, config.width).astype(x_BxTxD.dtype)
        if self.embed_norm is not None:
            x_BxTxD = self.embed_norm(x_BxTxD)
        return constrain(dropout(x_BxTxD, config.dropout, key), ACTIVATION_AXES)

    def _run(self, block, x_BxTxD, view: View, *, past=None, memory=None, memory_kv=None, key=None):
        """Walks one segment. ``past`` is (keys, values, index) of its cache; a memory is given whole (``memory``,
        projected in each layer) or already projected (``memory_kv``)."""
        graphdef, params = nnx.split(block)
        count = jax.tree.leaves(params)[0].shape[0]
        first = sum(b.attn_norm.scale.shape[0] for b in self.layers[: list(self.layers).index(block)])
        windows = None
        if any(self.config.windows):
            cycle = self.config.windows
            windows = jnp.array([cycle[i % len(cycle)] for i in range(first, first + count)])
        keys = None if key is None else jax.random.split(key, count)

        def body(carry, xs):
            x, kv = carry
            layer, layer_params, window, layer_key, layer_memory = xs
            block = nnx.merge(graphdef, layer_params)
            mask = view.mask_BxTxS
            if window is not None:
                near = window_mask(view.slots_q, view.slots_k, window)
                mask = near if mask is None else mask & near
            if memory is not None:
                layer_memory = block.cross.key_value(memory, None)
            layer_past = None if kv is None else LayerCache(*kv, layer, past[2])
            x, layer_past = block(x, view, mask_BxTxS=mask, past=layer_past, memory=layer_memory, key=layer_key)
            return (x, None if kv is None else (layer_past.keys, layer_past.values)), None

        body = _remat(body, self.config.remat)
        carry = (x_BxTxD, None if past is None else past[:2])
        xs = (jnp.arange(count), params, windows, keys, memory_kv)
        if self.config.scan_layers:
            return jax.lax.scan(body, carry, xs)[0]
        # Split at once: the gradient is then one concatenation, where that of indexing is a sum of padded layers.
        layers = jax.tree.map(lambda leaf: jax.lax.split(leaf, [1] * count), params)
        for i in range(count):
            one = jax.tree.map(lambda _, split, i=i: split[i][0], params, layers)
            carry, _ = body(carry, (i, one, *jax.tree.map(lambda leaf, i=i: leaf[i], xs[2:])))
        return carry


def _remat(body, policy: str):
    """"full" keeps only each layer's input; "dots" also what matrix products with parameters gave."""
    if policy == "none":
        return body
    saveable = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[policy]
    return functools.partial(jax.checkpoint, prevent_cse=False, policy=saveable)(body)
