"""A stack of Transformer layers: encoder or decoder, full sequence or cached, scanned in layer_groups.

A layer group is a run of layers of one shape and one representation. It is a ``Block`` whose every parameter has a
leading layer dimension; ``lax.scan`` walks it, so that compile time does not grow with depth.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.core.errors import UserError
from jaxlm.core.ops import dropout
from jaxlm.core.sharding import constrain
from jaxlm.nn.attention.kv_cache import Cache, KeyValue, LayerCache, fake_quantize_kv, quantize_kv
from jaxlm.nn.attention.layer import Attention
from jaxlm.nn.attention.paged import LayerPages, PagedCache, PagePool
from jaxlm.nn.attention.ring import MaskSpec, uses_ring, window_mask
from jaxlm.nn.config import DecoderConfig, Seq2SeqConfig, StackConfig
from jaxlm.nn.layers import Embedding, Mlp, Norm, split_key
from jaxlm.nn.moe.layer import Moe
from jaxlm.nn.moe.routing import Routing, joined
from jaxlm.nn.pipeline import Schedule, flow, make_schedule, stages_in_use
from jaxlm.nn.positions import RelativeBias, local_rotary_angles, rotary_angles, sinusoids
from jaxlm.nn.remat import LAYER_INPUT, rematerialised

ACTIVATION_AXES = ("batch", "length", "features")
C = TypeVar("C", Cache, PagedCache)
LayerSettings = tuple[jax.Array | None, jax.Array | None]  # a layer's window, and its number from 1 where that matters


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerContext:
    """What all layers of a stack share: positions, and who may look at whom."""

    mask_spec: MaskSpec
    mask_BxTxS: jax.Array | None  # None too where it would be of a whole sequence that goes around a ring
    bias_BxHxTxS: jax.Array | None = None
    angles: tuple[jax.Array, jax.Array] | None = None
    local_angles: tuple[jax.Array, jax.Array] | None = None  # of layers with a window, where theirs are different
    memory_mask: jax.Array | None = None  # [B, 1, M]
    memory_mask_spec: MaskSpec | None = None


class Block(nnx.Module):
    """One layer: self-attention, cross-attention where there is a memory, feed-forward.

    Each part f is added to the residual stream x, with norms N where ``norm_position`` has them:

    - ``pre``: x + f(N(x)) (arXiv:2002.04745)
    - ``post``: N(x + f(x)) (arXiv:1706.03762)
    - ``output``: x + N(f(x)) (OLMo 2, arXiv:2501.00656)
    - ``sandwich``: x + N'(f(N(x))) (Gemma 2, arXiv:2408.00118)

    ``parallel`` layers are x + attention(N(x)) + mlp(N'(x)).
    """

    def __init__(self, config: StackConfig, *, cross: bool, experts: bool, depth: int, rngs: nnx.Rngs):
        scale = (2 * depth) ** -0.5
        sandwich = config.norm_position == "sandwich"
        self.config = config
        self.attn = Attention(config, rngs=rngs, scale=scale)
        self.attn_norm = Norm(config.width, config)
        self.attn_out_norm = Norm(config.width, config) if sandwich else None
        self.cross = Attention(config, rngs=rngs, scale=scale) if cross else None
        self.cross_norm = Norm(config.width, config) if cross else None
        self.cross_out_norm = Norm(config.width, config) if cross and sandwich else None
        self.mlp = (Moe if experts else Mlp)(config, rngs=rngs, scale=scale)
        self.mlp_norm = Norm(config.width, config)
        self.mlp_out_norm = Norm(config.width, config) if sandwich else None

    def __call__(
        self, x_BxTxD, view: LayerContext, *, mask_BxTxS, mask_spec, angles, number, past: LayerCache | LayerPages | None, memory,
        key, seen: list[jax.Array] | None = None,
    ):
        """Returns the layer's output, its cache with the new slots written (None without one), and what its router did
        (None without experts). The weights of attention, then of cross-attention, are added to ``seen``.

        ``number`` divides the logits of self-attention, None being 1.
        """
        keys, kv_cache, routing = iter(split_key(key, 6)), self.config.kv_cache, None

        def attention(h):
            nonlocal past
            q, k, v = self.attn.query_key_value(h, angles)
            q = q if number is None else q / number.astype(q.dtype)
            if past is None:
                k, v = fake_quantize_kv(k, v, kv_cache)
            else:
                past = past.write(*quantize_kv(k, v, kv_cache))
                if isinstance(past, LayerPages):
                    return self.attn.over_pages(q, past, mask_spec, view.bias_BxHxTxS)
                k, v = past.read()
            whole = mask_spec if past is None else None
            return self.attn(q, k, v, mask_BxTxS, view.bias_BxHxTxS, key=next(keys), mask_spec=whole, seen=seen)

        def cross_attention(h):
            q = self.cross.query(h, None)
            return self.cross(q, *memory, view.memory_mask, key=next(keys), mask_spec=view.memory_mask_spec, seen=seen)

        def mlp(h):
            nonlocal routing
            y = self.mlp(h, next(keys))
            y, routing = y if isinstance(self.mlp, Moe) else (y, None)
            return y

        if self.config.parallel:
            y = dropout(attention(self.attn_norm(x_BxTxD)), self.config.dropout, next(keys))
            y += dropout(mlp(self.mlp_norm(x_BxTxD)), self.config.dropout, next(keys))
            return constrain(x_BxTxD + y, ACTIVATION_AXES), past, routing
        x_BxTxD = self._residual(x_BxTxD, self.attn_norm, self.attn_out_norm, attention, keys)
        if self.cross is not None:
            x_BxTxD = self._residual(x_BxTxD, self.cross_norm, self.cross_out_norm, cross_attention, keys)
        return self._residual(x_BxTxD, self.mlp_norm, self.mlp_out_norm, mlp, keys), past, routing

    def _residual(self, x, norm: Norm, out_norm: Norm | None, inner, keys: Iterator) -> jax.Array:
        position = self.config.norm_position
        y = inner(norm(x) if position in ("pre", "sandwich") else x)
        if position in ("output", "sandwich"):
            y = (norm if out_norm is None else out_norm)(y)
        x = constrain(x + dropout(y, self.config.dropout, next(keys)), ACTIVATION_AXES)
        return norm(x) if position == "post" else x


def stacked_block(config: StackConfig, layers: int, *, cross: bool, experts: bool, depth: int, rngs: nnx.Rngs) -> Block:
    """A Block whose parameters are those of ``layers`` layers, stacked."""

    def block(rngs):
        return Block(config, cross=cross, experts=experts, depth=depth, rngs=rngs)

    state = jax.vmap(lambda key: nnx.state(block(nnx.Rngs(params=key))))(jax.random.split(rngs.params(), layers))
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata("axes", ("layers", *variable.get_metadata("axes")))
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: block(nnx.Rngs(0)))), state)


def group_layers(config: StackConfig, layers: int, layer_groups: tuple[int, ...] = ()) -> list[range]:
    """The layers of each layer group: as asked for, else as few layer groups as layers with and without experts allow."""
    if not layer_groups:
        kinds = [has_experts(config, layer) for layer in range(layers)]
        layer_groups = tuple(len(list(run)) for _, run in itertools.groupby(kinds))
    ends = list(itertools.accumulate(layer_groups))
    return [range(end - count, end) for end, count in zip(ends, layer_groups, strict=True)]


def layer_groups_of(config: DecoderConfig | Seq2SeqConfig, side: Literal["encoder", "decoder"]) -> list[range]:
    """The layers of each layer group of the model's encoder or decoder."""
    if isinstance(config, DecoderConfig):
        return group_layers(config, config.layers, config.layer_groups)
    if side == "encoder":
        return group_layers(config, config.encoder_layers, config.encoder_layer_groups)
    return group_layers(config, config.decoder_layers, config.decoder_layer_groups)


def has_experts(config: StackConfig, layer: int) -> bool:
    return config.experts > 0 and layer not in config.dense_layers


class Stack(nnx.Module):
    """Layers with what surrounds them: absolute positions before, the final norm after."""

    def __init__(self, config: StackConfig, layer_groups: list[range], *, causal: bool, cross: bool, rngs: nnx.Rngs):
        self.config, self.causal, self.layer_groups = config, causal, tuple(layer_groups)
        learned, rows = config.positions == "learned", config.max_positions + config.position_offset
        self.pos = Embedding(rows, config.width, ("positions", "embed"), rngs=rngs) if learned else None
        self.rel = RelativeBias(config, bidirectional=not causal) if config.positions == "relative" else None
        self.embed_norm = Norm(config.width, config) if config.embed_norm else None
        depth = layer_groups[-1].stop
        self.layers = nnx.List([
            stacked_block(config, len(run), cross=cross, experts=has_experts(config, run[0]), depth=depth, rngs=rngs)
            for run in layer_groups
        ])
        self.final_norm = Norm(config.width, config) if config.norm_position != "post" else None

    def __call__(
        self,
        x_BxTxD: jax.Array,
        *,
        segment_ids_BxT: jax.Array | None = None,
        real_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        memory_BxMxD: jax.Array | None = None,
        memory_mask_BxM: jax.Array | None = None,
        key: jax.Array | None = None,
        states: bool = False,
    ) -> tuple[jax.Array, Routing | None, jax.Array | None]:
        """The whole sequence at once, what the routers of the layers with experts did, ``[layers, ...]``, and with
        ``states`` what each layer gave, ``[layers, B, T, D]``.

        Tokens see those of their own segment that are real, besides causality.
        """
        x_BxTxD, view, keys = self.start(
            x_BxTxD, segment_ids_BxT=segment_ids_BxT, real_BxT=real_BxT, positions_BxT=positions_BxT,
            memory_mask_BxM=memory_mask_BxM, key=key,
        )
        schedule = self.schedule(stages_in_use())
        if schedule is not None and x_BxTxD.shape[0] % schedule.microbatches == 0:
            if states:
                raise UserError("a pipeline does not keep what its layers give; set mesh.stage=1")
            x_BxTxD, routing = self._pipeline(x_BxTxD, view, schedule, memory_BxMxD, keys[0])
            return self.finish(x_BxTxD), routing, None
        routings, kept = [], []
        for i, layer_keys in enumerate(keys):
            x_BxTxD, _, (routing, given) = self._run(
                i, x_BxTxD, view, memory=memory_BxMxD, key=layer_keys, states=states
            )
            routings.append(routing)
            kept.append(given)
        return self.finish(x_BxTxD), joined(routings), jnp.concatenate(kept) if states else None

    def schedule(self, stages: int) -> Schedule | None:
        """How the layers are walked on a mesh of so many stages, by batches whose rows divide into the microbatches;
        None: one after the other. UserError where they cannot be."""
        if stages == 1:
            return None
        if len({jax.tree.structure(nnx.state(block)) for block in self.layers}) > 1:
            raise UserError("a pipeline needs layers that are all alike (with experts or without); set mesh.stage=1")
        return make_schedule(self.layer_groups, stages, self.config.microbatches)

    def start(
        self, x_BxTxD, *, segment_ids_BxT=None, real_BxT=None, positions_BxT=None, memory_mask_BxM=None, key=None
    ):
        """What the first layer is given, of the arguments of a call: its input, the view, and a key a layer_group."""
        T = x_BxTxD.shape[1]
        slots = jnp.arange(T)[None]
        mask_spec = MaskSpec(slots, slots, segment_ids_BxT, segment_ids_BxT, real_BxT, causal=self.causal)
        mask_BxTxS = None if uses_ring(self.config, T, T) else mask_spec.mask()
        positions = slots if positions_BxT is None else positions_BxT
        view = self._view(mask_spec, positions, mask_BxTxS, memory_mask_BxM)
        if memory_mask_BxM is not None:
            memory_slots = jnp.arange(memory_mask_BxM.shape[1])[None]
            view = replace(view, memory_mask_spec=MaskSpec(slots, memory_slots, real_k=memory_mask_BxM))
        keys = split_key(key, len(self.layers) + 1)
        return self._enter(x_BxTxD, positions, keys[-1]), view, keys[:-1]

    def finish(self, x_BxTxD: jax.Array) -> jax.Array:
        """From the last layer's output to that of the stack."""
        return x_BxTxD if self.final_norm is None else self.final_norm(x_BxTxD)

    def decode(self, x_BxTxD: jax.Array, cache: C) -> tuple[jax.Array, C]:
        """The next T slots of every row, written to the cache and looking back at it."""
        T = x_BxTxD.shape[1]
        cache, mask_spec, mask, positions = cache.extend(T)
        view = self._view(mask_spec, positions, mask, cache.memory_mask)
        x_BxTxD = self._enter(x_BxTxD, positions, None)
        layer_groups = []
        for i in range(len(self.layer_groups)):
            memory = cache.memory[i] if cache.memory else None
            x_BxTxD, past, _ = self._run(i, x_BxTxD, view, past=cache.layer_group(i), memory_kv=memory)
            layer_groups.append(past)
        return self.finish(x_BxTxD), cache.written(layer_groups, T)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for ``batch`` rows of at most ``length`` slots."""
        config, layers = self.config, tuple(map(len, self.layer_groups))
        return Cache.empty(layers, batch, config.n_kv_heads, length, config.d_head, config.kv_cache, config.dtype)

    def init_pages(self, pages: int, size: int) -> PagePool:
        """An empty pool of ``pages`` pages with ``size`` slots each."""
        config, layers = self.config, tuple(map(len, self.layer_groups))
        return PagePool.empty(layers, pages, config.n_kv_heads, size, config.d_head, config.kv_cache, config.dtype)

    def memory_key_values(self, memory_BxMxD: jax.Array) -> tuple[KeyValue, ...]:
        """Cross-attention keys and values of every layer, ``[L, B, G, M, K]`` a layer_group."""

        def of_layer_group(block):
            graphdef, params = nnx.split(block.cross)

            def of_layer(layer):
                return quantize_kv(*nnx.merge(graphdef, layer).key_value(memory_BxMxD, None), self.config.kv_cache)

            return jax.lax.map(of_layer, params)

        return tuple(of_layer_group(block) for block in self.layers)

    def _view(self, mask_spec: MaskSpec, positions, mask_BxTxS, memory_mask_BxM) -> LayerContext:
        config = self.config
        rotary, local = config.positions == "rotary", config.rope_local_theta > 0
        return LayerContext(
            mask_spec,
            mask_BxTxS,
            bias_BxHxTxS=None if self.rel is None else self.rel(mask_spec.slots_q, mask_spec.slots_k),
            angles=rotary_angles(positions, config) if rotary else None,
            local_angles=local_rotary_angles(positions, config) if rotary and local else None,
            memory_mask=None if memory_mask_BxM is None else memory_mask_BxM[:, None, :],
        )

    def _enter(self, x_BxTxD: jax.Array, positions: jax.Array, key: jax.Array | None) -> jax.Array:
        config = self.config
        positions = positions + config.position_offset
        if self.pos is not None:
            x_BxTxD = x_BxTxD + self.pos(positions, x_BxTxD.dtype)
        elif config.positions in ("sinusoidal", "sinusoidal_t2t"):
            x_BxTxD = x_BxTxD + sinusoids(positions, config).astype(x_BxTxD.dtype)
        if self.embed_norm is not None:
            x_BxTxD = self.embed_norm(x_BxTxD)
        return constrain(dropout(x_BxTxD, config.dropout, key), ACTIVATION_AXES)

    def layer_settings(self, i: int) -> LayerSettings:
        """What tells the layers of layer group i apart besides their parameters, ``[L]`` each."""
        run, cycle = self.layer_groups[i], self.config.windows
        windows = jnp.array([cycle[layer % len(cycle)] for layer in run]) if any(cycle) else None
        return windows, jnp.array(run) + 1 if self.config.attention_scale_by_layer else None

    def run_layer(
        self, block: Block, x_BxTxD, view: LayerContext, traits: LayerSettings = (None, None), *, past=None, memory=None,
        memory_kv=None, key=None, seen=None,
    ):
        """One layer: what its block returns. A memory is given whole (``memory``) or projected (``memory_kv``)."""
        x_BxTxD = checkpoint_name(x_BxTxD, LAYER_INPUT)
        mask, angles, mask_spec, (window, number) = view.mask_BxTxS, view.angles, view.mask_spec, traits
        if window is not None:
            mask_spec = replace(mask_spec, window=window)
            if mask is not None or not uses_ring(self.config, x_BxTxD.shape[1], mask_spec.slots_k.shape[1]):
                near = window_mask(mask_spec.slots_q, mask_spec.slots_k, window)
                mask = near if mask is None else mask & near
            if view.local_angles is not None:
                angles = jax.tree.map(partial(jnp.where, window > 0), view.local_angles, angles)
        if memory is not None:
            memory_kv = fake_quantize_kv(*block.cross.key_value(memory, None), self.config.kv_cache)
        return block(
            x_BxTxD, view, mask_BxTxS=mask, mask_spec=mask_spec, angles=angles, number=number, past=past, memory=memory_kv,
            key=key, seen=seen,
        )

    def _run(self, i: int, x_BxTxD, view: LayerContext, *, past=None, memory=None, memory_kv=None, key=None, states=False):
        """Walks layer group i, whose cache is ``past``: its output, its cache, and of each layer (routing, output where
        ``states``). A memory is given whole (``memory``, projected in each layer) or already projected
        (``memory_kv``)."""
        graphdef, params = nnx.split(self.layers[i])
        count, traits = len(self.layer_groups[i]), self.layer_settings(i)
        keys = None if key is None else jax.random.split(key, count)

        def body(carry, xs):
            x, kv = carry
            layer, layer_params, layer_traits, layer_key, layer_memory = xs
            layer_past = None if kv is None else replace(past, keys=kv[0], values=kv[1], layer=layer)
            x, layer_past, routing = self.run_layer(
                nnx.merge(graphdef, layer_params), x, view, layer_traits, past=layer_past, memory=memory,
                memory_kv=layer_memory, key=layer_key,
            )
            return (x, None if kv is None else (layer_past.keys, layer_past.values)), (routing, x if states else None)

        carry = (x_BxTxD, None if past is None else (past.keys, past.values))
        xs = (params, traits, keys, memory_kv)
        (x_BxTxD, kv), given = self._walk(rematerialised(body, self.config.remat), carry, xs, count)
        return x_BxTxD, None if kv is None else replace(past, keys=kv[0], values=kv[1]), given

    def _walk(self, body, carry, xs, count: int):
        """``lax.scan`` of ``body(carry, (number, *xs of one))`` over ``count`` layers, unrolled where so configured."""
        if self.config.scan_layers:
            return jax.lax.scan(body, carry, (jnp.arange(count), *xs))
        # Split at once: the gradient is then one concatenation, where that of indexing is a sum of padded layers.
        layers = jax.tree.map(lambda leaf: jax.lax.split(leaf, [1] * count), xs)
        ys = []
        for i in range(count):
            carry, y = body(carry, (i, *jax.tree.map(lambda _, split, i=i: split[i][0], xs, layers)))
            ys.append(y)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *ys)

    def _pipeline(self, x_BxTxD, view: LayerContext, schedule: Schedule, memory, key):
        """Walks all layer groups; see ``nn.pipeline``. Dropout has a key a layer and microbatch."""
        graphdefs, params = zip(*map(nnx.split, self.layers), strict=True)
        traits = [(self.layer_settings(i), jnp.array(run)) for i, run in enumerate(self.layer_groups)]

        def stage(layers, others, here, x, memory, view, microbatch):
            def body(x, xs):
                _, chosen, other = xs
                if other is not None:  # chosen here, layer by layer, so that no choice is kept for the backward pass
                    chosen = jax.tree.map(partial(jnp.where, here), chosen, other)
                layer, (layer_traits, number) = chosen
                layer_key = None if key is None else jax.random.fold_in(jax.random.fold_in(key, number), microbatch)
                block = nnx.merge(graphdefs[0], layer)
                x, _, routing = self.run_layer(block, x, view, layer_traits, memory=memory, key=layer_key)
                return x, routing

            count = len(self.layer_groups[0]) // schedule.stages
            body = rematerialised(body, self.config.remat, mapped=True, chosen=others is not None)
            return self._walk(body, x, (layers, others), count)

        return flow(stage, list(zip(params, traits, strict=True)), x_BxTxD, memory, view, schedule)
