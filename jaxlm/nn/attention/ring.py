"""Ring attention: attention over sequences whose tokens are split over devices (context parallelism).

Queries stay on their device. Short keys and values are gathered, which GSPMD does by itself: one collective, and rows
of logits over all keys. Long ones go around a ring of devices (arXiv:2310.01889): each device sees one shard of them at
a time, adds it to an online softmax and passes it on, so that no array on a device grows with the whole length.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.core.sharding import num_shards
from jaxlm.nn.attention.masks import MASKED_LOGIT, MaskSpec
from jaxlm.nn.attention.softmax import add_sinks, online_softmax_update, sinks_gradient
from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import softcap

__all__ = ["ring_attend", "uses_ring"]

AXIS = "sequence"
_MANUAL = {AXIS, "stage"}  # "stage" too, because a pipeline maps over its stages outside of this


def uses_ring(config: StackConfig, queries: int, keys: int) -> bool:
    """Whether attention over these lengths goes around a ring.

    It does from ``config.ring_min_keys`` keys on, if the mesh in use splits sequences and its shards divide both
    lengths. It never does with dropout of attention weights, because the weights of a query are not in one place.
    """
    shards = num_shards("length")
    long = keys >= config.ring_min_keys and not config.attention_dropout
    return long and shards > 1 and queries % shards == 0 and keys % shards == 0


class _Keys(NamedTuple):
    """A shard of the keys with everything that belongs to it; it travels around the ring. ``s`` keys a shard."""

    k_BxGxSxK: jax.Array
    v_BxGxSxK: jax.Array
    slots_BxS: jax.Array
    segment_ids_BxS: jax.Array | None
    real_BxS: jax.Array | None
    shard: jax.Array  # [1]: the number of the shard


class _Queries(NamedTuple):
    """A shard of the queries, which stays on its device. ``bias`` is of these queries with all keys."""

    q_BxTxHxK: jax.Array
    slots_BxT: jax.Array
    segment_ids_BxT: jax.Array | None
    window: jax.Array | None
    bias_BxHxTxS: jax.Array | None


_KEYS = _Keys(P(None, None, AXIS), P(None, None, AXIS), P(None, AXIS), P(None, AXIS), P(None, AXIS), P(AXIS))
_QUERIES = _Queries(P(None, AXIS), P(None, AXIS), P(None, AXIS), P(), P(None, None, AXIS))
_ROWS = P(None, None, None, AXIS)  # [B, G, R, T, ...]


def ring_attend(
    q_BxTxHxK: jax.Array, k_BxGxSxK: jax.Array, v_BxGxSxK: jax.Array, mask_spec: MaskSpec,
    bias_BxHxTxS: jax.Array | None = None, *, scale: float, cap: float = 0.0, sinks_H: jax.Array | None = None,
) -> jax.Array:
    """``nn.attention.layer.attend`` around a ring: a device holds one shard of keys, values and logits at a time.

    The backward pass goes around the ring once more and computes the logits again (arXiv:2205.14135, appendix B.2). The
    bias covers all keys and is split by queries.
    """
    sinks_1xGxRx1 = None if sinks_H is None else sinks_H.reshape(1, k_BxGxSxK.shape[1], -1, 1)
    return _ring(q_BxTxHxK, k_BxGxSxK, v_BxGxSxK, bias_BxHxTxS, sinks_1xGxRx1, mask_spec, scale, cap)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _ring(q_BxTxHxK, k_BxGxSxK, v_BxGxSxK, bias_BxHxTxS, sinks_1xGxRx1, mask_spec, scale, cap):
    return _forward(q_BxTxHxK, k_BxGxSxK, v_BxGxSxK, bias_BxHxTxS, sinks_1xGxRx1, mask_spec, scale, cap)[0]


def _split(q_BxTxHxK, k_BxGxSxK, v_BxGxSxK, bias_BxHxTxS, mask_spec: MaskSpec) -> tuple[_Queries, _Keys]:
    shards = jnp.arange(num_shards("length"))
    return (_Queries(q_BxTxHxK, mask_spec.slots_q, mask_spec.segment_ids_q, mask_spec.window, bias_BxHxTxS),
            _Keys(k_BxGxSxK, v_BxGxSxK, mask_spec.slots_k, mask_spec.segment_ids_k, mask_spec.real_k, shards))


def _specs(values, specs):
    """The PartitionSpecs of the values that are not None."""
    return type(specs)(*(None if value is None else spec for value, spec in zip(values, specs, strict=True)))


def _shifted(tree):
    """Every array moved on to the next device of the ring."""
    ring = [(i, (i + 1) % jax.lax.axis_size(AXIS)) for i in range(jax.lax.axis_size(AXIS))]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), tree)


def _logits(
    q_BxTxHxK, k_BxGxSxK, bias_BxHxTxS, queries: _Queries, keys: _Keys, causal: bool, scale: float, cap: float
) -> jax.Array:
    """``[B, G, R, T, S]`` in float32; query head ``g * R + r`` reads key head g."""
    B, T, H, K = q_BxTxHxK.shape
    q_BxTxGxRxK = (q_BxTxHxK * scale).reshape(B, T, k_BxGxSxK.shape[1], -1, K)
    logits_BxGxRxTxS = jnp.einsum("btgrk,bgsk->bgrts", q_BxTxGxRxK, k_BxGxSxK, preferred_element_type=jnp.float32)
    logits_BxGxRxTxS = softcap(logits_BxGxRxTxS, cap)
    if bias_BxHxTxS is not None:
        logits_BxGxRxTxS += bias_BxHxTxS.reshape(
            bias_BxHxTxS.shape[0], k_BxGxSxK.shape[1], -1, *bias_BxHxTxS.shape[2:]
        )
    mask_BxTxS = MaskSpec(
        queries.slots_BxT, keys.slots_BxS, queries.segment_ids_BxT, keys.segment_ids_BxS, keys.real_BxS,
        queries.window, causal,
    ).mask()
    if mask_BxTxS is None:
        return logits_BxGxRxTxS
    return jnp.where(mask_BxTxS[:, None, None], logits_BxGxRxTxS, MASKED_LOGIT)


def _bias_of_shard(bias_BxHxTxS: jax.Array | None, keys: _Keys) -> jax.Array | None:
    size = keys.k_BxGxSxK.shape[2]
    if bias_BxHxTxS is None:
        return None
    return jax.lax.dynamic_slice_in_dim(bias_BxHxTxS, keys.shard[0] * size, size, 3)


def _with_dbias_of_shard(dbias_BxHxTxS: jax.Array | None, part: jax.Array | None, keys: _Keys) -> jax.Array | None:
    """The gradient of the bias with the part of a shard of keys written into it."""
    size = keys.k_BxGxSxK.shape[2]
    if part is None:
        return None
    return jax.lax.dynamic_update_slice_in_dim(dbias_BxHxTxS, part, keys.shard[0] * size, 3)


def _forward(q_BxTxHxK, k_BxGxSxK, v_BxGxSxK, bias_BxHxTxS, sinks_1xGxRx1, mask_spec: MaskSpec, scale, cap):
    queries, keys = _split(q_BxTxHxK, k_BxGxSxK, v_BxGxSxK, bias_BxHxTxS, mask_spec)

    def around(queries: _Queries, keys: _Keys):
        def attend_to(keys: _Keys, *sums):
            logits_BxGxRxTxS = _logits(
                queries.q_BxTxHxK, keys.k_BxGxSxK, _bias_of_shard(queries.bias_BxHxTxS, keys), queries, keys,
                mask_spec.causal, scale, cap,
            )
            return online_softmax_update(*sums, logits_BxGxRxTxS, lambda weights: _mix(weights, keys.v_BxGxSxK))

        def next_shard(carry, _):
            keys = _shifted(carry[0])
            return (keys, *attend_to(keys, *carry[1:])), None

        B, T, H, K = queries.q_BxTxHxK.shape
        rows = B, keys.k_BxGxSxK.shape[1], H // keys.k_BxGxSxK.shape[1], T
        sums = jnp.full(rows, MASKED_LOGIT), jnp.zeros(rows), jnp.zeros((*rows, K))
        carry = (keys, *attend_to(keys, *sums))
        (_, top, total, out), _ = jax.lax.scan(next_shard, carry, length=jax.lax.axis_size(AXIS) - 1)
        return top, total, out

    sums = jax.shard_map(
        around, in_specs=(_specs(queries, _QUERIES), _specs(keys, _KEYS)), out_specs=(_ROWS,) * 3, axis_names=_MANUAL,
        check_vma=False,
    )(queries, keys)
    top_BxGxRxT, total_BxGxRxT, out_BxGxRxTxK = add_sinks(*sums, sinks_1xGxRx1)
    out_BxGxRxTxK /= total_BxGxRxT[..., None]
    inputs = q_BxTxHxK, k_BxGxSxK, v_BxGxSxK, bias_BxHxTxS, sinks_1xGxRx1, mask_spec
    residuals = *inputs, out_BxGxRxTxK, top_BxGxRxT, total_BxGxRxT
    return _heads_last(out_BxGxRxTxK).astype(q_BxTxHxK.dtype), residuals


def _mix(weights_BxGxRxTxS: jax.Array, v_BxGxSxK: jax.Array) -> jax.Array:
    """The values summed by the weights: ``[B, G, R, T, K]`` in float32."""
    weights_BxGxRxTxS = weights_BxGxRxTxS.astype(v_BxGxSxK.dtype)
    return jnp.einsum("bgrts,bgsk->bgrtk", weights_BxGxRxTxS, v_BxGxSxK, preferred_element_type=jnp.float32)


def _heads_last(x_BxGxRxTxK: jax.Array) -> jax.Array:
    B, G, R, T, K = x_BxGxRxTxK.shape
    return x_BxGxRxTxK.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, K)


def _backward(scale, cap, residuals, dout_BxTxHxK):
    q_BxTxHxK, k_BxGxSxK, v_BxGxSxK, bias_BxHxTxS, sinks_1xGxRx1, mask_spec, *outputs = residuals
    out_BxGxRxTxK, top_BxGxRxT, total_BxGxRxT = outputs
    queries, keys = _split(q_BxTxHxK, k_BxGxSxK, v_BxGxSxK, bias_BxHxTxS, mask_spec)
    B, T, H, K = dout_BxTxHxK.shape
    dout_BxTxGxRxK = dout_BxTxHxK.astype(jnp.float32).reshape(B, T, k_BxGxSxK.shape[1], -1, K)
    dout_BxGxRxTxK = dout_BxTxGxRxK.transpose(0, 2, 3, 1, 4)
    delta_BxGxRxTx1 = jnp.sum(dout_BxGxRxTxK * out_BxGxRxTxK, -1, keepdims=True)

    def around(queries: _Queries, keys: _Keys, dout_BxGxRxTxK, delta_BxGxRxTx1, top_BxGxRxT, total_BxGxRxT):
        def gradients_of(keys: _Keys):
            """What a shard of keys adds to the gradients of queries and bias, and the gradients of the shard."""
            def logits_of(q_BxTxHxK, k_BxGxSxK, bias_BxHxTxS):
                return _logits(q_BxTxHxK, k_BxGxSxK, bias_BxHxTxS, queries, keys, mask_spec.causal, scale, cap)

            logits_BxGxRxTxS, pull = jax.vjp(
                logits_of, queries.q_BxTxHxK, keys.k_BxGxSxK, _bias_of_shard(queries.bias_BxHxTxS, keys)
            )
            # exp(logits - top) / total, and not exp(logits - (log(total) + top)): where a query attends to nothing,
            # float32 rounds log(total) + top to top.
            weights_BxGxRxTxS = jnp.exp(logits_BxGxRxTxS - top_BxGxRxT[..., None]) / total_BxGxRxT[..., None]
            dweights_BxGxRxTxS = jnp.einsum("bgrtk,bgsk->bgrts", dout_BxGxRxTxK, keys.v_BxGxSxK.astype(jnp.float32))
            dv_BxGxSxK = jnp.einsum("bgrts,bgrtk->bgsk", weights_BxGxRxTxS, dout_BxGxRxTxK)
            dq_BxTxHxK, dk_BxGxSxK, dbias_BxHxTxS = pull(weights_BxGxRxTxS * (dweights_BxGxRxTxS - delta_BxGxRxTx1))
            return dq_BxTxHxK.astype(jnp.float32), dk_BxGxSxK.astype(jnp.float32), dv_BxGxSxK, dbias_BxHxTxS

        def next_shard(carry, _):
            keys, dq, dk, dv, dbias = carry
            keys, dk, dv = _shifted((keys, dk, dv))
            more_dq, more_dk, more_dv, part = gradients_of(keys)
            return (keys, dq + more_dq, dk + more_dk, dv + more_dv, _with_dbias_of_shard(dbias, part, keys)), None

        dq, dk, dv, part = gradients_of(keys)
        dbias = _with_dbias_of_shard(None if part is None else jnp.zeros_like(queries.bias_BxHxTxS), part, keys)
        carry = (keys, dq, dk, dv, dbias)
        (_, dq, dk, dv, dbias), _ = jax.lax.scan(next_shard, carry, length=jax.lax.axis_size(AXIS) - 1)
        dk, dv = _shifted((dk, dv))  # back to the device of their keys
        dtypes = queries.q_BxTxHxK.dtype, keys.k_BxGxSxK.dtype, keys.v_BxGxSxK.dtype
        return *(x.astype(dtype) for x, dtype in zip((dq, dk, dv), dtypes, strict=True)), dbias

    specs = (_specs(queries, _QUERIES), _specs(keys, _KEYS), *[_ROWS] * 4)
    dbias_spec = None if bias_BxHxTxS is None else _QUERIES.bias_BxHxTxS
    gradients = jax.shard_map(
        around, in_specs=specs, out_specs=(_QUERIES.q_BxTxHxK, _KEYS.k_BxGxSxK, _KEYS.v_BxGxSxK, dbias_spec),
        axis_names=_MANUAL, check_vma=False,
    )(queries, keys, dout_BxGxRxTxK, delta_BxGxRxTx1, top_BxGxRxT, total_BxGxRxT)
    delta_BxGxRxT = delta_BxGxRxTx1[..., 0]
    return *gradients, sinks_gradient(sinks_1xGxRx1, top_BxGxRxT, total_BxGxRxT, delta_BxGxRxT, (0, 3)), None


_ring.defvjp(_forward, _backward)
