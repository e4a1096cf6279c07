"""Magnitude pruning: the smallest weights become zeros, and the quantizers keep them so."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="sparsity")
def magnitude(dense: jax.Array, *, sparsity: float) -> jax.Array:
    """Zeroes the ``sparsity`` share (0 to 1) of smallest magnitude of every matrix ``[in, out]`` of a stack."""

    drop = round(sparsity * dense.shape[-2] * dense.shape[-1])

    def prune(matrix):
        # Bit patterns of non-negative floats are ordered like the floats.
        keys = jax.lax.bitcast_convert_type(jnp.abs(matrix.astype(jnp.float32)), jnp.int32)
        limit = _kth_smallest(keys, drop)
        below, equal = keys < limit, keys == limit
        # Of equal magnitudes (bfloat16 has many) just as many are dropped as are due, the first ones.
        index = jnp.where(equal, jnp.arange(keys.size, dtype=jnp.int32).reshape(keys.shape), keys.size)
        last = _kth_smallest(index, drop - below.sum())
        return jnp.where(below | (index <= last) & equal, 0, matrix)

    return jax.vmap(prune)(dense.reshape(-1, *dense.shape[-2:])).reshape(dense.shape) if drop else dense


def _kth_smallest(keys: jax.Array, k: int | jax.Array) -> jax.Array:
    """The k-th smallest (from 1) non-negative int32, found bit by bit: 31 counts, a ninth of the time of a sort."""

    def set_bit(i, value):
        larger = value | (1 << 30 - i)
        return jnp.where(jnp.sum(keys < larger) < k, larger, value)

    return jax.lax.fori_loop(0, 31, set_bit, jnp.int32(0))


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def n_of_m(dense: jax.Array, *, n: int, m: int, axis: int = -2) -> jax.Array:
    """Keeps at most the ``n`` largest of every ``m`` consecutive weights along the contraction axis (N:M sparsity).

    A last group shorter than ``m`` also keeps ``n``.
    """
    w = jnp.moveaxis(dense, axis, -1)
    groups = jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, -w.shape[-1] % m)])
    groups = groups.reshape(*groups.shape[:-1], -1, m)
    # Rank among the group, largest first and earlier first among equals: the weights that beat each one.
    size = jnp.abs(groups)
    beats = size[..., None, :] > size[..., :, None]
    ties = (size[..., None, :] == size[..., :, None]) & jnp.tri(m, m, -1, bool)
    kept = jnp.where((beats | ties).sum(-1) < n, groups, 0)
    return jnp.moveaxis(kept.reshape(*w.shape[:-1], -1)[..., : w.shape[-1]], -1, axis)
