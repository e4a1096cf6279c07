"""Attention, and the projections around it."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core import ops
from jaxlm.core.leaves import is_leaf
from jaxlm.core.sharding import num_shards
from jaxlm.nn.attention.flash import flash_attend, in_blocks
from jaxlm.nn.attention.kv_cache import KVArray, mix, scores
from jaxlm.nn.attention.paged import LayerPages, attend_pages
from jaxlm.nn.attention.ring import NEGATIVE, MaskSpec, ring_attend, uses_ring
from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import Linear, Norm, softcap
from jaxlm.nn.positions import rotate

_MANY_ROWS = 256  # from which joining kernels costs little beside the product


def attend(
    q_BxTxHxK: jax.Array,
    k_BxGxSxK: KVArray,
    v_BxGxSxK: KVArray,
    mask_BxTxS: jax.Array | None,
    bias_BxHxTxS: jax.Array | None = None,
    *,
    scale: float,
    cap: float = 0.0,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
    causal: bool = False,
    seen: list[jax.Array] | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads (arXiv:2305.13245); softmax in float32.

    Head ``h`` reads key/value head ``h // (H // G)``. Mask and bias broadcast over B; the result is ``[B, T, H, K]``.
    ``causal`` promises that the mask hides every key after the query of the same number.
    The weights ``[B, H, T, S]`` are added to ``seen``, where there is one.
    """
    B, T, H, K = q_BxTxHxK.shape
    G, S = k_BxGxSxK.shape[1:3]
    q_BxGxRxTxK = (q_BxTxHxK * scale).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    # Weights that are dropped or looked at are needed as a whole; sequences over devices are gathered by GSPMD.
    if in_blocks(T, S) and seen is None and (key is None or not dropout_rate) and num_shards("length") == 1:
        out = flash_attend(q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK, mask_BxTxS, bias_BxHxTxS, cap=cap, causal=causal)
        return out.reshape(B, H, T, K).transpose(0, 2, 1, 3)
    logits_BxHxTxS = softcap(scores(q_BxGxRxTxK.reshape(B, G, -1, K), k_BxGxSxK).reshape(B, H, T, S), cap)
    if bias_BxHxTxS is not None:
        logits_BxHxTxS += bias_BxHxTxS
    if mask_BxTxS is not None:
        logits_BxHxTxS = jnp.where(mask_BxTxS[:, None], logits_BxHxTxS, NEGATIVE)
    weights = jax.nn.softmax(logits_BxHxTxS, -1)
    if seen is not None:
        seen.append(weights)
    weights = ops.dropout(weights, dropout_rate, key)
    out = mix(weights.reshape(B, G, -1, S), v_BxGxSxK, q_BxTxHxK.dtype)
    return out.reshape(B, H, T, K).transpose(0, 2, 1, 3)


class Attention(nnx.Module):
    """Projections around ``attend``: self-attention, or cross-attention when the keys come from elsewhere."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs, scale: float):
        width, K = config.width, config.d_head
        self.config = config
        q_size, kv_size = config.heads * K, config.n_kv_heads * K
        self.q = Linear(width, q_size, ("embed", "heads"), bias=config.qkv_bias, rngs=rngs)
        self.k = Linear(width, kv_size, ("embed", "kv_heads"), bias=config.qkv_bias, rngs=rngs)
        self.v = Linear(width, kv_size, ("embed", "kv_heads"), bias=config.qkv_bias, rngs=rngs)
        self.o = Linear(q_size, width, ("heads", "embed"), bias=config.out_bias, rngs=rngs, scale=scale)
        sizes = {"none": None, "head": (K, K), "width": (q_size, kv_size)}[config.qk_norm]
        self.q_norm, self.k_norm = (None, None) if sizes is None else (Norm(size, config) for size in sizes)

    def query(self, x_BxTxD: jax.Array, angles: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        """``[B, T, H, K]``, normalised and rotated where the model does so."""
        return self._position(self.q(x_BxTxD), self.q_norm, angles)

    def key_value(self, x_BxSxD: jax.Array, angles: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, jax.Array]:
        """Keys and values ``[B, G, S, K]``; keys normalised and rotated where the model does so."""
        k = self._position(self.k(x_BxSxD), self.k_norm, angles)
        return k.swapaxes(1, 2), self._heads(self.v(x_BxSxD)).swapaxes(1, 2)

    def query_key_value(self, x_BxTxD: jax.Array, angles: tuple[jax.Array, jax.Array] | None):
        """``query`` and ``key_value`` of the same input: many rows by plain kernels on one device in a single product,
        which takes 3% off a training step of a small model on CPU."""
        maps = (self.q, self.k, self.v)
        kernels = [each.kernel.get_value() for each in maps]
        mesh = jax.sharding.get_abstract_mesh()
        spread = not mesh.empty and mesh.size > 1  # joined kernels would be gathered
        if spread or x_BxTxD.shape[0] * x_BxTxD.shape[1] < _MANY_ROWS or any(map(is_leaf, kernels)):
            return self.query(x_BxTxD, angles), *self.key_value(x_BxTxD, angles)
        ends = list(itertools.accumulate(kernel.shape[1] for kernel in kernels))
        q, k, v = jnp.split(ops.dot(x_BxTxD, jnp.concatenate(kernels, 1)), ends[:-1], -1)
        q, k, v = (each.add_bias(y) for each, y in zip(maps, (q, k, v), strict=True))
        k, v = self._position(k, self.k_norm, angles), self._heads(v)
        return self._position(q, self.q_norm, angles), k.swapaxes(1, 2), v.swapaxes(1, 2)

    def _position(self, x_BxTxN: jax.Array, norm: Norm | None, angles: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        x_BxTxN = norm(x_BxTxN) if self.config.qk_norm == "width" else x_BxTxN
        x_BxTxHxK = self._heads(x_BxTxN)
        x_BxTxHxK = norm(x_BxTxHxK) if self.config.qk_norm == "head" else x_BxTxHxK
        return x_BxTxHxK if angles is None else rotate(x_BxTxHxK, *angles)

    def _heads(self, x_BxTxN: jax.Array) -> jax.Array:
        return x_BxTxN.reshape(*x_BxTxN.shape[:2], -1, self.config.d_head)

    def __call__(
        self, q, k, v, mask, bias=None, *, key: jax.Array | None, mask_spec: MaskSpec | None = None,
        seen: list[jax.Array] | None = None,
    ) -> jax.Array:
        """From ``query`` and ``key_value`` to the block's output ``[B, T, D]``; for ``seen`` see ``attend``.

        Where there is a ``mask_spec`` and the mesh in use splits sequences, long ones go around a ring (``nn.attention.ring``), by
        ``mask_spec`` instead of the mask.
        Where there are fewer rows of keys than of queries (the beams of a sentence), neighbouring rows share theirs: to
        attention they are one row of queries, and the mask ``[keys' rows, B * T / keys' rows, S]`` tells them apart.
        """
        config = self.config
        B, T, H, K = q.shape
        scale, cap = config.attention_scale or config.d_head**-0.5, config.attention_softcap
        if mask_spec is not None and uses_ring(config, T, k.shape[2]):
            out = ring_attend(q, k, v, mask_spec, bias, scale=scale, cap=cap)
        else:
            q = q.reshape(k.shape[0], -1, H, K)
            out = attend(
                q, k, v, mask, bias, scale=scale, cap=cap, dropout_rate=config.attention_dropout, key=key,
                causal=mask_spec is not None and mask_spec.causal, seen=seen,
            )
        return self.o(out.reshape(B, T, -1))

    def over_pages(self, q_BxTxHxK: jax.Array, past: LayerPages, mask_spec: MaskSpec, bias_BxHxTxS: jax.Array | None):
        """From ``query`` and what a pool of pages remembers to the block's output ``[B, T, D]``."""
        config = self.config
        out = attend_pages(
            q_BxTxHxK, past, mask_spec, bias_BxHxTxS, scale=config.attention_scale or config.d_head**-0.5,
            cap=config.attention_softcap,
        )
        return self.o(out.reshape(*q_BxTxHxK.shape[:2], -1))
