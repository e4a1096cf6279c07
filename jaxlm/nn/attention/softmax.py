"""The online softmax, by which attention sees its keys a block at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["add_sinks", "online_softmax_update", "sinks_gradient"]


def online_softmax_update(
    top: jax.Array, total: jax.Array, out: jax.Array, logits: jax.Array, mix: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of an online softmax (arXiv:1805.02867): adds a block of S keys to what was summed so far.

    The attention output is ``out / total`` after the last block. Start with ``top`` at ``MASKED_LOGIT`` and zeros.

    Args:
        top: the largest logit so far, ``[...]``.
        total: the sum of the weights so far, relative to ``exp(top)``, ``[...]``.
        out: the sum of the weighted values so far, ``[..., K]``.
        logits: those of the new keys, ``[..., S]``.
        mix: from weights ``[..., S]`` to the sum of the new values weighted by them, ``[..., K]``.

    Returns:
        ``top``, ``total`` and ``out`` with the new keys.
    """
    highest = jnp.maximum(top, jnp.max(logits, -1))
    weights, rescale = jnp.exp(logits - highest[..., None]), jnp.exp(top - highest)
    return highest, rescale * total + jnp.sum(weights, -1), rescale[..., None] * out + mix(weights)


def add_sinks(
    top: jax.Array, total: jax.Array, out: jax.Array, sinks: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sums of ``online_softmax_update`` with attention sinks: a further logit ``[...]``, whose value is 0 (gpt-oss;
    arXiv:2309.17453, section 3.2). Without sinks, the sums as they are."""
    if sinks is None:
        return top, total, out
    logits = jnp.broadcast_to(sinks.astype(jnp.float32), top.shape)[..., None]
    return online_softmax_update(top, total, out, logits, lambda weights: jnp.zeros_like(out))


def sinks_gradient(
    sinks: jax.Array | None, top: jax.Array, total: jax.Array, delta: jax.Array, axes: tuple[int, ...]
) -> jax.Array | None:
    """The gradient of sinks, which are 1 in the dimensions ``axes``; ``delta`` is the sum of output times gradient."""
    if sinks is None:
        return None
    weights = jnp.exp(sinks.astype(jnp.float32) - top) / total
    return -jnp.sum(weights * delta, axes, keepdims=True).astype(sinks.dtype)
