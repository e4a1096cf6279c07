"""Pruning by a score for each weight, its magnitude or Wanda's: the weights of the lowest scores become zeros."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import CalibratedLayer, LayerParams
from jaxlm.compression.input_statistics import observe_inputs, replace_idle_experts
from jaxlm.compression.observers import moments
from jaxlm.compression.steps import LAYER_KERNELS, LayerStep, Step, WeightStep, check_sparsity
from jaxlm.core.tree import Leaf
from jaxlm.nn.config import ModelConfig

__all__ = [
    "Magnitude", "NofM", "Wanda", "largest_mask", "magnitude", "n_of_m", "n_of_m_mask", "smallest_mask", "wanda",
]  # fmt: skip


@functools.partial(jax.jit, static_argnames="sparsity")
def magnitude(dense: jax.Array, *, sparsity: float) -> jax.Array:
    """Zeroes the ``sparsity`` share (0 to 1) of smallest magnitude, rounded up, of every matrix of a stack."""
    drop = math.ceil(sparsity * dense.shape[-2] * dense.shape[-1] - 1e-6)

    def prune(matrix):
        return jnp.where(smallest_mask(jnp.abs(matrix.astype(jnp.float32)), drop), 0, matrix)

    return jax.vmap(prune)(dense.reshape(-1, *dense.shape[-2:])).reshape(dense.shape) if drop else dense


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def n_of_m(dense: jax.Array, *, n: int, m: int, axis: int = -2) -> jax.Array:
    """Keeps at most the ``n`` largest of every ``m`` consecutive weights along the contraction axis (N:M sparsity).

    A last group shorter than ``m`` keeps ``n`` too.
    """
    w = jnp.moveaxis(dense, axis, -1)
    return jnp.moveaxis(jnp.where(n_of_m_mask(jnp.abs(w), n, m), w, 0), -1, axis)


@functools.partial(jax.jit, static_argnames=("sparsity", "n", "m"))
def wanda(w_OxI: jax.Array, norms_I: jax.Array, *, sparsity: float | None = None, n: int = 0, m: int = 0) -> jax.Array:
    """Zeroes, of the weights of each output, those of the smallest ``|w_i| * |x_i|`` (Wanda, arXiv:2306.11695).

    Args:
        w_OxI: ``[..., out, in]``.
        norms_I: the root of the mean or sum of squares of each input, ``sqrt(diag(H))``, ``[..., in]``.
        sparsity: the share of each output's weights to drop, rounded down; or None, with ``n`` and ``m``:
        n, m: keeps ``n`` of every ``m`` inputs.
    """
    score_OxI = jnp.abs(w_OxI.astype(jnp.float32)) * norms_I[..., None, :]
    if sparsity is None:
        return jnp.where(n_of_m_mask(score_OxI, n, m), w_OxI, 0)
    n_in = w_OxI.shape[-1]
    rows = jax.vmap(functools.partial(smallest_mask, drop=int(sparsity * n_in + 1e-6)))
    return jnp.where(rows(score_OxI.reshape(-1, n_in)).reshape(w_OxI.shape), 0, w_OxI)


def smallest_mask(score: jax.Array, drop: int | jax.Array) -> jax.Array:
    """A mask of exactly the ``drop`` smallest of all scores (non-negative float32); of equal scores the first count."""
    # Bit patterns of non-negative floats are ordered like the floats.
    keys = jax.lax.bitcast_convert_type(score, jnp.int32)
    limit = _kth_smallest(keys, drop)
    below, equal = keys < limit, keys == limit
    wanted = drop - below.sum()
    index = jnp.where(equal, jnp.arange(keys.size, dtype=jnp.int32).reshape(keys.shape), keys.size)
    last = _kth_smallest(index, wanted, searched=equal.sum() > wanted)  # nearly always all of them are wanted
    return (below | (index <= last) & equal) & (drop > 0)


def _kth_smallest(keys: jax.Array, k: int | jax.Array, searched: bool | jax.Array = True) -> jax.Array:
    """The k-th smallest (from 1) non-negative int32, found bit by bit: 31 counts, in a fraction of the time of a sort.
    Where it is not ``searched``, some number that none of them exceeds."""
    exact = jnp.float32 if keys.ndim > 1 and max(keys.shape) <= 2**24 else jnp.int32  # sums of float32 are faster

    def set_bit(state):
        i, value = state
        larger = value | (1 << 30 - i)
        count = jnp.sum(jnp.where(keys < larger, 1, 0).astype(exact), axis=0).astype(jnp.int32).sum()
        return i + 1, jnp.where(count < k, larger, value)

    start = jnp.where(searched, 0, 31), jnp.where(searched, 0, jnp.iinfo(jnp.int32).max)
    return jax.lax.while_loop(lambda state: state[0] < 31, set_bit, start)[1]


def largest_mask(score: jax.Array, n: int) -> jax.Array:
    """A mask of the ``n`` largest scores along the last axis, which is short; of equal scores the first count."""
    # The rank of a score in its group is the number of scores that beat it.
    beats = score[..., None, :] > score[..., :, None]
    ties = (score[..., None, :] == score[..., :, None]) & jnp.tri(score.shape[-1], k=-1, dtype=bool)
    return (beats | ties).sum(-1) < n


def n_of_m_mask(score: jax.Array, n: int, m: int) -> jax.Array:
    """A mask of the ``n`` largest of every ``m`` scores along the last axis; scores are not negative."""
    groups = jnp.pad(score, [(0, 0)] * (score.ndim - 1) + [(0, -score.shape[-1] % m)], constant_values=-1)
    kept = largest_mask(groups.reshape(*groups.shape[:-1], -1, m), n)
    return kept.reshape(groups.shape)[..., : score.shape[-1]]


@dataclass(frozen=True)
class Magnitude(WeightStep):
    """Zeroes the ``sparsity`` share of smallest magnitude in each matrix."""

    kind: ClassVar[str] = "magnitude"
    prunes: ClassVar[bool] = True
    sparsity: float
    target: str = LAYER_KERNELS

    def __post_init__(self):
        check_sparsity(self.sparsity, 0, 0)

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        return magnitude(dense, sparsity=self.sparsity)


@dataclass(frozen=True)
class NofM(WeightStep):
    """Keeps the ``n`` largest of every ``m`` consecutive inputs of an output channel."""

    kind: ClassVar[str] = "n_of_m"
    prunes: ClassVar[bool] = True
    n: int
    m: int
    target: str = LAYER_KERNELS

    def __post_init__(self):
        check_sparsity(0, self.n, self.m)

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        return n_of_m(dense, n=self.n, m=self.m, axis=axis)


@dataclass(frozen=True)
class Wanda(LayerStep):
    """Wanda (arXiv:2306.11695): drops, of the weights of each output, those of least magnitude times input norm."""

    kind: ClassVar[str] = "wanda"
    sparsity: float = 0.0
    n: int = 0
    m: int = 0
    target: str = LAYER_KERNELS

    def __post_init__(self):
        check_sparsity(self.sparsity, self.n, self.m)

    def without_data(self, config: ModelConfig) -> tuple[Step, ...]:
        return ()

    def solve(self, layer: CalibratedLayer) -> LayerParams:
        statistics = observe_inputs(layer, moments)

        def prune(name):
            norms = jnp.sqrt(statistics[name]["square"])
            if statistics[name]["count"].ndim:
                norms = replace_idle_experts(layer, name, statistics[name], "pruned by magnitude", norms)
            share = None if self.m else self.sparsity
            w_OxI = wanda(layer.params[name].swapaxes(-1, -2), norms, sparsity=share, n=self.n, m=self.m)
            return w_OxI.swapaxes(-1, -2)

        return layer.params | {name: prune(name) for name in layer.targets}
