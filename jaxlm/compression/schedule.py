"""Compression in training: weights that are used in their compressed form, and schedules of pruning.

These are pure functions; ``training.compression_aware`` and ``training.optimizers.sparsity`` use them in the training
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.compression.prune.scores import smallest_mask
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.steps import WeightStep, apply_step
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import FakeQuant, QArray, dequantize, expand_groups, is_leaf, straight_through
from jaxlm.core.tree import Leaf, Params, Transform


def fake_compress(recipe: Recipe, begin: int = 0) -> Callable[[jax.Array], Transform]:
    """The Transform of the parameters at a training step: from step ``begin`` on, weights have the values that
    ``recipe`` gives them, and gradients go straight through to the dense weights (arXiv:1308.3432; with N:M pruning,
    arXiv:2102.04010).

    The values equal ``dequantize(recipe.apply(params))`` bit by bit, and ``ops.dot`` rounds activations where the
    recipe says so.

    Raises:
        UserError: when a step of the recipe is not a ``WeightStep``.
    """
    for step in recipe.steps:
        if not isinstance(step, WeightStep):
            raise UserError(
                f"qat.recipe {recipe.name!r}: a {step.kind} step cannot be used in training, because it looks at more "
                "than one weight; use a recipe that rounds to nearest, as w4a16-rtn-g64 or w8a8-dynamic, or prunes by "
                "magnitude"
            )

    def at(now: jax.Array) -> Transform:
        active = now >= begin

        def transform(params: Params) -> Params:
            for step in recipe.steps:
                params = apply_step(step, params, partial(fake, step))
            return params

        def fake(step: WeightStep, leaf: Leaf, axis: int) -> Leaf:
            return fake_leaf(leaf, step.weight(leaf, axis), active)

        return transform

    return at


def fake_leaf(dense: jax.Array, compressed: Leaf, active: jax.Array | bool = True) -> jax.Array | FakeQuant:
    """A weight with the values of its compressed form and straight-through gradients; its own values if not ``active``.

    No gradient passes where an integer grid clips, that is, where the value is off by more than half a step.
    """
    active, inside, compressed = jnp.asarray(active), True, jax.lax.stop_gradient(compressed)
    if isinstance(compressed, QArray) and jnp.issubdtype(compressed.codes.dtype, jnp.integer):
        step = expand_groups(compressed.scale, compressed.group, compressed.codes.shape[-1])
        step = step.swapaxes(-1, -2) if compressed.axis == -2 else step
        inside = jnp.abs(dense - dequantize(compressed)) <= 0.501 * step
    values = jnp.where(active, dequantize(compressed, dense.dtype), dense)
    values = straight_through(dense, values, inside | ~active)
    if not is_leaf(compressed):
        return values
    if not (isinstance(compressed, QArray) and compressed.act_bits):
        return FakeQuant(values)
    return FakeQuant(values, compressed, jnp.broadcast_to(active, (*dense.shape[:-2], 1, 1)))


def pruning_of(recipe: Recipe) -> Recipe:
    """The recipe with those of its steps that prune, and no others."""
    return Recipe(
        tuple(step for step in recipe.steps if isinstance(step, WeightStep) and step.prunes), name=recipe.name
    )


def cubic(t: jax.Array, begin: int, end: int) -> jax.Array:
    """The share of the final sparsity at step ``t``: ``1 - (1 - (t - begin) / (end - begin))**3`` from ``begin`` to
    ``end``, 0 before, 1 after (arXiv:1710.01878, equation 1, from a sparsity of 0)."""
    return 1 - (1 - _progress(t, begin, end)) ** 3


def cosine(t: jax.Array, begin: int, end: int) -> jax.Array:
    """Half a cosine that falls from 1 at step ``begin`` to 0 at ``end`` (arXiv:1911.11134, section 3, item 3)."""
    return 0.5 * (1 + jnp.cos(jnp.pi * _progress(t, begin, end)))


def _progress(t: jax.Array, begin: int, end: int) -> jax.Array:
    return jnp.clip((jnp.asarray(t, jnp.float32) - begin) / max(end - begin, 1), 0, 1)


def pruned_counts(
    shapes: Mapping[str, tuple[int, ...]], sparsity: float, distribution: Literal["uniform", "erdos_renyi"]
) -> dict[str, int]:
    """The number of zeros in each matrix ``[in, out]`` (in each matrix of a stack) for a ``sparsity`` of all together.

    Args:
        shapes: the shape of each weight by path.
        sparsity: the share of zeros among all weights.
        distribution: "uniform": the same share in each matrix. "erdos_renyi": the density of a matrix is proportional
            to ``(in + out) / (in * out)``, so that larger matrices are sparser. Matrices whose density would exceed 1
            stay dense, and the others make up for it (arXiv:1911.11134, section 3, item 1).
    """
    sizes = {path: math.prod(shape[-2:]) for path, shape in shapes.items()}
    if distribution == "uniform":
        return {path: round(sparsity * size) for path, size in sizes.items()}
    weights = {path: math.prod(shape) for path, shape in shapes.items()}
    raw = {path: sum(shape[-2:]) / sizes[path] for path, shape in shapes.items()}
    nonzero, full = (1 - sparsity) * sum(weights.values()), set()
    while True:
        kept = nonzero - sum(weights[path] for path in full)
        factor = kept / sum(raw[path] * weights[path] for path in shapes if path not in full)
        more = {path for path in shapes if path not in full and factor * raw[path] > 1}
        if not more:
            return {path: 0 if path in full else round((1 - factor * raw[path]) * sizes[path]) for path in shapes}
        full |= more


def regrow(weight: jax.Array, gradient: jax.Array, mask: jax.Array, count: jax.Array) -> jax.Array:
    """RigL's update of the mask, a matrix at a time (arXiv:1911.11134, algorithm 1): the ``count`` weights of smallest
    magnitude leave the mask, and of all weights then outside it the ``count`` of largest gradient join it."""
    kept = mask & ~smallest_of_each(jnp.where(mask, jnp.abs(weight), jnp.inf), count)
    outside = jnp.maximum(jnp.abs(gradient), jnp.finfo(jnp.float32).tiny)  # above the 0 of kept weights, always
    return kept | ~smallest_of_each(jnp.where(kept, 0, outside), math.prod(weight.shape[-2:]) - count)


def smallest_of_each(scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """A mask of the ``count`` smallest scores of each matrix of a stack. Scores are non-negative float32; ``count`` may
    be traced."""
    matrices = scores.reshape(-1, *scores.shape[-2:])
    return jax.vmap(partial(smallest_mask, drop=count))(matrices).reshape(scores.shape)
