"""A stack of Transformer layers, an encoder or a decoder: over a whole sequence, or one step of decoding.

The layers come in groups (``nn.config.layer_groups_of``), each a ``Block`` whose every parameter has a leading layer
dimension. ``lax.scan`` runs the layers of a group, so that compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.core.errors import UserError
from jaxlm.core.ops import dropout
from jaxlm.core.sharding import constrain
from jaxlm.nn.attention.kv_cache import Cache, LayerCache
from jaxlm.nn.attention.masks import MaskSpec
from jaxlm.nn.attention.paged import LayerPages, PagedCache, PagePool
from jaxlm.nn.attention.quantized_kv import KeyValue, fake_quantize_kv, quantize_kv
from jaxlm.nn.attention.ring import uses_ring
from jaxlm.nn.block import ACTIVATION_AXES, Block, LayerContext, LayerSettings, stacked_block
from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import Embedding, Norm, ParamKeys, split_key
from jaxlm.nn.moe.routing import Routing, concat_routings
from jaxlm.nn.pipeline import Schedule, make_schedule, num_stages, run_pipeline
from jaxlm.nn.positions import (
    RelativeBias,
    document_lengths,
    local_rotary_angles,
    query_scales,
    rotary_angles,
    sinusoids,
    text_lengths,
)
from jaxlm.nn.remat import LAYER_INPUT, with_remat

__all__ = ["C", "Stack", "run_layer"]

C = TypeVar("C", Cache, PagedCache)


class Stack(nnx.Module):
    """Layers with what surrounds them: absolute positions before, the final norm after."""

    def __init__(self, config: StackConfig, layer_groups: list[range], *, causal: bool, cross: bool, keys: ParamKeys):
        """``layer_groups`` are the layers of each group; ``cross`` says whether they attend to an encoder's output."""
        self.config, self.causal, self.layer_groups = config, causal, tuple(layer_groups)
        learned, rows = config.positions == "learned", config.max_positions + config.position_offset
        self.pos = Embedding(rows, config.width, ("positions", "embed"), keys=keys) if learned else None
        self.rel = RelativeBias(config, bidirectional=not causal) if config.positions == "relative" else None
        self.embed_norm = Norm(config.width, config) if config.embed_norm else None
        depth = layer_groups[-1].stop
        self.layers = nnx.List([
            stacked_block(config, len(run), cross=cross, experts=config.has_experts(run[0]), depth=depth, keys=keys)
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
        length_B: jax.Array | None = None,
        memory_BxMxD: jax.Array | None = None,
        memory_mask_BxM: jax.Array | None = None,
        key: jax.Array | None = None,
        hidden_states: bool = False,
    ) -> tuple[jax.Array, Routing | None, jax.Array | None]:
        """The whole sequence at once.

        Args:
            segment_ids_BxT: a token attends only to tokens with its own id.
            real_BxT: false for padding, to which no token attends.
            length_B: the length of each row's text, which padding follows; for a config that ``rotates_by_length``.
                Default: that of each segment, or up to the last real token, or T.
            hidden_states: whether to return the output of each layer.

        Returns:
            The output; what the routers did, ``[layers with experts, ...]``; the layers' outputs ``[layers, B, T, D]``.

        Raises:
            UserError: when a pipeline is asked for hidden states, or cannot run these layers (``schedule``).
        """
        x_BxTxD, context, keys = self.start(
            x_BxTxD, segment_ids_BxT=segment_ids_BxT, real_BxT=real_BxT, positions_BxT=positions_BxT,
            length_B=length_B, memory_mask_BxM=memory_mask_BxM, key=key,
        )
        schedule = self.schedule(num_stages())
        if schedule is not None and x_BxTxD.shape[0] % schedule.microbatches == 0:
            if hidden_states:
                raise UserError("a pipeline does not keep the outputs of its layers; set mesh.stage=1")
            x_BxTxD, routing = self._run_pipeline(x_BxTxD, context, schedule, memory_BxMxD, keys[0])
            return self.finish(x_BxTxD), routing, None
        routings, outputs = [], []
        for group, group_key in enumerate(keys):
            x_BxTxD, _, (routing, output) = self._run_group(
                group, x_BxTxD, context, memory_BxMxD=memory_BxMxD, key=group_key, hidden_states=hidden_states
            )
            routings.append(routing)
            outputs.append(output)
        states_LxBxTxD = jnp.concatenate(outputs) if hidden_states else None
        return self.finish(x_BxTxD), concat_routings(routings), states_LxBxTxD

    def schedule(self, stages: int) -> Schedule | None:
        """How a pipeline of this many stages runs the layers, for batches that divide into its microbatches; None for
        one stage.

        Raises:
            UserError: when some layers have experts and others do not, or the layers do not divide.
        """
        if stages == 1:
            return None
        if len({jax.tree.structure(nnx.state(block)) for block in self.layers}) > 1:
            raise UserError("a pipeline needs layers that are all alike (with experts or without); set mesh.stage=1")
        return make_schedule(self.layer_groups, stages, self.config.microbatches)

    def start(
        self, x_BxTxD, *, segment_ids_BxT=None, real_BxT=None, positions_BxT=None, length_B=None, memory_mask_BxM=None,
        key=None,
    ) -> tuple[jax.Array, LayerContext, list[jax.Array | None]]:
        """From the arguments of a call: the input of the first layer, the context, and a key for each layer group."""
        T = x_BxTxD.shape[1]
        slots = jnp.arange(T)[None]
        mask_spec = MaskSpec(slots, slots, segment_ids_BxT, segment_ids_BxT, real_BxT, causal=self.causal)
        mask_BxTxS = None if uses_ring(self.config, T, T) else mask_spec.mask()
        positions = slots if positions_BxT is None else positions_BxT
        length_BxT = self._lengths(positions, segment_ids_BxT, real_BxT, length_B)
        context = self._context(mask_spec, positions, mask_BxTxS, memory_mask_BxM, length_BxT)
        if memory_mask_BxM is not None:
            memory_slots = jnp.arange(memory_mask_BxM.shape[1])[None]
            context = replace(context, memory_mask_spec=MaskSpec(slots, memory_slots, real_k=memory_mask_BxM))
        keys = split_key(key, len(self.layers) + 1)
        return self._first_input(x_BxTxD, positions, keys[-1]), context, keys[:-1]

    def finish(self, x_BxTxD: jax.Array) -> jax.Array:
        """From the output of the last layer to that of the stack."""
        return x_BxTxD if self.final_norm is None else self.final_norm(x_BxTxD)

    def decode(self, x_BxTxD: jax.Array, cache: C) -> tuple[jax.Array, C]:
        """The next T slots of every row, which attend to the cache and are written to it."""
        T = x_BxTxD.shape[1]
        cache, mask_spec, mask_BxTxS, positions_BxT = cache.extend(T)
        context = self._context(mask_spec, positions_BxT, mask_BxTxS, cache.memory_mask, cache.rotary_length_Rx1)
        x_BxTxD = self._first_input(x_BxTxD, positions_BxT, None)
        groups = []
        for group in range(len(self.layer_groups)):
            x_BxTxD, past, _ = self._run_group(
                group, x_BxTxD, context, past=cache.first_layer(group),
                memory_kv=cache.memory[group] if cache.memory else None,
            )
            groups.append(past)
        return self.finish(x_BxTxD), cache.with_groups(groups, T)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for ``batch`` rows of at most ``length`` slots."""
        config, layers = self.config, tuple(map(len, self.layer_groups))
        cache = Cache.empty(layers, batch, config.n_kv_heads, length, config.d_head, config.kv_cache, config.dtype)
        return cache.with_text() if config.rotates_by_length else cache

    def init_pages(self, pages: int, size: int) -> PagePool:
        """An empty pool of ``pages`` pages with ``size`` slots each."""
        config, layers = self.config, tuple(map(len, self.layer_groups))
        return PagePool.empty(layers, pages, config.n_kv_heads, size, config.d_head, config.kv_cache, config.dtype)

    def memory_key_values(self, memory_BxMxD: jax.Array) -> tuple[KeyValue, ...]:
        """Cross-attention keys and values of every layer: for each layer group ``[L, B, G, M, K]`` each."""

        def of_group(block):
            graphdef, params = nnx.split(block.cross)

            def of_layer(layer):
                return quantize_kv(*nnx.merge(graphdef, layer).key_value(memory_BxMxD, None), self.config.kv_cache)

            return jax.lax.map(of_layer, params)

        return tuple(of_group(block) for block in self.layers)

    def layer_settings(self, group: int) -> LayerSettings:
        """The settings of the layers of a group, ``[layers]`` each."""
        run, cycle = self.layer_groups[group], self.config.windows
        windows = jnp.array([cycle[layer % len(cycle)] for layer in run]) if any(cycle) else None
        return LayerSettings(
            windows,
            jnp.array(run) + 1 if self.config.attention_scale_by_layer else None,
            jnp.array([layer not in self.config.nope_layers for layer in run]) if self._has_nope_layers else None,
        )

    @property
    def _has_nope_layers(self) -> bool:
        return self.config.positions == "rotary" and bool(self.config.nope_layers)

    def _lengths(self, positions, segment_ids_BxT, real_BxT, length_B) -> jax.Array | None:
        """The length of the text of each token, ``[B or 1, T or 1]``; None where rotations do not depend on it."""
        if not self.config.rotates_by_length:
            return None
        if segment_ids_BxT is not None:
            return document_lengths(positions, segment_ids_BxT)
        if length_B is None and real_BxT is not None:
            length_B = text_lengths(real_BxT)
        return jnp.max(positions, axis=1, keepdims=True) + 1 if length_B is None else length_B[:, None]

    def _context(self, mask_spec: MaskSpec, positions, mask_BxTxS, memory_mask_BxM, length_BxT) -> LayerContext:
        config = self.config
        rotary, local = config.positions == "rotary", config.rope_local_theta > 0
        return LayerContext(
            mask_spec,
            mask_BxTxS,
            bias_BxHxTxS=None if self.rel is None else self.rel(mask_spec.slots_q, mask_spec.slots_k),
            angles=rotary_angles(positions, config, length_BxT) if rotary else None,
            local_angles=local_rotary_angles(positions, config) if rotary and local else None,
            memory_mask_Bx1xM=None if memory_mask_BxM is None else memory_mask_BxM[:, None, :],
            query_scale_BxTx1x1=query_scales(positions, config) if config.attention_temperature else None,
        )

    def _first_input(self, x_BxTxD: jax.Array, positions: jax.Array, key: jax.Array | None) -> jax.Array:
        """Embeddings with absolute positions added, normalised and dropped out as the model does."""
        config = self.config
        positions = positions + config.position_offset
        if self.pos is not None:
            x_BxTxD = x_BxTxD + self.pos(positions, x_BxTxD.dtype)
        elif config.positions in ("sinusoidal", "sinusoidal_t2t"):
            x_BxTxD = x_BxTxD + sinusoids(positions, config).astype(x_BxTxD.dtype)
        if self.embed_norm is not None:
            x_BxTxD = self.embed_norm(x_BxTxD)
        return constrain(dropout(x_BxTxD, config.dropout, key), ACTIVATION_AXES)

    def _run_group(
        self, group: int, x_BxTxD, context: LayerContext, *, past=None, memory_BxMxD=None, memory_kv=None, key=None,
        hidden_states=False,
    ):
        """The layers of a group: their output, their cache, and for each layer (routing, output if asked for)."""
        graphdef, params = nnx.split(self.layers[group])
        count = len(self.layer_groups[group])
        if count == 1 and key is None and self.config.remat == "none":
            x_BxTxD, past, routing = _traced_once(
                _LayerFunction(self.config, graphdef), params, x_BxTxD, context, self.layer_settings(group), past,
                memory_BxMxD, memory_kv,
            )
            return x_BxTxD, past, (routing, x_BxTxD[None] if hidden_states else None)
        keys = None if key is None else jax.random.split(key, count)

        def body(carry, xs):
            x, kv = carry
            layer, layer_params, settings, layer_key, layer_memory_kv = xs
            layer_past = None if kv is None else replace(past, keys=kv[0], values=kv[1], layer=layer)
            x, layer_past, routing = run_layer(
                self.config, nnx.merge(graphdef, layer_params), x, context, settings, past=layer_past,
                memory_BxMxD=memory_BxMxD, memory_kv=layer_memory_kv, key=layer_key,
            )
            kv = None if kv is None else (layer_past.keys, layer_past.values)
            return (x, kv), (routing, x if hidden_states else None)

        carry = (x_BxTxD, None if past is None else (past.keys, past.values))
        xs = (params, self.layer_settings(group), keys, memory_kv)
        body = with_remat(body, self.config.remat)
        (x_BxTxD, kv), outputs = _scan_layers(body, carry, xs, count, unroll=not self.config.scan_layers)
        return x_BxTxD, None if kv is None else replace(past, keys=kv[0], values=kv[1]), outputs

    def _run_pipeline(self, x_BxTxD, context: LayerContext, schedule: Schedule, memory_BxMxD, key):
        """All layers in a pipeline; see ``nn.pipeline``. Each layer and microbatch has its own key for dropout."""
        graphdefs, params = zip(*map(nnx.split, self.layers), strict=True)
        settings = [(self.layer_settings(group), jnp.array(run)) for group, run in enumerate(self.layer_groups)]

        def stage(layers, others, here, x, memory_BxMxD, context, microbatch):
            def body(x, xs):
                _, chosen, other = xs
                if other is not None:  # chosen layer by layer, so that no choice is kept for the backward pass
                    chosen = jax.tree.map(partial(jnp.where, here), chosen, other)
                layer_params, (layer_settings, number) = chosen
                layer_key = None if key is None else jax.random.fold_in(jax.random.fold_in(key, number), microbatch)
                block = nnx.merge(graphdefs[0], layer_params)
                x, _, routing = run_layer(
                    self.config, block, x, context, layer_settings, memory_BxMxD=memory_BxMxD, key=layer_key
                )
                return x, routing

            count = len(self.layer_groups[0]) // schedule.stages
            body = with_remat(body, self.config.remat, mapped=True, chosen=others is not None)
            return _scan_layers(body, x, (layers, others), count, unroll=not self.config.scan_layers)

        return run_pipeline(
            stage, list(zip(params, settings, strict=True)), x_BxTxD, memory_BxMxD, context, schedule
        )


def run_layer(
    config: StackConfig,
    block: Block,
    x_BxTxD: jax.Array,
    context: LayerContext,
    settings: LayerSettings,
    *,
    past: LayerCache | LayerPages | None = None,
    memory_BxMxD: jax.Array | None = None,
    memory_kv: KeyValue | None = None,
    key: jax.Array | None = None,
    seen: list[jax.Array] | None = None,
) -> tuple[jax.Array, LayerCache | LayerPages | None, Routing | None]:
    """One layer of a stack: what its block returns.

    ``memory_BxMxD`` is the encoder's output, ``memory_kv`` the keys and values of it; one of them is enough.
    """
    x_BxTxD = checkpoint_name(x_BxTxD, LAYER_INPUT)
    if memory_BxMxD is not None:
        memory_kv = fake_quantize_kv(*block.cross.key_value(memory_BxMxD, None), config.kv_cache)
    return block(x_BxTxD, context.of_layer(settings, config), past=past, memory=memory_kv, key=key, seen=seen)


@dataclass(frozen=True)
class _LayerFunction:
    """The only layer of a group as a function of arrays. Equal layers are equal, and ``jit`` traces one for all."""

    config: StackConfig
    graphdef: nnx.GraphDef

    def __call__(self, params, x_BxTxD, context, settings, past, memory_BxMxD, memory_kv):
        params, settings, memory_kv = jax.tree.map(partial(jnp.squeeze, axis=0), (params, settings, memory_kv))
        x_BxTxD, past, routing = run_layer(
            self.config, nnx.merge(self.graphdef, params), x_BxTxD, context, settings, past=past,
            memory_BxMxD=memory_BxMxD, memory_kv=memory_kv,
        )
        return x_BxTxD, past, jax.tree.map(lambda each: each[None], routing)


@partial(jax.jit, static_argnums=0)
def _traced_once(layer: _LayerFunction, *args):
    return layer(*args)


def _scan_layers(body: Callable, carry: Any, xs: Any, count: int, *, unroll: bool) -> tuple[Any, Any]:
    """``lax.scan`` of ``body(carry, (layer, *its part of xs))`` over ``count`` layers, or the same as a Python loop."""
    if not unroll:
        return jax.lax.scan(body, carry, (jnp.arange(count), *xs))
    # All layers are split at once: the gradient is then one concatenation. That of indexing is a sum of padded layers.
    layers = jax.tree.map(lambda leaf: jax.lax.split(leaf, [1] * count), xs)
    ys = []
    for i in range(count):
        carry, y = body(carry, (i, *jax.tree.map(lambda _, split, i=i: split[i][0], xs, layers)))
        ys.append(y)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *ys)
