"""Quantized keys and values: how a cache stores them, and products that read them without dequantizing the cache.

``StackConfig.kv_cache`` names the format. A vector (the key or value of one slot and head) has a scale of its own, so a
slot is quantized once, when it is written. Products multiply with the codes and apply the scales to the result, which
is the same without a dense copy of the cache:

- ``int8``: symmetric, codes within 127 of zero.
- ``int4``: asymmetric, two codes a byte. Keys are first rotated by a Hadamard matrix, and queries too, which leaves
  their products as they are. The rotation spreads the few large channels of keys (arXiv:2402.02750, section 3) over all
  channels (arXiv:2404.00456).
- ``fp8``: e4m3, scaled so that the largest magnitude of a vector is the largest number of the format.

A model that reads a whole sequence at once also computes with quantized and dequantized keys and values. So decoding
and scoring agree, and training adapts to the quantization.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.nn.config import KVCache

__all__ = ["KVArray", "KeyValue", "QuantizedKV", "dequantize_kv", "empty_kv", "fake_quantize_kv", "quantize_kv",
           "query_key_scores", "weighted_values"]

_INT8_MAX, _INT4_MAX, _FP8_MAX = 127.0, 15.0, 448.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedKV:
    """Keys or values ``[..., S, K]`` as ``codes * scale + low``, quantized along K.

    A byte of int4 holds the code of dimension i in its low bits and that of ``i + K / 2`` in its high bits. Float8 is
    stored as uint8, because XLA on CPU copies a whole array of float8 to write into it.
    """

    codes: jax.Array  # [..., S, K] int8; fp8: uint8 with the bits of a float8; int4: [..., S, K / 2] uint8
    scale: jax.Array  # float16 [..., S]
    low: jax.Array | None  # float16 [..., S]: the value of code 0; int4 only
    kind: KVCache = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        *lead, size = self.codes.shape
        return (*lead, 2 * size if self.kind == "int4" else size)


KVArray = jax.Array | QuantizedKV
KeyValue = tuple[KVArray, KVArray]  # [B, G, S, K] each


def quantize_kv(k: jax.Array, v: jax.Array, kind: KVCache) -> KeyValue:
    """Keys and values ``[..., S, K]`` in the format of a cache of this kind; "full" leaves them as they are.

    Raises:
        UserError: when the kind is int4 and K is odd.
    """
    if kind == "full":
        return k, v
    if kind == "int4":
        return _int4(_rotated(k.astype(jnp.float32))), _int4(v)
    quantize = _int8 if kind == "int8" else _fp8
    return quantize(k), quantize(v)


def dequantize_kv(k: KVArray, v: KVArray) -> tuple[jax.Array, jax.Array]:
    """The dense keys and values ``[..., S, K]``; float32 where they were quantized."""
    if not isinstance(k, QuantizedKV):
        return k, v
    return _rotated(_dense(k)) if k.kind == "int4" else _dense(k), _dense(v)


def fake_quantize_kv(k: jax.Array, v: jax.Array, kind: KVCache) -> tuple[jax.Array, jax.Array]:
    """Keys and values quantized and dequantized; the gradient is that of the identity (straight through,
    arXiv:1308.3432)."""
    return (k, v) if kind == "full" else _round_trip(k, v, kind)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _round_trip(k: jax.Array, v: jax.Array, kind: KVCache) -> tuple[jax.Array, jax.Array]:
    k_out, v_out = dequantize_kv(*quantize_kv(k, v, kind))
    return k_out.astype(k.dtype), v_out.astype(v.dtype)


@_round_trip.defjvp
def _straight_through(kind, primals, tangents):
    return _round_trip(*primals, kind), tangents


def empty_kv(shape: tuple[int, ...], kind: KVCache, dtype: str) -> KeyValue:
    """Zeros ``[..., S, K]`` for keys and for values, in the format of a cache of this kind."""
    dense = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    like = jax.eval_shape(partial(quantize_kv, kind=kind), dense, dense)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def query_key_scores(q_BxGxQxK: jax.Array, k_BxGxSxK: KVArray) -> jax.Array:
    """Products of queries and keys: ``[B, G, Q, S]`` float32."""
    dot = partial(jnp.einsum, "bgqk,bgsk->bgqs", preferred_element_type=jnp.float32)
    if not isinstance(k_BxGxSxK, QuantizedKV):
        return dot(q_BxGxQxK, k_BxGxSxK)
    k, dtype = k_BxGxSxK, q_BxGxQxK.dtype
    q_BxGxQxK = _rotated(q_BxGxQxK) if k.kind == "int4" else q_BxGxQxK
    halves = _code_values(k, dtype)
    scores_BxGxQxS = sum(map(dot, jnp.split(q_BxGxQxK, len(halves), -1), halves)) * _per_key(k.scale)
    if k.low is None:
        return scores_BxGxQxS
    return scores_BxGxQxS + jnp.sum(q_BxGxQxK, -1, keepdims=True, dtype=jnp.float32) * _per_key(k.low)


def weighted_values(weights_BxGxQxS: jax.Array, v_BxGxSxK: KVArray, dtype: jnp.dtype) -> jax.Array:
    """The values summed by the weights: ``[B, G, Q, K]`` of this dtype."""
    dot = partial(jnp.einsum, "bgqs,bgsk->bgqk")
    if not isinstance(v_BxGxSxK, QuantizedKV):
        return dot(weights_BxGxQxS.astype(v_BxGxSxK.dtype), v_BxGxSxK)
    v = v_BxGxSxK
    scaled_BxGxQxS = (weights_BxGxQxS * _per_key(v.scale)).astype(dtype)
    out_BxGxQxK = jnp.concatenate([dot(scaled_BxGxQxS, half) for half in _code_values(v, dtype)], -1)
    if v.low is None:
        return out_BxGxQxK
    return out_BxGxQxK + jnp.sum(weights_BxGxQxS * _per_key(v.low), -1, keepdims=True).astype(dtype)


def _int8(x: jax.Array) -> QuantizedKV:
    scaled, scale = _scaled(x, _INT8_MAX)
    return QuantizedKV(jnp.round(scaled).astype(jnp.int8), scale, None, "int8")


def _fp8(x: jax.Array) -> QuantizedKV:
    scaled, scale = _scaled(x, _FP8_MAX)
    return QuantizedKV(jax.lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), jnp.uint8), scale, None, "fp8")


def _scaled(x: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
    """Every vector scaled so that its largest magnitude is ``largest``, and the scales ``[..., S]``."""
    x = x.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(x), -1) / largest).astype(jnp.float16)
    return jnp.clip(x * _inverse(scale), -largest, largest), scale


def _int4(x: jax.Array) -> QuantizedKV:
    half, odd = divmod(x.shape[-1], 2)
    if odd:
        raise UserError(
            f"kv_cache = int4 needs heads of an even size, and this model has heads of {x.shape[-1]}; use int8"
        )
    x = x.astype(jnp.float32)
    low = jnp.min(x, -1).astype(jnp.float16)
    scale = ((jnp.max(x, -1) - low) / _INT4_MAX).astype(jnp.float16)
    codes = jnp.clip(jnp.round((x - low[..., None]) * _inverse(scale)), 0, _INT4_MAX).astype(jnp.uint8)
    return QuantizedKV(codes[..., :half] | codes[..., half:] << 4, scale, low, "int4")


def _inverse(scale: jax.Array) -> jax.Array:
    """``1 / scale``, ``[..., S, 1]``; 0 where the scale is 0 (a vector of zeros, or one too small for float16)."""
    scale = scale.astype(jnp.float32)[..., None]
    return jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)


def _dense(x: QuantizedKV) -> jax.Array:
    dense = jnp.concatenate(_code_values(x, jnp.float32), -1) * x.scale.astype(jnp.float32)[..., None]
    return dense if x.low is None else dense + x.low.astype(jnp.float32)[..., None]


def _per_key(x_BxGxS: jax.Array) -> jax.Array:
    return x_BxGxS.astype(jnp.float32)[:, :, None]


def _code_values(x: QuantizedKV, dtype: jnp.dtype) -> list[jax.Array]:
    """The codes as numbers of this dtype, ``[..., S, K]``; int4: the two halves of K, ``[..., S, K / 2]`` each, because
    XLA on CPU is slow at unpacking int4 into one array."""
    codes = x.codes
    if x.kind == "int4":
        return [(codes & 15).astype(dtype), (codes >> 4).astype(dtype)]
    if x.kind == "fp8":
        return [jax.lax.platform_dependent(codes, cpu=_fp8_by_bits, default=_fp8_by_cast).astype(dtype)]
    return [codes.astype(dtype)]


def _fp8_by_cast(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def _fp8_by_bits(codes: jax.Array) -> jax.Array:
    """By way of float16, whose exponent has one more bit and another bias: XLA on CPU takes 4 times as long to cast."""
    bits = codes.astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
    return half.astype(jnp.float32) * 2.0**8


def _rotated(x: jax.Array) -> jax.Array:
    """``x`` times the largest Hadamard matrix that divides its last dimension. Rotating twice gives ``x`` again."""
    size = x.shape[-1]
    block = size & -size
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    rotated = x.reshape(*x.shape[:-1], size // block, block) @ jnp.asarray(matrix * block**-0.5, x.dtype)
    return rotated.reshape(x.shape)
