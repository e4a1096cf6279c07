"""Positions of tokens: rotary, sinusoidal and relative. (Learned positions are an ``Embedding``.)"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.nn.config import RopeScaling, StackConfig


def rotary_angles(
    positions_BxT: jax.Array, config: StackConfig, length_BxT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines ``[B, T, 1, d_rotary / 2]`` of the rotation of each pair of dimensions (arXiv:2104.09864).

    Args:
        positions_BxT: of the tokens; B may be 1.
        length_BxT: tokens of the text that each token belongs to, for a config that ``rotates_by_length``; B and T may
            be 1.
    """
    scaling, size = config.rope_scaling, config.d_rotary
    if scaling.method == "dynamic":  # the base grows with the text (github.com/jquesnelle/yarn, "dynamic NTK")
        longer_BxTx1 = jnp.maximum(length_BxT / config.max_positions, 1.0)[..., None]
        stretch_BxTx1 = scaling.factor * longer_BxTx1 - (scaling.factor - 1)
        exponents = -np.arange(0, size, 2) / size
        frequencies_BxTxK = config.rope_theta**exponents * stretch_BxTx1 ** (exponents * size / (size - 2))
    elif scaling.method == "longrope":
        long, short = (
            _frequencies(size, config.rope_theta) / np.array(factors)
            for factors in (scaling.long_factor, scaling.short_factor)
        )
        frequencies_BxTxK = jnp.where((length_BxT > scaling.original_positions)[..., None], long, short)
    else:
        frequencies_BxTxK = _scaled(_frequencies(size, config.rope_theta), config.rope_theta, scaling)
    return _angles(positions_BxT, frequencies_BxTxK, scaling.attention_factor)


def rotary_length(length: Any, config: StackConfig) -> Any:
    """The shortest length of a text whose tokens are rotated as those of a text of this length; an int or an array.

    With "longrope" there are two such lengths. With "dynamic" every length beyond the context of the model has
    rotations of its own. Methods that do not depend on the length have one.
    """
    scaling = config.rope_scaling
    if not config.rotates_by_length:
        return length * 0
    if scaling.method == "dynamic":
        return length * (length > config.max_positions)
    return (scaling.original_positions + 1) * (length > scaling.original_positions)


def document_lengths(positions_BxT: jax.Array, segment_ids_BxT: jax.Array) -> jax.Array:
    """The length of the document of each token, ``[B, T]``, where documents share rows: positions count from 0 in each,
    and ``segment_ids`` changes from one to the next."""
    B, T = segment_ids_BxT.shape
    is_last_BxT = jnp.pad(segment_ids_BxT[:, 1:] != segment_ids_BxT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    last_BxT = jax.lax.cummin(jnp.where(is_last_BxT, jnp.arange(T), T), axis=1, reverse=True)
    return 1 + jnp.take_along_axis(jnp.broadcast_to(positions_BxT, (B, T)), last_BxT, axis=1)


def text_lengths(counts_BxT: jax.Array) -> jax.Array:
    """The length of each row's text, ``[B]``: up to the last token that counts (is not 0, or is true)."""
    return jnp.max(jnp.where(counts_BxT != 0, 1 + jnp.arange(counts_BxT.shape[1]), 0), axis=1)


def local_rotary_angles(positions_BxT: jax.Array, config: StackConfig) -> tuple[jax.Array, jax.Array]:
    """``rotary_angles`` of the layers with a window, with the base ``rope_local_theta``."""
    return _angles(positions_BxT, _frequencies(config.d_rotary, config.rope_local_theta))


def _angles(positions_BxT: jax.Array, frequencies_xK, factor: float = 1.0) -> tuple[jax.Array, jax.Array]:
    frequencies_xK = jnp.asarray(frequencies_xK, jnp.float32)[..., None, :]
    angles_BxTx1xK = positions_BxT[..., None, None].astype(jnp.float32) * frequencies_xK
    return jnp.cos(angles_BxTx1xK) * factor, jnp.sin(angles_BxTx1xK) * factor


def _frequencies(size: int, theta: float) -> np.ndarray:
    return theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)


def _scaled(frequencies_K: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """The frequencies under the methods that do not depend on the length of the text."""
    slowed = frequencies_K / scaling.factor
    if scaling.method == "linear":  # position interpolation (arXiv:2306.15595)
        return slowed
    if scaling.method == "llama3":  # arXiv:2407.21783; between two wavelengths a mixture of both
        turns = scaling.original_positions * frequencies_K / (2 * np.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return kept * frequencies_K + (1 - kept) * slowed
    if scaling.method == "yarn":  # arXiv:2309.00071, section 3.2: the ramp is linear in the index of the dimension
        size = 2 * len(frequencies_K)

        def dimension(turns: float) -> float:
            return size * np.log(scaling.original_positions / (turns * 2 * np.pi)) / (2 * np.log(theta))

        low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
        low, high = (np.floor(low), np.ceil(high)) if scaling.truncate else (low, high)
        low, high = max(low, 0), min(high, size - 1)
        slow = np.clip((np.arange(size // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
        return slow * slowed + (1 - slow) * frequencies_K
    return frequencies_K


def frequency_divisors(config: StackConfig) -> np.ndarray | None:
    """By what the scaling divides each frequency, ``[d_rotary / 2]`` (``_scaled``); None without scaling."""
    if config.rope_scaling.method == "none":
        return None
    frequencies_K = _frequencies(config.d_rotary, config.rope_theta)
    return (frequencies_K / _scaled(frequencies_K, config.rope_theta, config.rope_scaling)).astype(np.float32)


def rotate(x_BxTxHxK: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotates pairs of the first R dimensions: ``(i, i + R/2)``, the half-split convention of Llama checkpoints, or if
    ``interleaved`` the pairs ``(2i, 2i + 1)`` of GPT-J and of the paper (arXiv:2104.09864)."""
    half = cos.shape[-1]
    x = x_BxTxHxK.astype(jnp.float32)
    rest = x[..., 2 * half :]
    if interleaved:
        pairs = x[..., : 2 * half].reshape(*x.shape[:-1], half, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        rotated = [jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(*x.shape[:-1], 2 * half)]
    else:
        a, b = x[..., :half], x[..., half : 2 * half]
        rotated = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate(rotated + [rest] * (rest.shape[-1] > 0), -1).astype(x_BxTxHxK.dtype)


def query_scales(positions_BxT: jax.Array, config: StackConfig) -> jax.Array:
    """By what queries are multiplied so that attention stays sharp over long texts, ``[B, T, 1, 1]`` (Llama 4)."""
    intervals = jnp.floor(positions_BxT[..., None, None] / config.temperature_interval)
    return 1 + config.attention_temperature * jnp.log1p(intervals)


def sinusoids(positions_BxT: jax.Array, config: StackConfig) -> jax.Array:
    """``[B, T, width]``: sines in the first half, cosines in the second (arXiv:1706.03762, section 3.5).

    Wavelengths are a geometric sequence from 2 pi on. It ends just below 10000 * 2 pi, as in the paper; for
    ``sinusoidal_t2t`` it ends at 10000 * 2 pi, as in the code of the paper's authors (tensor2tensor) and in fairseq.
    """
    half = config.width // 2
    steps = half - 1 if config.positions == "sinusoidal_t2t" else half
    frequencies_K = 10000.0 ** -(np.arange(half, dtype=np.float64) / max(steps, 1))
    angles = positions_BxT[..., None].astype(jnp.float32) * frequencies_K.astype(np.float32)
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
