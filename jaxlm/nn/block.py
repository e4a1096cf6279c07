"""One Transformer layer, and blocks of many layers whose parameters are stacked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core.ops import dropout
from jaxlm.core.sharding import constrain
from jaxlm.nn.attention.kv_cache import LayerCache
from jaxlm.nn.attention.layer import Attention
from jaxlm.nn.attention.masks import MaskSpec, window_mask
from jaxlm.nn.attention.paged import LayerPages
from jaxlm.nn.attention.quantized_kv import KeyValue, fake_quantize_kv, quantize_kv
from jaxlm.nn.attention.ring import uses_ring
from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import Mlp, Norm, ParamKeys, split_key
from jaxlm.nn.moe.layer import Moe
from jaxlm.nn.moe.routing import Routing

__all__ = ["ACTIVATION_AXES", "Block", "LayerContext", "LayerSettings", "stacked_block"]

ACTIVATION_AXES = ("batch", "length", "features")


class LayerSettings(NamedTuple):
    """What differs between the layers of a group besides their parameters. Of a group the arrays are ``[layers]``."""

    window: jax.Array | None = None  # 0: full attention; None: no layer of the stack has a window
    number: jax.Array | None = None  # from 1; None where it does not matter
    rotary: jax.Array | None = None  # false in layers without rotary positions; None: all layers are alike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerContext:
    """What a layer needs to know of its sequence: positions and masks. All layers of a stack share one context;
    ``of_layer`` makes that of one layer."""

    mask_spec: MaskSpec
    mask_BxTxS: jax.Array | None  # None also for a whole sequence that goes around a ring
    bias_BxHxTxS: jax.Array | None = None
    angles: tuple[jax.Array, jax.Array] | None = None
    local_angles: tuple[jax.Array, jax.Array] | None = None  # of layers with a window, if they have others
    memory_mask_Bx1xM: jax.Array | None = None
    memory_mask_spec: MaskSpec | None = None
    logit_divisor: jax.Array | None = None  # of self-attention; None: 1
    query_scale_BxTx1x1: jax.Array | None = None  # of self-attention; None: 1

    def of_layer(self, settings: LayerSettings, config: StackConfig) -> LayerContext:
        """The context of one layer: with the mask and angles of its window."""
        angles, window = self.angles, settings.window
        if self.local_angles is not None and window is not None:
            angles = jax.tree.map(partial(jnp.where, window > 0), self.local_angles, angles)
        if settings.rotary is not None:
            angles = tuple(jnp.where(settings.rotary, each, still) for each, still in zip(angles, (1, 0), strict=True))
        context = replace(self, logit_divisor=settings.number, angles=angles)
        if window is None:
            return context
        mask, mask_spec = self.mask_BxTxS, replace(self.mask_spec, window=window)
        if mask is not None or not uses_ring(config, mask_spec.slots_q.shape[1], mask_spec.slots_k.shape[1]):
            near = window_mask(mask_spec.slots_q, mask_spec.slots_k, window)
            mask = near if mask is None else mask & near
        return replace(context, mask_spec=mask_spec, mask_BxTxS=mask)


class Block(nnx.Module):
    """One layer: self-attention, cross-attention in the decoder of an encoder-decoder, feed-forward.

    Each of these, f, is added to the residual stream x, with norms N where ``norm_position`` puts them:

    - ``pre``: x + f(N(x)) (arXiv:2002.04745)
    - ``post``: N(x + f(x)) (arXiv:1706.03762)
    - ``output``: x + N(f(x)) (OLMo 2, arXiv:2501.00656)
    - ``sandwich``: x + N'(f(N(x))) (Gemma 2, arXiv:2408.00118)

    ``parallel`` layers are x + attention(N(x)) + mlp(N'(x)), where N' is N with ``shared_norm``.
    """

    def __init__(self, config: StackConfig, *, cross: bool, experts: bool, depth: int, keys: ParamKeys):
        """``depth`` is the number of layers of the stack, by which initial output projections are scaled down."""
        scale = (2 * depth) ** -0.5
        sandwich = config.norm_position == "sandwich"
        self.config = config
        self.attn = Attention(config, keys=keys, scale=scale)
        self.attn_norm = Norm(config.width, config)
        self.attn_out_norm = Norm(config.width, config) if sandwich else None
        self.cross = Attention(config, keys=keys, scale=scale) if cross else None
        self.cross_norm = Norm(config.width, config) if cross else None
        self.cross_out_norm = Norm(config.width, config) if cross and sandwich else None
        self.mlp = (Moe if experts else Mlp)(config, keys=keys, scale=scale)
        shared = config.parallel and config.shared_norm
        self.mlp_norm = None if shared else Norm(config.width, config)
        self.mlp_out_norm = Norm(config.width, config) if sandwich else None

    def __call__(
        self,
        x_BxTxD: jax.Array,
        context: LayerContext,
        *,
        past: LayerCache | LayerPages | None = None,
        memory: KeyValue | None = None,
        key: jax.Array | None = None,
        seen: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, LayerCache | LayerPages | None, Routing | None]:
        """One layer.

        Args:
            past: the layer's cache when decoding.
            memory: keys and values of cross-attention.
            key: for dropout.
            seen: gets the weights of self-attention and then those of cross-attention appended.

        Returns:
            The output, the cache with the new slots (None without one), and what the router did (None without experts).
        """
        rate, keys = self.config.dropout, iter(split_key(key, 6))
        if self.config.parallel:
            h_BxTxD = self.attn_norm(x_BxTxD)
            y_BxTxD, past = self._self_attention(h_BxTxD, context, past, next(keys), seen)
            y_BxTxD = dropout(y_BxTxD, rate, next(keys))
            h_BxTxD = h_BxTxD if self.mlp_norm is None else self.mlp_norm(x_BxTxD)
            z_BxTxD, routing = self._feed_forward(h_BxTxD, next(keys))
            y_BxTxD += dropout(z_BxTxD, rate, next(keys))
            return constrain(x_BxTxD + self._multiplied(y_BxTxD), ACTIVATION_AXES), past, routing
        y_BxTxD, past = self._self_attention(self._input(x_BxTxD, self.attn_norm), context, past, next(keys), seen)
        x_BxTxD = self._residual(x_BxTxD, y_BxTxD, self.attn_norm, self.attn_out_norm, next(keys))
        if self.cross is not None:
            y_BxTxD = self._cross_attention(self._input(x_BxTxD, self.cross_norm), context, memory, next(keys), seen)
            x_BxTxD = self._residual(x_BxTxD, y_BxTxD, self.cross_norm, self.cross_out_norm, next(keys))
        y_BxTxD, routing = self._feed_forward(self._input(x_BxTxD, self.mlp_norm), next(keys))
        return self._residual(x_BxTxD, y_BxTxD, self.mlp_norm, self.mlp_out_norm, next(keys)), past, routing

    def _self_attention(self, h_BxTxD, context: LayerContext, past, key, seen):
        """The output and the cache with the new slots."""
        q_BxTxHxK, k_BxGxTxK, v_BxGxTxK = self.attn.query_key_value(h_BxTxD, context.angles)
        if context.logit_divisor is not None:
            q_BxTxHxK = q_BxTxHxK / context.logit_divisor.astype(q_BxTxHxK.dtype)
        if context.query_scale_BxTx1x1 is not None:
            q_BxTxHxK = q_BxTxHxK * context.query_scale_BxTx1x1.astype(q_BxTxHxK.dtype)
        kind, bias = self.config.kv_cache, context.bias_BxHxTxS
        if past is None:
            k_BxGxTxK, v_BxGxTxK = fake_quantize_kv(k_BxGxTxK, v_BxGxTxK, kind)
            y_BxTxD = self.attn(
                q_BxTxHxK, k_BxGxTxK, v_BxGxTxK, context.mask_BxTxS, bias, key=key, mask_spec=context.mask_spec,
                seen=seen,
            )
            return y_BxTxD, None
        past = past.write(*quantize_kv(k_BxGxTxK, v_BxGxTxK, kind))
        if isinstance(past, LayerPages):
            return self.attn.over_pages(q_BxTxHxK, past, context.mask_spec, bias), past
        return self.attn(q_BxTxHxK, *past.read(), context.mask_BxTxS, bias, key=key, seen=seen), past

    def _cross_attention(self, h_BxTxD, context: LayerContext, memory: KeyValue, key, seen) -> jax.Array:
        return self.cross(
            self.cross.query(h_BxTxD, None), *memory, context.memory_mask_Bx1xM, key=key,
            mask_spec=context.memory_mask_spec, seen=seen,
        )

    def _feed_forward(self, h_BxTxD, key) -> tuple[jax.Array, Routing | None]:
        y = self.mlp(h_BxTxD, key)
        return y if isinstance(self.mlp, Moe) else (y, None)

    def _input(self, x_BxTxD, norm: Norm) -> jax.Array:
        """What attention or the MLP reads of the residual stream."""
        return norm(x_BxTxD) if self.config.norm_position in ("pre", "sandwich") else x_BxTxD

    def _residual(self, x_BxTxD, y_BxTxD, norm: Norm, out_norm: Norm | None, key) -> jax.Array:
        """The residual stream with the output of attention or the MLP added."""
        position = self.config.norm_position
        if position in ("output", "sandwich"):
            y_BxTxD = (norm if out_norm is None else out_norm)(y_BxTxD)
        y_BxTxD = self._multiplied(dropout(y_BxTxD, self.config.dropout, key))
        x_BxTxD = constrain(x_BxTxD + y_BxTxD, ACTIVATION_AXES)
        return norm(x_BxTxD) if position == "post" else x_BxTxD

    def _multiplied(self, y_BxTxD: jax.Array) -> jax.Array:
        factor = self.config.residual_multiplier
        return y_BxTxD if factor == 1.0 else y_BxTxD * jnp.asarray(factor, y_BxTxD.dtype)


def stacked_block(
    config: StackConfig, layers: int, *, cross: bool, experts: bool, depth: int, keys: ParamKeys
) -> Block:
    """A Block whose every parameter is that of ``layers`` layers, stacked along a leading dimension."""
    graphdef, state = _split_blocks(jax.random.split(keys.next(), layers), config, cross, experts, depth)
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata("axes", ("layers", *variable.get_metadata("axes")))
    return nnx.merge(graphdef, state)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))  # groups that are alike are traced once
def _split_blocks(keys_L: jax.Array, config: StackConfig, cross: bool, experts: bool, depth: int):
    def split_block(key):
        return nnx.split(Block(config, cross=cross, experts=experts, depth=depth, keys=ParamKeys(key)))

    return jax.vmap(split_block)(keys_L)
