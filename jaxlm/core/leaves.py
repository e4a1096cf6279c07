"""Leaves that carry their own representation, opened only by ``core.ops``: integer codes, and low-rank adapters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.tree import Params, map_params


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QArray:
    """A weight ``(codes - zero) * scale``, its contraction axis last, where integer dots are fast.

    Invariants, which every function that makes one keeps:

    - ``codes`` is an integer array ``[..., out, in]`` in ``[-2**(bits-1), 2**(bits-1))``; leading dimensions are
      stacked layers. Its dtype is int8, or int4 where ``compression.placement`` narrowed it for an accelerator.
    - ``scale`` is float32 ``[..., out, groups]``, positive; columns ``[g * group, (g + 1) * group)`` share entry g.
      The last group may be shorter; ``group == 0`` is one group, that is, one scale an output channel.
    - ``zero`` is None (a symmetric grid) or int8 like ``scale``, in the range of the codes. It is an integer, so a
      zero weight is exactly representable: pruned weights survive quantization.
    - ``act_bits`` is 0 (weights are dequantized to the activations' dtype) or 8 (activations are rounded to int8 a
      token, on the fly, and the dot accumulates in int32), which takes ``group == 0``.
    - ``axis`` is where the dense array has its contraction: -2 for a kernel ``[in, out]``, -1 for an embedding table
      ``[rows, width]``, which the tied head multiplies from the width side.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    bits: int = _static()
    group: int = _static(0)
    act_bits: int = _static(0)
    axis: int = _static(-2)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        *lead, n_out, n_in = self.codes.shape
        return (*lead, n_in, n_out) if self.axis == -2 else (*lead, n_out, n_in)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """What the leaf dequantizes to by default."""
        return self.scale.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRA:
    """A weight ``base + scale * a @ b``, a low-rank adapter kept apart from what it adapts (arXiv:2106.09685).

    - ``base`` is an array or another leaf of dense shape ``[..., in, out]``; an embedding table is ``[rows, width]``.
    - ``a`` is ``[..., in, r]`` and ``b`` is ``[..., r, out]``; leading dimensions are stacked layers (and experts).
      Layers of lower rank are filled up with zeros; a layer without an adapter is zeros only.
    - ``scale`` is float32 ``[..., 1, 1]``, so that all parts have the rank of the dense array.
    """

    base: jax.Array | QArray | LoRA
    a: jax.Array
    b: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """What the leaf dequantizes to by default."""
        return self.base.dtype


def is_leaf(x: Any) -> bool:
    """Whether ``x`` is a leaf of several arrays: what ``jax.tree.map(..., is_leaf=is_leaf)`` must not open."""
    return isinstance(x, QArray | LoRA)


def spread(per_group: jax.Array, group: int, n_in: int) -> jax.Array:
    """``[..., groups]`` to ``[..., n_in]`` (or ``[..., 1]``, which broadcasts, where there is one group)."""
    if per_group.shape[-1] == 1:
        return per_group
    return jnp.repeat(per_group, group, axis=-1)[..., :n_in]


def centred(leaf: QArray, dtype: jnp.dtype) -> jax.Array:
    """``codes - zero``, ``[..., out, in]``: integers within 255 of zero, exact in every float type from bfloat16 on."""
    codes = leaf.codes.astype(dtype)
    if leaf.zero is None:
        return codes
    return codes - spread(leaf.zero, leaf.group, leaf.codes.shape[-1]).astype(dtype)


def dequantize(leaf: Any, dtype: jnp.dtype | None = None) -> jax.Array:
    """The dense array that a leaf stands for; an array is only cast. ``dtype`` defaults to the leaf's own."""
    dtype = leaf.dtype if dtype is None else dtype
    if not is_leaf(leaf):
        return leaf.astype(dtype)
    if isinstance(leaf, LoRA):
        delta = jnp.matmul(leaf.a.astype(jnp.float32), leaf.b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return (dequantize(leaf.base, jnp.float32) + leaf.scale * delta).astype(dtype)
    scale = spread(leaf.scale, leaf.group, leaf.codes.shape[-1])
    dense = (centred(leaf, jnp.float32) * scale).astype(dtype)
    return dense.swapaxes(-1, -2) if leaf.axis == -2 else dense


def dequantize_tree(params: Params) -> Params:
    """The plain tree: every compressed or adapted leaf as the array it stands for."""
    return map_params(lambda _, leaf: dequantize(leaf) if is_leaf(leaf) else leaf, params)


_merge = jax.jit(dequantize)


def merge_adapters(params: Params) -> Params:
    """The tree without adapters: every adapted weight as one dense array, over a quantized base too."""
    return map_params(lambda _, leaf: _merge(leaf) if isinstance(leaf, LoRA) else leaf, params)
