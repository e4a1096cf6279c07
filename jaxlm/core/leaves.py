"""Leaves that carry their own representation, opened only by ``core.ops``: coded weights, factors and adapters."""

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
    """What leaves of codes ``[..., out, in]`` have in common: the shape of the dense array that they stand for."""

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
    """A weight ``(codes - zero) * scale``, its contraction axis last, where integer dots are fast.

    Invariants, which every function that makes one keeps:

    - ``codes`` is an integer array ``[..., out, in]`` in ``[-2**(bits-1), 2**(bits-1))``; leading dimensions are
      stacked layers. Its dtype is int8, or int4 where ``compression.platforms`` narrowed it for an accelerator; or it
      is float8_e4m3fn, with ``bits`` 8 and no zero.
    - ``scale`` is float32 ``[..., out, groups]``, positive; columns ``[g * group, (g + 1) * group)`` share entry g.
      The last group may be shorter; ``group == 0`` is one group, that is, one scale an output channel.
    - ``zero`` is None (a symmetric grid) or int8 like ``scale``, in the range of the codes. It is an integer, so a
      zero weight is exactly representable: pruned weights survive quantization.
    - ``act_bits`` is 0 (weights are dequantized to the activations' dtype) or 8: activations are rounded to the type of
      the codes, int8 or float8, and the dot accumulates in int32 or float32, which takes ``group == 0``. They are
      rounded a token, by its own largest magnitude; or, where ``act_scale`` is there, float32 ``[..., 1, 1]``, by that.
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
    act_scale: jax.Array | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """What the leaf dequantizes to by default."""
        return self.scale.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codebook(_Coded):
    """A weight ``table[codes] * scale``: values shared through a table, its contraction axis last.

    - ``codes`` is uint8 ``[..., out, in]``, below ``2**bits``; uint4 where ``compression.platforms`` narrowed it.
    - ``table`` is float32 ``[..., 2**bits]``, one a matrix.
    - ``scale`` is float32 ``[..., out, groups]`` as in ``QArray``, or None: 1.
    - ``kind`` says where the table is from: "nf4" (QLoRA, arXiv:2305.14314), "mxfp4" (OCP Microscaling Formats v1.0:
      scales are powers of two) or "shared" (values found in the weights, Deep Compression, arXiv:1510.00149).
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
        """What the leaf dequantizes to by default."""
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
        """What the leaf dequantizes to by default."""
        return self.a.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRA(_Product):
    """A weight ``base + scale * a @ b``, a low-rank adapter kept apart from what it adapts (arXiv:2106.09685).

    - ``base`` is an array or another leaf of dense shape ``[..., in, out]``; an embedding table is ``[rows, width]``.
      It is frozen: no gradient reaches it.
    - ``a`` is ``[..., in, r]`` and ``b`` is ``[..., r, out]``; leading dimensions are stacked layers (and experts).
      Layers of lower rank are filled up with zeros; a layer without an adapter is zeros only.
    - ``scale`` is float32 ``[..., 1, 1]``, so that all parts have the rank of the dense array.
    - ``magnitude`` is float32 ``[..., 1, out]``, to which the norms of the columns of that sum are brought (DoRA,
      arXiv:2402.09353); None leaves them.
    - ``key`` is uint32 ``[..., 2]``: with it, what the adapter reads is dropped out at the rate ``dropout``. Training
      puts it there for one step; None is no dropout.
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
        """What the leaf dequantizes to by default."""
        return self.base.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observer:
    """A weight that tells what it is multiplied with: the gradient of any sum over ``ops.dot(x, tap)`` with respect to
    ``reading`` is ``measure(x, weight, sizes)``, whatever the gradient of the product is.

    So a model is calibrated without touching its layers: ``jax.grad`` of it with respect to the readings, zeros before,
    and XLA drops all that the readings do not need. With ``gradient`` it is ``measure(g, weight, sizes)`` of the
    gradients ``g``, ``[M, out]``, of what is differentiated with respect to the product's rows.

    - ``measure`` takes rows ``[M, in]``, their weights ``[M]`` or None, and, where the rows are sorted by expert, the
      experts' numbers of rows ``[E]`` or None; it returns a tree of float32 arrays like ``reading``.
    - ``weight`` is how much each row counts: 0 for padding. ``[M]``, or None where all rows count.
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
    """A weight that a training uses in its compressed form; made inside a step, never stored (arXiv:1712.05877, 3).

    - ``dense`` holds the values of the compressed weight as floats, with straight-through gradients.
    - ``coded`` is the compressed weight itself where it rounds activations too: they are rounded in the same way, with
      straight-through gradients. None where it does not.
    - ``active`` is bool ``[..., 1, 1]``, whether activations are rounded in this step; None without ``coded``.
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
    """``rounded``, bit by bit, with the gradient of ``x`` where ``inside`` and 0 elsewhere (arXiv:1308.3432)."""
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    _, rounded, inside = primals
    return rounded, jnp.where(inside, tangents[0], 0).astype(rounded.dtype)


_KINDS = (QArray, Codebook, LowRank, LoRA, Observer, FakeQuant)


def is_leaf(x: Any) -> bool:
    """Whether ``x`` is a leaf of several arrays: what ``jax.tree.map(..., is_leaf=is_leaf)`` must not open."""
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
    """``table[codes]``, float32 ``[..., out, in]``; by choices, bit by bit, from a short table, for TPUs gather single
    numbers."""
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
    """The dense array that a leaf stands for; an array is only cast. ``dtype`` defaults to the leaf's own."""
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
    """Of a matrix ``[..., in, out]``: ``[..., 1, out]``, never 0."""
    square = jnp.sum(jnp.square(dense), -2, keepdims=True)
    return jnp.sqrt(jnp.where(square > 0, square, 1))


def dora_gain(leaf: LoRA) -> jax.Array:
    """What DoRA multiplies each column with, ``[..., 1, out]``. Norms count as constants (arXiv:2402.09353, 4.3)."""
    parts = jax.tree.map(jax.lax.stop_gradient, dataclasses.replace(leaf, magnitude=None, key=None))
    return leaf.magnitude / column_norms(dequantize(parts, jnp.float32))


def _product(leaf: _Product) -> jax.Array:
    a, b = dequantize(leaf.a, jnp.float32), dequantize(leaf.b, jnp.float32)
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def dequantize_tree(params: Params) -> Params:
    """The plain tree: every compressed or adapted leaf as the array it stands for."""
    return map_params(lambda _, leaf: dequantize(leaf) if is_leaf(leaf) else leaf, params)


_merge = jax.jit(dequantize)


def merge_adapters(params: Params) -> Params:
    """The tree without adapters: every adapted weight as one dense array, over a quantized base too."""
    return map_params(lambda _, leaf: _merge(leaf) if isinstance(leaf, LoRA) else leaf, params)
