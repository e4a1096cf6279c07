"""The online softmax, by which attention sees its keys a block at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["online_softmax_update"]


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
