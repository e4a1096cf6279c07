"""Attention over sequences whose tokens are split over devices: context parallelism.

Queries stay where they are. Short keys and values are gathered, which GSPMD does by itself: one collective, and rows of
logits over all keys. Long ones go around a ring (arXiv:2310.01889): each device sees one part of them at a time, adds
it to an online softmax (arXiv:1805.02867) and passes it on, so that nothing a device holds grows with the whole length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.sharding import num_shards
from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import softcap

__all__ = ["NEGATIVE", "MaskSpec", "uses_ring", "online_softmax_update", "ring_attend"]

AXIS = "sequence"
_MANUAL = {AXIS, "stage"}  # a pipeline maps over its stages from outside
NEGATIVE = -1e9  # finite, so that a row that may look at nothing becomes uniform instead of NaN


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskSpec:
    """Who may look at whom, before it is a mask: what a device needs of its own queries and of keys that pass by."""

    slots_q: jax.Array  # [B or 1, T]
    slots_k: jax.Array  # [B or 1, S]
    segment_ids_q: jax.Array | None = None  # [B, T]: only keys of the same segment are seen
    segment_ids_k: jax.Array | None = None  # [B, S]
    real_k: jax.Array | None = None  # [B, S]: keys that are there at all
    window: jax.Array | None = None  # keys less than so many slots away; 0: any
    causal: bool = field(default=False, metadata={"static": True})  # keys not after the query

    def mask(self) -> jax.Array | None:
        """``[B or 1, T or 1, S]``, or None where everybody sees everything."""
        parts = []
        if self.causal:
            parts.append(causal_mask(self.slots_q, self.slots_k))
        if self.segment_ids_q is not None:
            parts.append(self.segment_ids_q[:, :, None] == self.segment_ids_k[:, None, :])
        if self.real_k is not None:
            parts.append(self.real_k[:, None, :])
        if self.window is not None:
            parts.append(window_mask(self.slots_q, self.slots_k, self.window))
        return None if not parts else jax.tree.reduce(jnp.logical_and, parts)


def causal_mask(q_slots_BxT: jax.Array, k_slots_BxS: jax.Array) -> jax.Array:
    """``[B, T, S]``: true where the key's slot is not after the query's."""
    return k_slots_BxS[:, None, :] <= q_slots_BxT[:, :, None]


def window_mask(q_slots_BxT: jax.Array, k_slots_BxS: jax.Array, window: jax.Array | int) -> jax.Array:
    """``[B, T, S]``: true where the key is less than ``window`` slots away; a window of 0 is no limit."""
    distance = jnp.abs(q_slots_BxT[:, :, None] - k_slots_BxS[:, None, :])
    return (distance < window) | (jnp.asarray(window) == 0)


def online_softmax_update(top: jax.Array, total: jax.Array, out: jax.Array, logits: jax.Array, mix) -> tuple[jax.Array, ...]:
    """An online softmax (arXiv:1805.02867) over some more keys: the largest logit so far ``[...]``, the sum of weights
    ``[...]`` and that of weighted values ``[..., K]``, after logits ``[..., S]`` whose values ``mix(weights)`` sums."""
    highest = jnp.maximum(top, jnp.max(logits, -1))
    weights, old = jnp.exp(logits - highest[..., None]), jnp.exp(top - highest)
    return highest, old * total + jnp.sum(weights, -1), old[..., None] * out + mix(weights)


def uses_ring(config: StackConfig, queries: int, keys: int) -> bool:
    """Whether attention of these lengths goes around a ring: from ``config.ring_min_keys`` keys on, if the mesh in use
    splits sequences and both lengths divide. Never where attention has dropout, for the weights are not in one place.
    """
    parts = num_shards("length")
    long = keys >= config.ring_min_keys and not config.attention_dropout
    return long and parts > 1 and queries % parts == 0 and keys % parts == 0


class _Keys(NamedTuple):
    """What travels: a part of the keys and all that is theirs."""

    k: jax.Array  # [B, G, s, K]
    v: jax.Array
    slots: jax.Array
    segment_ids: jax.Array | None
    real: jax.Array | None
    part: jax.Array  # [1]: which part it is


class _Queries(NamedTuple):
    """What stays."""

    q: jax.Array  # [B, t, H, K]
    slots: jax.Array
    segment_ids: jax.Array | None
    window: jax.Array | None
    bias: jax.Array | None  # [B or 1, H, t, S]: of these queries with all keys


_KEYS = _Keys(P(None, None, AXIS), P(None, None, AXIS), P(None, AXIS), P(None, AXIS), P(None, AXIS), P(AXIS))
_QUERIES = _Queries(P(None, AXIS), P(None, AXIS), P(None, AXIS), P(), P(None, None, AXIS))
_ROWS = P(None, None, None, AXIS)  # [B, G, R, t, ...]


def ring_attend(
    q_BxTxHxK: jax.Array, k_BxGxSxK: jax.Array, v_BxGxSxK: jax.Array, mask_spec: MaskSpec,
    bias_BxHxTxS: jax.Array | None = None, *, scale: float, cap: float = 0.0,
) -> jax.Array:
    """``nn.attention.layer.attend``, with what each device keeps at a time being a part of the keys, values and logits.

    The gradient goes around the ring once more, and computes the logits again (arXiv:2205.14135, appendix B.2). A bias
    is one of all keys, split by queries.
    """
    return _ring(q_BxTxHxK, k_BxGxSxK, v_BxGxSxK, bias_BxHxTxS, mask_spec, scale, cap)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _ring(q, k, v, bias, mask_spec, scale, cap):
    return _forward(q, k, v, bias, mask_spec, scale, cap)[0]


def _split(q, k, v, bias, mask_spec: MaskSpec) -> tuple[_Queries, _Keys]:
    parts = jnp.arange(num_shards("length"))
    return (_Queries(q, mask_spec.slots_q, mask_spec.segment_ids_q, mask_spec.window, bias),
            _Keys(k, v, mask_spec.slots_k, mask_spec.segment_ids_k, mask_spec.real_k, parts))


def _specs(values, specs):
    """The specs of the values that are there."""
    return type(specs)(*(None if value is None else spec for value, spec in zip(values, specs, strict=True)))


def _shifted(tree):
    """Everything on to the next device."""
    ring = [(i, (i + 1) % jax.lax.axis_size(AXIS)) for i in range(jax.lax.axis_size(AXIS))]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), tree)


def _logits(q, k, bias, queries: _Queries, keys: _Keys, causal: bool, scale: float, cap: float) -> jax.Array:
    """``[B, G, R, t, s]`` in float32; query head ``g * R + r`` reads key head g."""
    B, T, H, K = q.shape
    grouped = (q * scale).reshape(B, T, k.shape[1], -1, K)
    logits = jnp.einsum("btgrk,bgsk->bgrts", grouped, k, preferred_element_type=jnp.float32)
    logits = softcap(logits, cap)
    if bias is not None:
        logits += bias.reshape(bias.shape[0], k.shape[1], -1, *bias.shape[2:])
    mask_spec = MaskSpec(queries.slots, keys.slots, queries.segment_ids, keys.segment_ids, keys.real, queries.window, causal)
    mask = mask_spec.mask()
    return logits if mask is None else jnp.where(mask[:, None, None], logits, NEGATIVE)


def _of_part(bias: jax.Array | None, keys: _Keys) -> jax.Array | None:
    size = keys.k.shape[2]
    return None if bias is None else jax.lax.dynamic_slice_in_dim(bias, keys.part[0] * size, size, 3)


def _forward(q, k, v, bias, mask_spec: MaskSpec, scale, cap):
    queries, keys = _split(q, k, v, bias, mask_spec)

    def around(queries: _Queries, keys: _Keys):
        def see(keys: _Keys, *before):
            logits = _logits(queries.q, keys.k, _of_part(queries.bias, keys), queries, keys, mask_spec.causal, scale, cap)
            return online_softmax_update(*before, logits, lambda weights: _mix(weights, keys.v))

        def turn(carry, _):
            keys = _shifted(carry[0])
            return (keys, *see(keys, *carry[1:])), None

        B, T, H, K = queries.q.shape
        rows = B, keys.k.shape[1], H // keys.k.shape[1], T
        nothing = jnp.full(rows, NEGATIVE), jnp.zeros(rows), jnp.zeros((*rows, K))
        (_, top, total, out), _ = jax.lax.scan(turn, (keys, *see(keys, *nothing)), length=jax.lax.axis_size(AXIS) - 1)
        return out / total[..., None], top, total

    out, top, total = jax.shard_map(
        around, in_specs=(_specs(queries, _QUERIES), _specs(keys, _KEYS)), out_specs=(_ROWS,) * 3, axis_names=_MANUAL,
        check_vma=False,
    )(queries, keys)
    return _heads_last(out).astype(q.dtype), (q, k, v, bias, mask_spec, out, top, total)


def _mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("bgrts,bgsk->bgrtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _heads_last(x_BxGxRxTxK: jax.Array) -> jax.Array:
    B, G, R, T, K = x_BxGxRxTxK.shape
    return x_BxGxRxTxK.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, K)


def _backward(scale, cap, residuals, gradient):
    q, k, v, bias, mask_spec, out, top, total = residuals
    queries, keys = _split(q, k, v, bias, mask_spec)
    B, T, H, K = gradient.shape
    gradient = gradient.astype(jnp.float32).reshape(B, T, k.shape[1], -1, K).transpose(0, 2, 3, 1, 4)
    delta = jnp.sum(gradient * out, -1, keepdims=True)

    def around(queries: _Queries, keys: _Keys, gradient, delta, top, total):
        def see(keys: _Keys):
            """The part's share of the gradients of queries and bias, and the gradients of its keys and values."""
            def logits_of(q, k, bias):
                return _logits(q, k, bias, queries, keys, mask_spec.causal, scale, cap)

            logits, back = jax.vjp(logits_of, queries.q, keys.k, _of_part(queries.bias, keys))
            # Not by log(total) + top, which is top where nothing is seen.
            weights = jnp.exp(logits - top[..., None]) / total[..., None]
            dweights = jnp.einsum("bgrtk,bgsk->bgrts", gradient, keys.v.astype(jnp.float32))
            dv = jnp.einsum("bgrts,bgrtk->bgsk", weights, gradient)
            dq, dk, dbias = back(weights * (dweights - delta))
            return dq.astype(jnp.float32), dk.astype(jnp.float32), dv, dbias

        def put(total, dbias, keys):
            size = keys.k.shape[2]
            return None if dbias is None else jax.lax.dynamic_update_slice_in_dim(
                total, dbias, keys.part[0] * size, 3)

        def turn(carry, _):
            keys, dq, dk, dv, dbias = carry
            keys, dk, dv = _shifted((keys, dk, dv))
            more_q, more_k, more_v, part = see(keys)
            return (keys, dq + more_q, dk + more_k, dv + more_v, put(dbias, part, keys)), None

        dq, dk, dv, part = see(keys)
        first = put(None if part is None else jnp.zeros_like(queries.bias), part, keys)
        carry = (keys, dq, dk, dv, first)
        (_, dq, dk, dv, dbias), _ = jax.lax.scan(turn, carry, length=jax.lax.axis_size(AXIS) - 1)
        dk, dv = _shifted((dk, dv))  # home
        return dq.astype(queries.q.dtype), dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), dbias

    specs = (_specs(queries, _QUERIES), _specs(keys, _KEYS), *[_ROWS] * 4)
    dbias = None if bias is None else _QUERIES.bias
    gradients = jax.shard_map(
        around, in_specs=specs, out_specs=(_QUERIES.q, _KEYS.k, _KEYS.v, dbias), axis_names=_MANUAL,
        check_vma=False,
    )(queries, keys, gradient, delta, top, total)
    return *gradients, None


_ring.defvjp(_forward, _backward)
