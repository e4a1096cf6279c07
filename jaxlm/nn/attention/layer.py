"""The attention layer: projections of queries, keys and values, and the choice of how to attend."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core import ops
from jaxlm.core.leaves import is_leaf
from jaxlm.core.sharding import num_shards
from jaxlm.nn.attention.flash import flash_attend, uses_flash
from jaxlm.nn.attention.masks import MASKED_LOGIT, MaskSpec
from jaxlm.nn.attention.paged import LayerPages, attend_pages
from jaxlm.nn.attention.quantized_kv import KVArray, query_key_scores, weighted_values
from jaxlm.nn.attention.ring import ring_attend, uses_ring
from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import Linear, Norm, ParamKeys, softcap
from jaxlm.nn.positions import rotate

__all__ = ["Attention", "attend"]

_MANY_ROWS = 256  # from this many rows on, the cost of concatenating kernels is small beside that of the product


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
    sinks_H: jax.Array | None = None,
    causal: bool = False,
    seen: list[jax.Array] | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads (arXiv:2305.13245); softmax in float32.

    Query head ``h`` reads key/value head ``h // (H // G)``.

    Args:
        mask_BxTxS: true where a query attends to a key. Mask and bias may have size 1 in B.
        cap: logits become ``cap * tanh(logits / cap)``; 0 is off.
        sinks_H: a further logit of each query head, whose value is 0.
        causal: promises that the mask hides every key after the query of the same number.
        seen: gets the attention weights ``[B, H, T, S]`` appended.

    Returns:
        ``[B, T, H, K]``.
    """
    B, T, H, K = q_BxTxHxK.shape
    G, S = k_BxGxSxK.shape[1:3]
    q_BxGxRxTxK = (q_BxTxHxK * scale).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    # Dropout and ``seen`` need the weights as a whole. GSPMD gathers sequences that are split over devices.
    if uses_flash(T, S) and seen is None and (key is None or not dropout_rate) and num_shards("length") == 1:
        out = flash_attend(
            q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK, mask_BxTxS, bias_BxHxTxS, sinks_H=sinks_H, cap=cap, causal=causal
        )
        return out.reshape(B, H, T, K).transpose(0, 2, 1, 3)
    scores_BxGxQxS = query_key_scores(q_BxGxRxTxK.reshape(B, G, -1, K), k_BxGxSxK)
    logits_BxHxTxS = softcap(scores_BxGxQxS.reshape(B, H, T, S), cap)
    if bias_BxHxTxS is not None:
        logits_BxHxTxS += bias_BxHxTxS
    if mask_BxTxS is not None:
        logits_BxHxTxS = jnp.where(mask_BxTxS[:, None], logits_BxHxTxS, MASKED_LOGIT)
    if sinks_H is not None:
        sinks_BxHxTx1 = jnp.broadcast_to(sinks_H[:, None, None], (*logits_BxHxTxS.shape[:3], 1))
        logits_BxHxTxS = jnp.concatenate([logits_BxHxTxS, sinks_BxHxTx1.astype(jnp.float32)], -1)
    weights_BxHxTxS = jax.nn.softmax(logits_BxHxTxS, -1)[..., :S]
    if seen is not None:
        seen.append(weights_BxHxTxS)
    weights_BxHxTxS = ops.dropout(weights_BxHxTxS, dropout_rate, key)
    out = weighted_values(weights_BxHxTxS.reshape(B, G, -1, S), v_BxGxSxK, q_BxTxHxK.dtype)
    return out.reshape(B, H, T, K).transpose(0, 2, 1, 3)


class Attention(nnx.Module):
    """Self-attention, or cross-attention when keys and values come from elsewhere.

    ``qk_norm`` of the configuration is over all heads together ("width") or over each head, with one scale for all
    heads ("head") or one for each ("each_head").
    """

    def __init__(self, config: StackConfig, *, keys: ParamKeys, scale: float):
        """``scale`` shrinks the initial output projection; see ``Linear``."""
        width, K = config.width, config.d_head
        self.config = config
        q_size, kv_size = config.heads * K, config.n_kv_heads * K
        self.q = Linear(width, q_size, ("embed", "heads"), bias=config.qkv_bias, keys=keys)
        self.k = Linear(width, kv_size, ("embed", "kv_heads"), bias=config.qkv_bias, keys=keys)
        self.v = Linear(width, kv_size, ("embed", "kv_heads"), bias=config.qkv_bias, keys=keys)
        self.o = Linear(q_size, width, ("heads", "embed"), bias=config.out_bias, keys=keys, scale=scale)
        sizes = {
            "none": (None, None), "head": ((K,), (K,)), "width": ((q_size,), (kv_size,)),
            "each_head": ((K, config.heads), (K, config.n_kv_heads)),
        }[config.qk_norm]
        self.q_norm, self.k_norm = (size and Norm(size[0], config, *size[1:]) for size in sizes)
        self.sinks = nnx.Param(jnp.zeros(config.heads), axes=("heads",)) if config.attention_sinks else None

    def query(self, x_BxTxD: jax.Array, angles: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        """``[B, T, H, K]``, with the model's norm of queries; rotated by ``angles``, if given."""
        return self._positioned(self.q(x_BxTxD), self.q_norm, angles)

    def key_value(self, x_BxSxD: jax.Array, angles: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, jax.Array]:
        """Keys and values ``[B, G, S, K]``; keys with the model's norm, and rotated by ``angles``, if given."""
        k_BxSxGxK = self._positioned(self.k(x_BxSxD), self.k_norm, angles)
        return k_BxSxGxK.swapaxes(1, 2), self._heads(self._clipped(self.v(x_BxSxD))).swapaxes(1, 2)

    def query_key_value(
        self, x_BxTxD: jax.Array, angles: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``query`` and ``key_value`` of the same input.

        Many rows by plain kernels on one device are a single product, which takes 3% off a training step of a small
        model on CPU.
        """
        maps = (self.q, self.k, self.v)
        kernels = [each.kernel.get_value() for each in maps]
        mesh = jax.sharding.get_abstract_mesh()
        several_devices = not mesh.empty and mesh.size > 1  # concatenated kernels would be gathered
        few_rows = x_BxTxD.shape[0] * x_BxTxD.shape[1] < _MANY_ROWS
        if several_devices or few_rows or any(map(is_leaf, kernels)):
            return self.query(x_BxTxD, angles), *self.key_value(x_BxTxD, angles)
        ends = list(itertools.accumulate(kernel.shape[1] for kernel in kernels))
        products = jnp.split(ops.dot(x_BxTxD, jnp.concatenate(kernels, 1)), ends[:-1], -1)
        q_BxTxN, k_BxTxN, v_BxTxN = (each.add_bias(y) for each, y in zip(maps, products, strict=True))
        k_BxTxGxK = self._positioned(k_BxTxN, self.k_norm, angles)
        v_BxTxGxK = self._heads(self._clipped(v_BxTxN))
        return self._positioned(q_BxTxN, self.q_norm, angles), k_BxTxGxK.swapaxes(1, 2), v_BxTxGxK.swapaxes(1, 2)

    def _positioned(
        self, x_BxTxN: jax.Array, norm: Norm | None, angles: tuple[jax.Array, jax.Array] | None
    ) -> jax.Array:
        """Normalised, split into heads and rotated: ``[B, T, heads, K]``."""
        by_head, after = self.config.qk_norm in ("head", "each_head"), self.config.qk_norm_after_rope
        x_BxTxHxK = self._heads(self._clipped(norm(x_BxTxN) if self.config.qk_norm == "width" else x_BxTxN))
        x_BxTxHxK = norm(x_BxTxHxK) if by_head and not after else x_BxTxHxK
        if angles is not None:
            x_BxTxHxK = rotate(x_BxTxHxK, *angles, interleaved=self.config.rope_interleaved)
        return norm(x_BxTxHxK) if by_head and after else x_BxTxHxK

    def _clipped(self, x: jax.Array) -> jax.Array:
        limit = self.config.clip_qkv
        return jnp.clip(x, -limit, limit) if limit else x

    def _heads(self, x_BxTxN: jax.Array) -> jax.Array:
        return x_BxTxN.reshape(*x_BxTxN.shape[:2], -1, self.config.d_head)

    def __call__(
        self, q_BxTxHxK: jax.Array, k_BxGxSxK: KVArray, v_BxGxSxK: KVArray, mask_BxTxS: jax.Array | None,
        bias_BxHxTxS: jax.Array | None = None, *, key: jax.Array | None, mask_spec: MaskSpec | None = None,
        seen: list[jax.Array] | None = None,
    ) -> jax.Array:
        """From ``query`` and ``key_value`` to the output ``[B, T, D]``; for ``seen`` see ``attend``.

        With a ``mask_spec``, on a mesh that splits sequences, long ones go around a ring (``nn.attention.ring``), by
        the spec instead of the mask.

        Keys may have fewer rows than queries: the beams of a sentence are neighbouring rows and share their keys.
        ``attend`` sees them as one row of queries, and the mask ``[rows of keys, B * T / rows of keys, S]`` tells them
        apart.
        """
        B, T, H, K = q_BxTxHxK.shape
        if mask_spec is not None and uses_ring(self.config, T, k_BxGxSxK.shape[2]):
            out = ring_attend(
                q_BxTxHxK, k_BxGxSxK, v_BxGxSxK, mask_spec, bias_BxHxTxS, scale=self._scale,
                cap=self.config.attention_softcap, sinks_H=self._sinks_H,
            )
        else:
            out = attend(
                q_BxTxHxK.reshape(k_BxGxSxK.shape[0], -1, H, K), k_BxGxSxK, v_BxGxSxK, mask_BxTxS, bias_BxHxTxS,
                scale=self._scale, cap=self.config.attention_softcap, dropout_rate=self.config.attention_dropout,
                key=key, sinks_H=self._sinks_H, causal=mask_spec is not None and mask_spec.causal, seen=seen,
            )
        return self.o(out.reshape(B, T, -1))

    def over_pages(
        self, q_BxTxHxK: jax.Array, past: LayerPages, mask_spec: MaskSpec, bias_BxHxTxS: jax.Array | None
    ) -> jax.Array:
        """From ``query`` and a pool of pages to the output ``[B, T, D]``."""
        out_BxTxHxK = attend_pages(
            q_BxTxHxK, past, mask_spec, bias_BxHxTxS, scale=self._scale, cap=self.config.attention_softcap,
            sinks_H=self._sinks_H,
        )
        return self.o(out_BxTxHxK.reshape(*q_BxTxHxK.shape[:2], -1))

    @property
    def _scale(self) -> float:
        return self.config.attention_scale or self.config.d_head**-0.5

    @property
    def _sinks_H(self) -> jax.Array | None:
        return None if self.sinks is None else self.sinks.get_value()
