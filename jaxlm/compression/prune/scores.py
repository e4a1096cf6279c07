"""Pruning by a score a weight, magnitude or Wanda: the lowest become zeros, and the quantizers keep them so."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="sparsity")
def magnitude(dense: jax.Array, *, sparsity: float) -> jax.Array:
    """Zeroes the ``sparsity`` share (0 to 1) of smallest magnitude, rounded up, of every matrix of a stack."""
    drop = math.ceil(sparsity * dense.shape[-2] * dense.shape[-1] - 1e-6)

    def prune(matrix):
        return jnp.where(smallest(jnp.abs(matrix.astype(jnp.float32)), drop), 0, matrix)

    return jax.vmap(prune)(dense.reshape(-1, *dense.shape[-2:])).reshape(dense.shape) if drop else dense


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def n_of_m(dense: jax.Array, *, n: int, m: int, axis: int = -2) -> jax.Array:
    """Keeps at most the ``n`` largest of every ``m`` consecutive weights along the contraction axis (N:M sparsity).

    A last group shorter than ``m`` also keeps ``n``.
    """
    w = jnp.moveaxis(dense, axis, -1)
    return jnp.moveaxis(jnp.where(pattern(jnp.abs(w), n, m), w, 0), -1, axis)


@functools.partial(jax.jit, static_argnames=("sparsity", "n", "m"))
def wanda(w_OxI: jax.Array, norms_I: jax.Array, *, sparsity: float | None = None, n: int = 0, m: int = 0) -> jax.Array:
    """Zeroes, of every output's weights ``[..., out, in]``, those of least ``|w_i| * |x_i|`` (Wanda, arXiv:2306.11695).

    ``norms_I`` ``[..., in]`` are the root mean (or sum of) squares of the inputs, ``sqrt(diag(H))``. Drops the
    ``sparsity`` share of each output, rounded down, or all but ``n`` of every ``m`` inputs.
    """
    score_OxI = jnp.abs(w_OxI.astype(jnp.float32)) * norms_I[..., None, :]
    if sparsity is None:
        return jnp.where(pattern(score_OxI, n, m), w_OxI, 0)
    n_in = w_OxI.shape[-1]
    rows = jax.vmap(functools.partial(smallest, drop=int(sparsity * n_in + 1e-6)))
    return jnp.where(rows(score_OxI.reshape(-1, n_in)).reshape(w_OxI.shape), 0, w_OxI)


def smallest(score: jax.Array, drop: int | jax.Array) -> jax.Array:
    """A mask of exactly the ``drop`` smallest of all non-negative float32 scores; of equal ones the first."""
    # Bit patterns of non-negative floats are ordered like the floats.
    keys = jax.lax.bitcast_convert_type(score, jnp.int32)
    limit = _kth_smallest(keys, drop)
    below, equal = keys < limit, keys == limit
    index = jnp.where(equal, jnp.arange(keys.size, dtype=jnp.int32).reshape(keys.shape), keys.size)
    last = _kth_smallest(index, drop - below.sum())
    return (below | (index <= last) & equal) & (drop > 0)


def _kth_smallest(keys: jax.Array, k: int | jax.Array) -> jax.Array:
    """The k-th smallest (from 1) non-negative int32, found bit by bit: 31 counts, a ninth of the time of a sort."""

    def set_bit(i, value):
        larger = value | (1 << 30 - i)
        return jnp.where(jnp.sum(keys < larger) < k, larger, value)

    return jax.lax.fori_loop(0, 31, set_bit, jnp.int32(0))


def largest(score: jax.Array, n: int) -> jax.Array:
    """A mask of the ``n`` largest scores along the last axis, which is short; of equal ones the first."""
    # Rank among the group: the scores that beat each one.
    beats = score[..., None, :] > score[..., :, None]
    ties = (score[..., None, :] == score[..., :, None]) & jnp.tri(score.shape[-1], k=-1, dtype=bool)
    return (beats | ties).sum(-1) < n


def pattern(score: jax.Array, n: int, m: int) -> jax.Array:
    """A mask of the ``n`` largest of every ``m`` scores, which are non-negative, along the last axis."""
    groups = jnp.pad(score, [(0, 0)] * (score.ndim - 1) + [(0, -score.shape[-1] % m)], constant_values=-1)
    kept = largest(groups.reshape(*groups.shape[:-1], -1, m), n)
    return kept.reshape(groups.shape)[..., : score.shape[-1]]
