"""Attention a block at a time, on every platform (FlashAttention, arXiv:2205.14135).

At any time only the logits of one block of queries with one block of keys exist; an online softmax adds the blocks up.
So memory grows with the length and not with its square, a block stays in the processor's cache, and blocks that the
causal mask hides are not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.attention.masks import MASKED_LOGIT
from jaxlm.nn.attention.quantized_kv import KVArray, QuantizedKV, query_key_scores, weighted_values
from jaxlm.nn.attention.softmax import add_sinks, online_softmax_update, sinks_gradient
from jaxlm.nn.layers import softcap

__all__ = ["flash_attend", "uses_flash"]

_BLOCK = 128  # queries, and keys, of a block


def uses_flash(queries: int, keys: int) -> bool:
    """Whether attention over these lengths goes block by block: it does if there are more than four blocks. Four or
    fewer are no faster on CPU than all logits at once."""
    return min(queries, keys) >= _BLOCK and queries * keys > 4 * _BLOCK**2


def flash_attend(
    q_BxGxRxTxK: jax.Array,
    k_BxGxSxK: KVArray,
    v_BxGxSxK: KVArray,
    mask_BxTxS: jax.Array | None,
    bias_BxHxTxS: jax.Array | None = None,
    *,
    sinks_H: jax.Array | None = None,
    cap: float = 0.0,
    causal: bool = False,
) -> jax.Array:
    """Softmax attention ``[B, G, R, T, K]``; each of the G key heads is read by R query heads.

    Queries come scaled. Mask, bias and sinks are as for ``nn.attention.layer.attend``. ``causal`` promises that the
    mask hides every key after the query of the same number. A query that attends to nothing gets some mean of the
    values. The backward pass computes the logits again (section 3.1 of the paper). Quantized keys and values have no
    gradient.
    """
    T, S = q_BxGxRxTxK.shape[3], k_BxGxSxK.shape[2]
    sizes = _block_size(T), _block_size(S)
    more_T, more_S = -T % sizes[0], -S % sizes[1]
    if more_S and mask_BxTxS is None:
        mask_BxTxS = jnp.ones((1, 1, S), bool)
    q_BxGxRxTxK = _padded(q_BxGxRxTxK, more_T, 3)
    k_BxGxSxK, v_BxGxSxK = jax.tree.map(lambda x: _padded(x, more_S, 2), (k_BxGxSxK, v_BxGxSxK))
    if mask_BxTxS is not None:
        mask_BxTxS = _padded(_padded(mask_BxTxS, more_T, 1), more_S, 2)
    if bias_BxHxTxS is not None:
        bias_BxHxTxS = _padded(_padded(bias_BxHxTxS, more_T, 2), more_S, 3)
    sinks_1xGxRx1 = None if sinks_H is None else sinks_H.reshape(1, *q_BxGxRxTxK.shape[1:3], 1)
    out_BxGxRxTxK = _flash(
        q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK, mask_BxTxS, bias_BxHxTxS, sinks_1xGxRx1, cap, causal, sizes
    )
    return out_BxGxRxTxK[:, :, :, :T]


def _block_size(length: int) -> int:
    """Queries or keys of a block. Short sequences get small blocks, of which the causal mask hides more."""
    return _BLOCK if length < 1024 else 2 * _BLOCK


def _padded(x: jax.Array, count: int, axis: int) -> jax.Array:
    """``x`` with ``count`` zeros at the end of a dimension, unless that dimension broadcasts (its size is 1)."""
    if not count or x.shape[axis] == 1:
        return x
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])


def _block(x: jax.Array, i: jax.Array, size: int, axis: int) -> jax.Array:
    """Block i of a dimension, or all of a dimension that broadcasts."""
    return x if x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _block_pair(x: jax.Array | None, pair: tuple, sizes: tuple[int, int], axis: int) -> jax.Array | None:
    """The block of a mask or bias whose queries are dimension ``axis`` and whose keys are the next."""
    return None if x is None else _block(_block(x, pair[0], sizes[0], axis), pair[1], sizes[1], axis + 1)


def _with_block(x: jax.Array, block: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    """``x`` with block i of a dimension replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, block, i * block.shape[axis], axis)


def _plus_block(x: jax.Array, block: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    """``x`` with ``block`` added to block i of a dimension."""
    return _with_block(x, _block(x, i, block.shape[axis], axis) + block, i, axis)


def _visible_pairs(T: int, S: int, sizes: tuple[int, int], causal: bool) -> np.ndarray:
    """Numbers of the blocks of queries and keys that attend to each other, int32 ``[pairs, 2]``."""
    pairs = np.argwhere(np.ones((T // sizes[0], S // sizes[1]), bool)).astype(np.int32)
    last_query, first_key = (pairs[:, 0] + 1) * sizes[0] - 1, pairs[:, 1] * sizes[1]
    return pairs[first_key <= last_query] if causal else pairs


def _for_each_pair(visit: Callable, carry, pairs: np.ndarray):
    """``carry`` after ``visit(carry, i, j)`` of every pair.

    It is a loop that JAX does not take apart: where layers are scanned, it would compute the masks of all pairs
    beforehand, which is one value for each logit.
    """

    def visit_next(state):
        n, carry = state
        i, j = jnp.asarray(pairs)[n]
        return n + 1, visit(carry, i, j)

    return jax.lax.while_loop(lambda state: state[0] < len(pairs), visit_next, (jnp.int32(0), carry))[1]


def _logits(
    q_BxGxRxTxK, k_BxGxSxK: KVArray, mask_BxTxS, bias_BxHxTxS, cap: float
) -> tuple[jax.Array, jax.Array]:
    """The logits of a block ``[B, G, R, T, S]``: after cap, bias and mask; and after the cap alone."""
    B, G, R, T, K = q_BxGxRxTxK.shape
    scores_BxGxQxS = query_key_scores(q_BxGxRxTxK.reshape(B, G, -1, K), k_BxGxSxK)
    capped_BxGxRxTxS = logits_BxGxRxTxS = softcap(scores_BxGxQxS.reshape(B, G, R, T, -1), cap)
    if bias_BxHxTxS is not None:
        logits_BxGxRxTxS += bias_BxHxTxS.reshape(-1, *logits_BxGxRxTxS.shape[1:])
    if mask_BxTxS is not None:
        logits_BxGxRxTxS = jnp.where(mask_BxTxS[:, None, None], logits_BxGxRxTxS, MASKED_LOGIT)
    return logits_BxGxRxTxS, capped_BxGxRxTxS


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _flash(q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK, mask_BxTxS, bias_BxHxTxS, sinks_1xGxRx1, cap, causal, sizes):
    return _forward(
        q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK, mask_BxTxS, bias_BxHxTxS, sinks_1xGxRx1, cap, causal, sizes
    )[0]


def _forward(q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK, mask_BxTxS, bias_BxHxTxS, sinks_1xGxRx1, cap, causal, sizes):
    B, G, R, T, K = q_BxGxRxTxK.shape
    t, s = sizes  # queries and keys of a block

    def visit(sums, i, j):
        q_BxGxRxtxK = _block(q_BxGxRxTxK, i, t, 3)
        k_BxGxsxK, v_BxGxsxK = jax.tree.map(lambda x: _block(x, j, s, 2), (k_BxGxSxK, v_BxGxSxK))
        mask_Bxtxs = _block_pair(mask_BxTxS, (i, j), sizes, axis=1)
        bias_BxHxtxs = _block_pair(bias_BxHxTxS, (i, j), sizes, axis=2)
        logits_BxGxRxtxs, _ = _logits(q_BxGxRxtxK, k_BxGxsxK, mask_Bxtxs, bias_BxHxtxs, cap)

        def mix(weights_BxGxRxtxs):
            weights_BxGxQxs = weights_BxGxRxtxs.reshape(B, G, R * t, s)
            return weighted_values(weights_BxGxQxs, v_BxGxsxK, q_BxGxRxTxK.dtype).reshape(B, G, R, t, K)

        blocks = online_softmax_update(*(_block(x, i, t, 3) for x in sums), logits_BxGxRxtxs, mix)
        return tuple(_with_block(x, block, i, 3) for x, block in zip(sums, blocks, strict=True))

    sums = jnp.full((B, G, R, T), MASKED_LOGIT), jnp.zeros((B, G, R, T)), jnp.zeros((B, G, R, T, K))
    pairs = _visible_pairs(T, k_BxGxSxK.shape[2], sizes, causal)
    sums = add_sinks(*_for_each_pair(visit, sums, pairs), sinks_1xGxRx1)
    top_BxGxRxT, total_BxGxRxT, out_BxGxRxTxK = sums
    out_BxGxRxTxK = (out_BxGxRxTxK / total_BxGxRxT[..., None]).astype(q_BxGxRxTxK.dtype)
    inputs = q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK, mask_BxTxS, bias_BxHxTxS, sinks_1xGxRx1
    return out_BxGxRxTxK, (*inputs, out_BxGxRxTxK, top_BxGxRxT, total_BxGxRxT)


def _backward(cap, causal, sizes, residuals, dout_BxGxRxTxK):
    q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK, mask_BxTxS, bias_BxHxTxS, sinks_1xGxRx1, *outputs = residuals
    out_BxGxRxTxK, top_BxGxRxT, total_BxGxRxT = outputs
    if isinstance(k_BxGxSxK, QuantizedKV):
        raise NotImplementedError("quantized keys and values have no gradient")
    t, s = sizes
    delta_BxGxRxT = jnp.sum(dout_BxGxRxTxK.astype(jnp.float32) * out_BxGxRxTxK, -1)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def visit(gradients, i, j):
        dq, dk, dv, dbias = gradients
        q_BxGxRxtxK, dout_BxGxRxtxK = _block(q_BxGxRxTxK, i, t, 3), _block(dout_BxGxRxTxK, i, t, 3)
        k_BxGxsxK, v_BxGxsxK = _block(k_BxGxSxK, j, s, 2), _block(v_BxGxSxK, j, s, 2)
        top, total, delta = (_block(x, i, t, 3)[..., None] for x in (top_BxGxRxT, total_BxGxRxT, delta_BxGxRxT))
        mask_Bxtxs = _block_pair(mask_BxTxS, (i, j), sizes, axis=1)
        bias_BxHxtxs = _block_pair(bias_BxHxTxS, (i, j), sizes, axis=2)
        logits_BxGxRxtxs, capped_BxGxRxtxs = _logits(q_BxGxRxtxK, k_BxGxsxK, mask_Bxtxs, bias_BxHxtxs, cap)
        # exp(logits - top) / total, and not exp(logits - (log(total) + top)): where a query attends to nothing,
        # float32 rounds log(total) + top to top.
        weights_BxGxRxtxs = jnp.exp(logits_BxGxRxtxs - top) / total
        dlogits_BxGxRxtxs = weights_BxGxRxtxs * (einsum("bgrtk,bgsk->bgrts", dout_BxGxRxtxK, v_BxGxsxK) - delta)
        if mask_Bxtxs is not None:
            dlogits_BxGxRxtxs = jnp.where(mask_Bxtxs[:, None, None], dlogits_BxGxRxtxs, 0)
        if bias_BxHxTxS is not None:
            dbias = _plus_bias_block(dbias, dlogits_BxGxRxtxs, (i, j))
        if cap:
            dlogits_BxGxRxtxs *= 1 - (capped_BxGxRxtxs / cap) ** 2
        dlogits_BxGxRxtxs = dlogits_BxGxRxtxs.astype(q_BxGxRxTxK.dtype)
        weights_BxGxRxtxs = weights_BxGxRxtxs.astype(v_BxGxSxK.dtype)
        dq = _plus_block(dq, einsum("bgrts,bgsk->bgrtk", dlogits_BxGxRxtxs, k_BxGxsxK), i, 3)
        dk = _plus_block(dk, einsum("bgrts,bgrtk->bgsk", dlogits_BxGxRxtxs, q_BxGxRxtxK), j, 2)
        dv = _plus_block(dv, einsum("bgrts,bgrtk->bgsk", weights_BxGxRxtxs, dout_BxGxRxtxK), j, 2)
        return dq, dk, dv, dbias

    inputs = q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK, bias_BxHxTxS
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), inputs)
    pairs = _visible_pairs(q_BxGxRxTxK.shape[3], k_BxGxSxK.shape[2], sizes, causal)
    gradients = _for_each_pair(visit, zeros, pairs)
    dq, dk, dv, dbias = jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, inputs)
    dsinks = sinks_gradient(sinks_1xGxRx1, top_BxGxRxT, total_BxGxRxT, delta_BxGxRxT, (0, 3))
    return dq, dk, dv, None, dbias, dsinks


def _plus_bias_block(dbias_BxHxTxS, dlogits_BxGxRxtxs, pair: tuple):
    """The gradient of a bias, which may be one for all rows of the batch, with that of a block added."""
    B, G, R, t, s = dlogits_BxGxRxtxs.shape
    dbias_BxHxtxs = dlogits_BxGxRxtxs.reshape(B, G * R, t, s)
    if dbias_BxHxTxS.shape[0] == 1:
        dbias_BxHxtxs = jnp.sum(dbias_BxHxtxs, 0, keepdims=True)
    rows_BxHxtxS = _block(dbias_BxHxTxS, pair[0], t, 2)
    return _with_block(dbias_BxHxTxS, _plus_block(rows_BxHxtxS, dbias_BxHxtxs, pair[1], 3), pair[0], 2)


_flash.defvjp(_forward, _backward)
