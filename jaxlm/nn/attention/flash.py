"""Attention a block at a time, on every platform: of the logits no more is ever there than those of some queries with
some keys, added up by an online softmax (FlashAttention, arXiv:2205.14135). Memory grows with the length and not with
its square; blocks stay in the cache, and those that causality hides are not visited.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.attention.kv_cache import KVArray, QuantizedKV, mix, scores
from jaxlm.nn.attention.ring import NEGATIVE, online_softmax_update
from jaxlm.nn.layers import softcap

__all__ = ["flash_attend", "in_blocks"]


def in_blocks(queries: int, keys: int) -> bool:
    """Whether attention of these lengths goes block by block: where there are more than four, for those are no faster
    than all at once on CPU."""
    return min(queries, keys) >= _BLOCK and queries * keys > 4 * _BLOCK**2


def flash_attend(
    q_BxGxRxTxK: jax.Array,
    k_BxGxSxK: KVArray,
    v_BxGxSxK: KVArray,
    mask_BxTxS: jax.Array | None,
    bias_BxHxTxS: jax.Array | None = None,
    *,
    cap: float = 0.0,
    causal: bool = False,
) -> jax.Array:
    """Softmax attention ``[B, G, R, T, K]`` of queries that are scaled already; R query heads read a key head.

    Mask and bias as for ``nn.attention.layer.attend``. ``causal`` promises that the mask hides every key after the query of
    the same number. A query that may look at nothing gets some mean of values. The backward pass computes the logits
    again (section 3.1 there); keys and values of a cache that rounds have no gradient.
    """
    T, S = q_BxGxRxTxK.shape[3], k_BxGxSxK.shape[2]
    sizes = _size(T), _size(S)
    more_T, more_S = -T % sizes[0], -S % sizes[1]
    if more_S and mask_BxTxS is None:
        mask_BxTxS = jnp.ones((1, 1, S), bool)
    q = _longer(q_BxGxRxTxK, more_T, 3)
    k, v = jax.tree.map(lambda x: _longer(x, more_S, 2), (k_BxGxSxK, v_BxGxSxK))
    mask = None if mask_BxTxS is None else _longer(_longer(mask_BxTxS, more_T, 1), more_S, 2)
    bias = None if bias_BxHxTxS is None else _longer(_longer(bias_BxHxTxS, more_T, 2), more_S, 3)
    return _flash(q, k, v, mask, bias, cap, causal, sizes)[:, :, :, :T]


_BLOCK = 128


def _size(length: int) -> int:
    """Queries or keys of a block: those of short sequences small, so that causality hides more of them."""
    return _BLOCK if length < 1024 else 2 * _BLOCK


def _longer(x: jax.Array, count: int, axis: int) -> jax.Array:
    """With zeros at the end of a dimension, unless it is one for all."""
    if not count or x.shape[axis] == 1:
        return x
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])


def _part(x: jax.Array, i: jax.Array, size: int, axis: int) -> jax.Array:
    """Block i of a dimension, or all of one that is one for all."""
    return x if x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _put(x: jax.Array, part: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * part.shape[axis], axis)


def _visits(T: int, S: int, sizes: tuple[int, int], causal: bool) -> np.ndarray:
    """Which blocks of queries and keys meet, ``[visits, 2]``."""
    all_of = np.argwhere(np.ones((T // sizes[0], S // sizes[1]), bool)).astype(np.int32)
    last_query, first_key = (all_of[:, 0] + 1) * sizes[0] - 1, all_of[:, 1] * sizes[1]
    return all_of[first_key <= last_query] if causal else all_of


def _walk(visit, carry, visits: np.ndarray):
    """``visit(carry, i, j)`` of every pair. A loop that JAX does not take apart: where layers are scanned it would
    compute the masks of all visits beforehand, as many as there are logits."""

    def one(state):
        n, carry = state
        i, j = jnp.asarray(visits)[n]
        return n + 1, visit(carry, i, j)

    return jax.lax.while_loop(lambda state: state[0] < len(visits), one, (jnp.int32(0), carry))[1]


def _square(x: jax.Array | None, visit, sizes, axis: int) -> jax.Array | None:
    """The block of a mask or bias whose queries and keys are these dimensions."""
    return None if x is None else _part(_part(x, visit[0], sizes[0], axis), visit[1], sizes[1], axis + 1)


def _logits(q_BxGxRxTxK, k_BxGxSxK: KVArray, mask_BxTxS, bias_BxHxTxS, cap: float) -> tuple[jax.Array, jax.Array]:
    """Of a block, ``[B, G, R, T, S]``: with everything, and after the cap alone."""
    B, G, R, T, K = q_BxGxRxTxK.shape
    capped = logits = softcap(scores(q_BxGxRxTxK.reshape(B, G, -1, K), k_BxGxSxK).reshape(B, G, R, T, -1), cap)
    if bias_BxHxTxS is not None:
        logits += bias_BxHxTxS.reshape(-1, *logits.shape[1:])
    return logits if mask_BxTxS is None else jnp.where(mask_BxTxS[:, None, None], logits, NEGATIVE), capped


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _flash(q, k, v, mask, bias, cap, causal, sizes):
    return _forward(q, k, v, mask, bias, cap, causal, sizes)[0]


def _forward(q, k, v, mask, bias, cap, causal, sizes):
    B, G, R, T, K = q.shape
    t, s = sizes

    def visit(carry, i, j):
        k_j, v_j = jax.tree.map(lambda x: _part(x, j, s, 2), (k, v))
        square = partial(_square, visit=(i, j), sizes=sizes)
        logits, _ = _logits(_part(q, i, t, 3), k_j, square(mask, axis=1), square(bias, axis=2), cap)

        def values(weights):
            return mix(weights.reshape(B, G, R * t, s), v_j, q.dtype).reshape(B, G, R, t, K)

        parts = online_softmax_update(*(_part(x, i, t, 3) for x in carry), logits, values)
        return tuple(_put(x, part, i, 3) for x, part in zip(carry, parts, strict=True))

    carry = jnp.full((B, G, R, T), NEGATIVE), jnp.zeros((B, G, R, T)), jnp.zeros((B, G, R, T, K))
    top, total, out = _walk(visit, carry, _visits(T, k.shape[2], sizes, causal))
    out = (out / total[..., None]).astype(q.dtype)
    return out, (q, k, v, mask, bias, out, top, total)


def _backward(cap, causal, sizes, residuals, dout):
    q, k, v, mask, bias, out, top, total = residuals
    if isinstance(k, QuantizedKV):
        raise NotImplementedError("a rounded cache has no gradient")
    t, s = sizes
    delta = jnp.sum(dout.astype(jnp.float32) * out, -1)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def visit(carry, i, j):
        dq, dk, dv, dbias = carry
        q_i, out_i, k_j, v_j = _part(q, i, t, 3), _part(dout, i, t, 3), _part(k, j, s, 2), _part(v, j, s, 2)
        top_i, total_i, delta_i = (_part(x, i, t, 3)[..., None] for x in (top, total, delta))
        square = partial(_square, visit=(i, j), sizes=sizes)
        mask_ij = square(mask, axis=1)
        logits, capped = _logits(q_i, k_j, mask_ij, square(bias, axis=2), cap)
        weights = jnp.exp(logits - top_i) / total_i  # not by log(total) + top, which is top where nothing is seen
        dlogits = weights * (product("bgrtk,bgsk->bgrts", out_i, v_j) - delta_i)
        if mask is not None:
            dlogits = jnp.where(mask_ij[:, None, None], dlogits, 0)
        if bias is not None:
            dbias = _add_to_bias(dbias, dlogits, (i, j))
        if cap:
            dlogits *= 1 - (capped / cap) ** 2
        dlogits = dlogits.astype(q.dtype)
        dq = _add(dq, product("bgrts,bgsk->bgrtk", dlogits, k_j), i, 3)
        dk = _add(dk, product("bgrts,bgrtk->bgsk", dlogits, q_i), j, 2)
        dv = _add(dv, product("bgrts,bgrtk->bgsk", weights.astype(v.dtype), out_i), j, 2)
        return dq, dk, dv, dbias

    wanted = (q, k, v, bias)
    carry = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), wanted)
    gradients = _walk(visit, carry, _visits(q.shape[3], k.shape[2], sizes, causal))
    dq, dk, dv, dbias = jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, wanted)
    return dq, dk, dv, None, dbias


def _add(x: jax.Array, part: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    return _put(x, _part(x, i, part.shape[axis], axis) + part, i, axis)


def _add_to_bias(bias_BxHxTxS, dlogits_BxGxRxTxS, visit):
    """The gradient of a bias, which may be one for all rows, with a block's share."""
    B, G, R, t, s = dlogits_BxGxRxTxS.shape
    dbias = dlogits_BxGxRxTxS.reshape(B, G * R, t, s)
    if bias_BxHxTxS.shape[0] == 1:
        dbias = jnp.sum(dbias, 0, keepdims=True)
    rows = _part(bias_BxHxTxS, visit[0], t, 2)
    return _put(bias_BxHxTxS, _add(rows, dbias, visit[1], 3), visit[0], 2)


_flash.defvjp(_forward, _backward)
