"""Optimizers that keep weights at zero: gradual magnitude pruning, RigL, and the decay of SR-STE.

Pruned weights are zeros in the parameters themselves, so validation, checkpoints, averages and the exported model see
the sparse model without a separate mask. Gradual pruning never takes a pruned weight back: zero is the smallest
magnitude (in the paper too a masked weight gets no gradient). RigL does, by the gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.compression.schedule import cosine, cubic, pruned_counts, regrow, smallest_of_each
from jaxlm.core.errors import UserError
from jaxlm.training.config import PruneConfig

__all__ = ["SparseState", "sr_ste_decay", "prunable_matrices", "with_sparsity"]


class SparseState(NamedTuple):
    count: jax.Array  # int32: updates so far; a skipped bad update does not count, so that no pruning is lost with it
    masks: dict[str, jax.Array]  # bool, by path of the pruned matrices: True where a weight may differ from zero
    inner: optax.OptState


def prunable_matrices(pattern: str, params: dict[str, jax.Array]) -> list[str]:
    """The paths of the matrices to prune.

    Raises:
        UserError: when ``pattern`` matches no parameter, or one that is no kernel and no table.
    """
    paths = [path for path in params if re.fullmatch(pattern, path)]
    if not paths:
        raise UserError(f"prune.target {pattern!r} matches no parameter; see `jaxlm inspect`")
    for path in paths:
        if not path.endswith(("/kernel", "/table")):
            raise UserError(f"prune.target matches {path}; only kernels and tables are pruned")
    return paths


def with_sparsity(tx: optax.GradientTransformation, config: PruneConfig, end: int) -> optax.GradientTransformation:
    """``tx`` over flat dicts, with weights kept at zero; the pruned set changes for the last time at update ``end``.

    - ``gradual``: after update t the share ``sparsity * cubic(t)`` of each matrix is zero: the weights of smallest
      magnitude.
    - ``rigl``: after update ``begin`` the final share of each matrix is zero: the weights of smallest magnitude, a
      random set where the weights are random. At each change the share ``drop * cosine(t)`` of the remaining weights is
      exchanged for the pruned weights of largest gradient, which start at zero (``schedule.regrow``). The optimizer's
      own update comes first; the paper's algorithm skips it at a change.

    The moments of weights that leave or join are set to zero. ``update`` needs the gradient of the whole step. The
    gradients of pruned weights are read only at a change and never reach ``tx``.

    Raises:
        UserError: when a field of ``config`` is out of range.
    """
    _check(config, end)
    change = _mask_change(config, end)

    def init(params):
        masks = {path: jnp.ones_like(params[path], bool) for path in prunable_matrices(config.target, params)}
        return SparseState(jnp.zeros((), jnp.int32), masks, tx.init(params))

    def update(grads, state, params):
        finals = pruned_counts({path: mask.shape for path, mask in state.masks.items()}, config.sparsity,
                               config.distribution)
        updates, inner = tx.update(_where(state.masks, grads, jnp.zeros_like), state.inner, params)
        updates = _keep_zero(state.masks, updates, params)

        def changed():
            masks = {path: change(params[path] + updates[path], grads[path], mask, state.count, finals[path])
                     for path, mask in state.masks.items()}
            stays = {path: state.masks[path] & masks[path] if path in masks else True for path in params}
            return masks, optax.tree.map_params(tx, lambda leaf, stays: jnp.where(stays, leaf, 0), inner, stays)

        masks, inner = jax.lax.cond(_due(config, end, state.count), changed, lambda: (state.masks, inner))
        return _keep_zero(masks, updates, params), SparseState(state.count + 1, masks, inner)

    return optax.GradientTransformation(init, update)


def _check(config: PruneConfig, end: int) -> None:
    """Raises UserError where a field is out of range."""
    if not 0 < config.sparsity < 1:
        raise UserError(f"prune.sparsity={config.sparsity} must be more than 0 and less than 1")
    if not 0 <= config.begin < end or config.every < 1:
        raise UserError(
            f"prune.begin={config.begin}, prune.end={end}, prune.every={config.every}: begin before the end, every 1 "
            "or more"
        )
    if not 0 <= config.drop <= 1:
        raise UserError(f"prune.drop={config.drop} must be a share of the weights, from 0 to 1")


def _due(config: PruneConfig, end: int, t: jax.Array) -> jax.Array:
    """Whether the masks change at update ``t``."""
    begin = config.begin
    regular = (t >= begin) & (t < end) & ((t - begin) % config.every == 0)
    return regular | (t == end) if config.method == "gradual" else regular


def _mask_change(config: PruneConfig, end: int) -> Callable[..., jax.Array]:
    """``(weight, gradient, mask, t, zeros at the end) -> mask`` of a matrix, as ``config.method`` says."""
    begin = config.begin

    def gradual(weight, gradient, mask, t, final):
        share = cubic(t, begin, end)
        count = jnp.where(share < 1, jnp.round(share * final).astype(jnp.int32), final)
        return ~smallest_of_each(jnp.abs(weight), count)

    def rigl(weight, gradient, mask, t, final):
        left = weight.shape[-2] * weight.shape[-1] - final
        count = jnp.round(config.drop * cosine(t, begin, end) * left).astype(jnp.int32)
        return jax.lax.cond(
            t == begin,
            lambda: ~smallest_of_each(jnp.abs(weight), final), lambda: regrow(weight, gradient, mask, count),
        )

    return {"gradual": gradual, "rigl": rigl}[config.method]


def _where(masks: dict, tree: dict, otherwise: Callable) -> dict:
    return tree | {path: jnp.where(mask, tree[path], otherwise(tree[path])) for path, mask in masks.items()}


def _keep_zero(masks: dict, updates: dict, params: dict) -> dict:
    """Updates that make the weights outside the masks zero."""
    return updates | {path: jnp.where(mask, updates[path], -params[path]) for path, mask in masks.items()}


def sr_ste_decay(
    prune: Callable[[dict[str, jax.Array]], dict[str, jax.Array]], decay: float, begin: int
) -> optax.GradientTransformation:
    """From update ``begin`` on, adds ``decay`` times each weight that ``prune`` would set to zero to its gradient, so
    that fewer weights move in and out of the pruned set (SR-STE, arXiv:2102.04010, equation 9)."""

    def update(grads, count, params):
        strength = jnp.where(count >= begin, decay, 0.0)
        pruned = prune(params)
        return {path: grad + strength * (params[path] - pruned[path]) for path, grad in grads.items()}, count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
