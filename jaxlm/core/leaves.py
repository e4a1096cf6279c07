"""Representations of a weight other than an array: quantized codes, low-rank factors, adapters.

Models hold them in place of arrays; only ``core.ops`` looks inside to multiply with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.tree import Params, map_params


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


class _Coded:
    """What leaves with codes ``[..., out, in]`` have in common."""

    codes: jax.Array
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        *lead, n_out, n_in = self.codes.shape
        return (*lead, n_in, n_out) if self.axis == -2 else (*lead, n_out, n_in)

    @property
    def ndim(self) -> int:
        return self.codes.ndim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QArray(_Coded):
    """A quantized weight ``(codes - zero) * scale``. Its contraction axis is last, where integer products are fast.

    Every function that makes one keeps these invariants:

    - ``codes`` is an integer array ``[..., out, in]`` in ``[-2**(bits-1), 2**(bits-1))``; leading dimensions are
      stacked layers. Its dtype is int8, or int4 where ``compression.platforms`` narrowed it for an accelerator; or it
      is float8_e4m3fn, with ``bits`` 8 and no zero.
    - ``scale`` is float32 ``[..., out, groups]``, positive; columns ``[g * group, (g + 1) * group)`` share entry g.
      The last group may be shorter; ``group == 0`` is one group, that is, one scale for each output channel.
    - ``zero`` is None (a symmetric grid) or int8 like ``scale``, in the range of the codes. It is an integer, so a
      zero weight is exactly representable: pruned weights survive quantization.
    - ``act_bits`` is 0 (weights are dequantized to the dtype of the activations) or 8. With 8, activations are
      quantized to the type of the codes, int8 or float8, and products accumulate in int32 or float32; float8 needs
      ``group == 0``. The scale of a token is its largest magnitude; or, if given, ``act_scale``, float32
      ``[..., 1, 1]``.
    - ``axis`` is the contraction axis of the dense array: -2 for a kernel ``[in, out]``, -1 for an embedding table
      ``[rows, width]``, which a tied head multiplies along its width.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    bits: int = _static()
    group: int = _static(0)
    act_bits: int = _static(0)
    axis: int = _static(-2)
    act_scale: jax.Array | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype to which the leaf dequantizes by default."""
        return self.scale.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codebook(_Coded):
    """A weight ``table[codes] * scale``, whose values come from a table. Its contraction axis is last.

    - ``codes`` is uint8 ``[..., out, in]``, below ``2**bits``; uint4 where ``compression.platforms`` narrowed it.
    - ``table`` is float32 ``[..., 2**bits]``, one for each matrix.
    - ``scale`` is float32 ``[..., out, groups]`` as in ``QArray``, or None for 1.
    - ``kind`` names the source of the table: "nf4" (QLoRA, arXiv:2305.14314), "mxfp4" (OCP Microscaling Formats v1.0:
      scales are powers of two) or "shared" (values fitted to the weights, Deep Compression, arXiv:1510.00149).
    """

    codes: jax.Array
    table: jax.Array
    scale: jax.Array | None
    bits: int = _static()
    group: int = _static(0)
    kind: Literal["nf4", "mxfp4", "shared"] = _static("shared")
    axis: int = _static(-2)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype to which the leaf dequantizes by default."""
        return self.table.dtype


class _Product:
    """What leaves with factors ``a`` and ``b`` have in common."""

    a: jax.Array
    b: jax.Array

    @property
    def ndim(self) -> int:
        return self.a.ndim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(_Product):
    """A weight ``a @ b`` of factors ``[..., in, r]`` and ``[..., r, out]``, which may be coded leaves."""

    a: jax.Array | QArray | Codebook
    b: jax.Array | QArray | Codebook

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype to which the leaf dequantizes by default."""
        return self.a.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRA(_Product):
    """A weight ``base + scale * a @ b``: a weight and a low-rank adapter beside it (arXiv:2106.09685).

    - ``base`` is an array or another leaf of dense shape ``[..., in, out]``; an embedding table is ``[rows, width]``.
      It is frozen: no gradient reaches it.
    - ``a`` is ``[..., in, r]`` and ``b`` is ``[..., r, out]``; leading dimensions are stacked layers (and experts).
      Layers of lower rank are padded with zeros; a layer without an adapter has only zeros.
    - ``scale`` is float32 ``[..., 1, 1]``, so that all parts have as many dimensions as the dense array.
    - ``magnitude`` is float32 ``[..., 1, out]``: the norms to which the columns of the sum are scaled (DoRA,
      arXiv:2402.09353). None leaves them.
    - ``key`` is uint32 ``[..., 2]``, for dropout of the adapter's input at the rate ``dropout``. Training sets it for
      one step; None is no dropout.
    """

    base: jax.Array | QArray | Codebook | LowRank | LoRA
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    magnitude: jax.Array | None = None
    key: jax.Array | None = None
    dropout: float = _static(0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype to which the leaf dequantizes by default."""
        return self.base.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observer:
    """A weight that measures the rows it is multiplied with.

    The gradient of any sum over ``ops.dot(x, observer)`` with respect to ``reading`` is ``measure(x, weight, sizes)``,
    whatever the gradient of the product is. So a model is calibrated without a change to its layers: ``jax.grad`` with
    respect to readings of zeros, and XLA drops the computations that the readings do not need. With ``gradient`` the
    gradient is ``measure(g, weight, sizes)``, where ``g``, ``[M, out]``, is that of the product's rows.

    - ``measure`` takes rows ``[M, in]``; their weights ``[M]`` or None; and the number of rows of each expert ``[E]``
      if rows are sorted by expert, else None. It returns a tree of float32 arrays like ``reading``.
    - ``weight`` says how much each row counts, 0 for padding: ``[M]``; None if all rows count.
    """

    base: jax.Array | QArray | Codebook | LowRank
    reading: Any
    weight: jax.Array | None
    measure: Callable[[jax.Array, jax.Array | None, jax.Array | None], Any] = _static()
    gradient: bool = _static(False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FakeQuant:
    """A weight that training uses in its quantized form (arXiv:1712.05877, section 3). Steps make it; no file has it.

    - ``dense`` holds the values of the quantized weight as floats, with straight-through gradients.
    - ``coded`` is the quantized weight itself if it quantizes activations too: they are rounded in the same way, with
      straight-through gradients. Else None.
    - ``active`` is bool ``[..., 1, 1]``: whether activations are rounded in this step; None without ``coded``.
    """

    dense: jax.Array
    coded: QArray | None = None
    active: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.dense.shape

    @property
    def ndim(self) -> int:
        return self.dense.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.dense.dtype


@jax.custom_jvp
def straight_through(x: jax.Array, rounded: jax.Array, inside: jax.Array | bool = True) -> jax.Array:
    """``rounded``, with the gradient of ``x`` where ``inside`` is true and 0 elsewhere (arXiv:1308.3432)."""
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    _, rounded, inside = primals
    return rounded, jnp.where(inside, tangents[0], 0).astype(rounded.dtype)


_KINDS = (QArray, Codebook, LowRank, LoRA, Observer, FakeQuant)


def is_leaf(x: Any) -> bool:
    """Whether ``x`` is one of these representations, and not an array; for ``jax.tree.map(..., is_leaf=is_leaf)``."""
    return isinstance(x, _KINDS)


def expand_groups(per_group: jax.Array | np.ndarray, group: int, n_in: int) -> jax.Array | np.ndarray:
    """The value of each column's group: ``[..., groups]`` to ``[..., n_in]``. Works on JAX and on NumPy arrays.

    One group stays ``[..., 1]``, which broadcasts.
    """
    if per_group.shape[-1] == 1:
        return per_group
    return (np if isinstance(per_group, np.ndarray) else jnp).repeat(per_group, group, axis=-1)[..., :n_in]


def centred_codes(leaf: QArray, dtype: jnp.dtype) -> jax.Array:
    """``codes - zero``, ``[..., out, in]``: integers within 255 of zero, exact in every float type from bfloat16 on."""
    codes = leaf.codes.astype(dtype)
    if leaf.zero is None:
        return codes
    return codes - expand_groups(leaf.zero, leaf.group, leaf.codes.shape[-1]).astype(dtype)


def codebook_values(leaf: Codebook) -> jax.Array:
    """``table[codes]``, float32 ``[..., out, in]``.

    Values of a short table are selected bit by bit, because TPUs gather numbers one at a time.
    """
    if leaf.bits <= 4:
        values = [leaf.table[..., i, None, None] for i in range(2**leaf.bits)]
        for bit in range(leaf.bits):
            one = leaf.codes.astype(jnp.uint8) & 2**bit != 0
            values = [jnp.where(one, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
        return values[0]
    *lead, n_out, n_in = leaf.codes.shape
    tables = leaf.table.reshape(-1, leaf.table.shape[-1])
    codes = leaf.codes.reshape(len(tables), -1).astype(jnp.int32)
    return jnp.take_along_axis(tables, codes, axis=-1, mode="promise_in_bounds").reshape(*lead, n_out, n_in)


def coded_values(leaf: QArray | Codebook) -> jax.Array:
    """The weights of a coded leaf with the contraction axis last: float32 ``[..., out, in]``."""
    n_in = leaf.codes.shape[-1]
    values = centred_codes(leaf, jnp.float32) if isinstance(leaf, QArray) else codebook_values(leaf)
    return values if leaf.scale is None else values * expand_groups(leaf.scale, leaf.group, n_in)


def dequantize(leaf: Any, dtype: jnp.dtype | None = None) -> jax.Array:
    """The dense array that a leaf represents; an array is only cast. ``dtype`` defaults to that of the leaf."""
    dtype = leaf.dtype if dtype is None else dtype
    if not is_leaf(leaf):
        return leaf.astype(dtype)
    if isinstance(leaf, Observer):
        return dequantize(leaf.base, dtype)
    if isinstance(leaf, FakeQuant):
        return leaf.dense.astype(dtype)
    if isinstance(leaf, LowRank):
        return _product(leaf).astype(dtype)
    if isinstance(leaf, LoRA):
        dense = dequantize(leaf.base, jnp.float32) + leaf.scale * _product(leaf)
        return (dense if leaf.magnitude is None else dense * leaf.magnitude / column_norms(dense)).astype(dtype)
    dense = coded_values(leaf).astype(dtype)
    return dense.swapaxes(-1, -2) if leaf.axis == -2 else dense


def column_norms(dense: jax.Array) -> jax.Array:
    """The norms of the columns of matrices ``[..., in, out]``: ``[..., 1, out]``; 1 in place of 0."""
    square = jnp.sum(jnp.square(dense), -2, keepdims=True)
    return jnp.sqrt(jnp.where(square > 0, square, 1))


def dora_gain(leaf: LoRA) -> jax.Array:
    """By what DoRA multiplies each column, ``[..., 1, out]``. Norms are constants (arXiv:2402.09353, section 4.3)."""
    parts = jax.tree.map(jax.lax.stop_gradient, dataclasses.replace(leaf, magnitude=None, key=None))
    return leaf.magnitude / column_norms(dequantize(parts, jnp.float32))


def _product(leaf: _Product) -> jax.Array:
    a, b = dequantize(leaf.a, jnp.float32), dequantize(leaf.b, jnp.float32)
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def dequantize_tree(params: Params) -> Params:
    """The tree with every leaf as a dense array."""
    return map_params(lambda _, leaf: dequantize(leaf) if is_leaf(leaf) else leaf, params)


_merge = jax.jit(dequantize)


def merge_adapters(params: Params) -> Params:
    """The tree without adapters: every adapted weight, also one on a quantized base, as one dense array."""
    return map_params(lambda _, leaf: _merge(leaf) if isinstance(leaf, LoRA) else leaf, params)
