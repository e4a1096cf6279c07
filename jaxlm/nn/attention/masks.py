"""Masks of attention: which keys each query attends to.

A ``MaskSpec`` describes a mask by small arrays, one entry a query or a key. Code that needs the mask of a block of
queries and keys (the ring, pages) computes it from these; the mask of a whole sequence is ``MaskSpec.mask()``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

__all__ = ["MASKED_LOGIT", "MaskSpec", "causal_mask", "window_mask"]

MASKED_LOGIT = -1e9  # finite, so that a query that attends to nothing gets uniform weights instead of NaN


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskSpec:
    """Which keys each query attends to. A slot is the index of a token in its row (padding counts)."""

    slots_q: jax.Array  # int32 [B or 1, T]
    slots_k: jax.Array  # int32 [B or 1, S]
    segment_ids_q: jax.Array | None = None  # [B, T]: a query attends only to keys with its own id
    segment_ids_k: jax.Array | None = None  # [B, S]
    real_k: jax.Array | None = None  # bool [B, S]: false for padding
    window: jax.Array | None = None  # int32 scalar: keys fewer than this many slots away; 0 is no limit
    causal: bool = field(default=False, metadata={"static": True})  # no keys after the query

    def mask(self) -> jax.Array | None:
        """Bool ``[B or 1, T or 1, S]``, true where the query attends to the key; None if every query attends to all."""
        parts = []
        if self.causal:
            parts.append(causal_mask(self.slots_q, self.slots_k))
        if self.segment_ids_q is not None:
            parts.append(self.segment_ids_q[:, :, None] == self.segment_ids_k[:, None, :])
        if self.real_k is not None:
            parts.append(self.real_k[:, None, :])
        if self.window is not None:
            parts.append(window_mask(self.slots_q, self.slots_k, self.window))
        return None if not parts else jax.tree.reduce(jnp.logical_and, parts)


def causal_mask(slots_q_BxT: jax.Array, slots_k_BxS: jax.Array) -> jax.Array:
    """Bool ``[B, T, S]``: true where the key's slot is not after the query's."""
    return slots_k_BxS[:, None, :] <= slots_q_BxT[:, :, None]


def window_mask(slots_q_BxT: jax.Array, slots_k_BxS: jax.Array, window: jax.Array | int) -> jax.Array:
    """Bool ``[B, T, S]``: true where the key is fewer than ``window`` slots away; a window of 0 is no limit."""
    distance_BxTxS = jnp.abs(slots_q_BxT[:, :, None] - slots_k_BxS[:, None, :])
    return (distance_BxTxS < window) | (jnp.asarray(window) == 0)
