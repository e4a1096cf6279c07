"""Where a token stands: rotary, sinusoidal and relative positions. (Learned ones are an ``Embedding``.)"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.nn.config import StackConfig


def rotary_angles(positions_BxT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines ``[B, T, 1, head_dim / 2]`` of the rotation of each pair (arXiv:2104.09864)."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles_BxTx1xK = positions_BxT[..., None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles_BxTx1xK), jnp.sin(angles_BxTx1xK)


def rotate(x_BxTxHxK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs ``(i, i + K/2)``: the half-split convention of Llama checkpoints."""
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxHxK.dtype)


def sinusoids(positions_BxT: jax.Array, width: int) -> jax.Array:
    """``[B, T, width]``: sines in the first half, cosines in the second (arXiv:1706.03762, section 3.5)."""
    frequencies = 10000.0 ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    angles = positions_BxT[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class RelativeBias(nnx.Module):
    """A learned bias per head and bucketed distance, shared by all layers (arXiv:1910.10683, section 2.1)."""

    def __init__(self, config: StackConfig, *, bidirectional: bool):
        self.buckets, self.max_distance = config.relative_buckets, config.relative_max_distance
        self.bidirectional = bidirectional
        self.table = nnx.Param(jnp.zeros((self.buckets, config.heads)), axes=("positions", "heads"))

    def __call__(self, q_positions_BxT: jax.Array, k_positions_BxS: jax.Array) -> jax.Array:
        """The bias ``[B, heads, T, S]``."""
        offset_BxTxS = k_positions_BxS[:, None, :] - q_positions_BxT[:, :, None]
        bias_BxTxSxH = jnp.take(self.table.get_value(), self._bucket(offset_BxTxS), axis=0)
        return bias_BxTxSxH.transpose(0, 3, 1, 2)

    def _bucket(self, offset: jax.Array) -> jax.Array:
        """Half the buckets are single distances, the other half grow logarithmically up to ``max_distance``."""
        buckets, first = self.buckets, jnp.zeros_like(offset)
        if self.bidirectional:
            buckets //= 2
            first = jnp.where(offset > 0, buckets, 0)
            distance = jnp.abs(offset)
        else:
            distance = jnp.maximum(-offset, 0)
        exact = buckets // 2
        ratio = jnp.log(jnp.maximum(distance, 1) / exact) / np.log(self.max_distance / exact)
        far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
        return first + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))
