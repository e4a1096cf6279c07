"""Products with parameters. Only this module looks inside a leaf, and it chooses how to multiply with it."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.core import weight_only
from jaxlm.core.leaves import (
    Codebook,
    FakeQuant,
    LoRA,
    LowRank,
    Observer,
    QArray,
    centred_codes,
    codebook_values,
    coded_values,
    dequantize,
    dora_gain,
    is_leaf,
    straight_through,
)
from jaxlm.core.sharding import num_shards

Weight = jax.Array | QArray | Codebook | LowRank | LoRA | Observer | FakeQuant


def dot(x: jax.Array, w: Weight, parts: int = 1) -> jax.Array:
    """``x_..xI @ w_IxO``, in the dtype of ``x``.

    ``parts`` says into how many equal parts devices split the contraction axis I (``core.sharding.num_parts``). A
    compressed weight is then multiplied part by part, so that the devices sum results in the dtype of ``x``, and not
    the int32 or float32 in which products accumulate: half the bytes with bfloat16.

    Leading dimensions of ``x`` are flattened first, because XLA on CPU is slow at the weight gradient of a product that
    contracts two dimensions (measured: 158 against 74 ms for the gradient of a 4-layer model). They are not flattened
    where two of them are split over devices: no sharding of the flat dimension matches, and GSPMD would gather ``x``.
    """
    if num_shards("length") > 1 and not isinstance(w, Observer):
        return _dot(x, w, parts)
    y_MxO = _dot(x.reshape(-1, x.shape[-1]), w, parts)
    return y_MxO.reshape(*x.shape[:-1], y_MxO.shape[-1])


def _dot(x_MxI: jax.Array, w: Weight, parts: int = 1) -> jax.Array:
    if isinstance(w, LoRA):  # narrow products: the adapter never becomes a matrix of the base's size
        x_MxR = (_adapter_input(x_MxI, w) @ w.a.astype(x_MxI.dtype)) * w.scale[0, 0].astype(x_MxI.dtype)
        y_MxO = _frozen(partial(_dot, parts=parts), x_MxI, w.base, ())
        return _scaled(y_MxO + x_MxR @ w.b.astype(x_MxI.dtype), w)
    if isinstance(w, LowRank):
        return _dot(_dot(x_MxI, w.a, parts), w.b)
    if isinstance(w, Observer):
        return _observed(partial(_dot, parts=parts), x_MxI, w)
    if isinstance(w, FakeQuant):
        return _dot(_fake_round(x_MxI, w), w.dense)
    if not is_leaf(w):
        return x_MxI @ w.astype(x_MxI.dtype)
    if isinstance(w, QArray) and w.act_bits:
        return _rounded_dot(x_MxI, w, parts)
    return _sum_of_parts(_weight_only_dot, x_MxI, w, parts)


def _sum_of_parts(product, x_MxI: jax.Array, w: QArray | Codebook, parts: int, dtype: jnp.dtype | None = None):
    """``product(x, w)``, computed for ``parts`` parts of I: each result becomes ``dtype`` (that of ``x``) before all
    are added. Where the groups of scales do not divide into the parts, it is one product.
    """
    dtype, groups = x_MxI.dtype if dtype is None else dtype, 1 if w.scale is None else w.scale.shape[-1]
    whole = groups == 1 or groups % parts == 0 and groups * w.group == x_MxI.shape[-1]
    if parts == 1 or x_MxI.shape[-1] % parts or not whole:
        return product(x_MxI, w).astype(dtype)

    def split(values):
        return jnp.moveaxis(values.reshape(*values.shape[:-1], parts, -1), -2, 0)

    def repeated(values):
        return jnp.broadcast_to(values, (parts, *values.shape))

    per_group = {"scale": w.scale} | ({"zero": w.zero} if isinstance(w, QArray) else {"table": w.table})
    changes = {
        name: None if part is None else split(part) if groups > 1 and name != "table" else repeated(part)
        for name, part in per_group.items()
    }
    y_PxMxO = jax.vmap(product)(split(x_MxI), dataclasses.replace(w, codes=split(w.codes), **changes))
    # ``jnp.sum`` would add bfloat16 in float32.
    return jax.lax.reduce(y_PxMxO.astype(dtype), jnp.zeros((), dtype), jax.lax.add, (0,))


def _scaled(y: jax.Array, w: LoRA) -> jax.Array:
    """A product with ``base + scale * a @ b``, with its columns scaled to the magnitudes of DoRA, if there are any."""
    return y if w.magnitude is None else (y * dora_gain(w)[0]).astype(y.dtype)


def _adapter_input(x_MxI: jax.Array, w: LoRA) -> jax.Array:
    """The input of an adapter, with dropout while it trains."""
    if w.key is None:
        return x_MxI
    return dropout(x_MxI, w.dropout, jax.random.wrap_key_data(w.key.reshape(-1, 2)[0], impl="threefry2x32"))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Sets elements to 0 with probability ``rate`` and scales up the others; without a key returns ``x``.

    It draws 16 random bits for each element, half of those of a float, so the rate is exact to 1 / 65536.
    """
    if key is None or rate == 0.0:
        return x
    threshold = round(rate * 2**16)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= threshold
    return jnp.where(keep, x * (1.0 / (1.0 - threshold / 2**16)), 0.0).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen(product, x_MxI: jax.Array, w: Weight, rest: tuple) -> jax.Array:
    """``product(x, w, *rest)`` without a gradient for ``w`` (QLoRA, arXiv:2305.14314).

    The backward pass dequantizes ``w`` again: keeping the dense matrix until then would undo the savings.
    """
    return product(x_MxI, w, *rest)


def _frozen_forward(product, x_MxI, w, rest):
    return product(x_MxI, w, *rest), (w, rest)


def _frozen_backward(product, kept, gradient_MxO):
    w, rest = kept
    if isinstance(w, QArray) and w.act_bits:  # straight through the rounding of activations
        w = dataclasses.replace(w, act_bits=0, act_scale=None)
    n_in = w.shape[-1 if product is dot_t else -2]
    zeros_MxI = jnp.zeros((*gradient_MxO.shape[:-1], n_in), gradient_MxO.dtype)  # products are linear
    return *jax.vjp(lambda x_MxI: product(x_MxI, w, *rest), zeros_MxI)[1](gradient_MxO), None, None


_frozen.defvjp(_frozen_forward, _frozen_backward)


def _observed(product, x_MxI: jax.Array, w: Observer, sizes_E: jax.Array | None = None) -> jax.Array:
    """A product whose input, or the gradient of whose output, is measured; see ``core.leaves.Observer``."""
    sizes = () if sizes_E is None else (sizes_E,)
    if w.gradient:
        return _measured(w.measure, True, product(x_MxI, w.base, *sizes), w.reading, w.weight, sizes_E)
    return product(_measured(w.measure, False, x_MxI, w.reading, w.weight, sizes_E), w.base, *sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _measured(measure, gradient: bool, x_MxI: jax.Array, reading, weight_M, sizes_E) -> jax.Array:
    """``x``. The gradient of ``reading`` is the measurement of ``x``, or of the gradient of ``x``."""
    return x_MxI


def _measured_forward(measure, gradient, x_MxI, reading, weight_M, sizes_E):
    return x_MxI, (None if gradient else x_MxI, weight_M, sizes_E)


def _measured_backward(measure, gradient, seen, gradient_MxI):
    x_MxI, weight_M, sizes_E = seen
    return gradient_MxI, measure(gradient_MxI if gradient else x_MxI, weight_M, sizes_E), None, None


_measured.defvjp(_measured_forward, _measured_backward)


def dot_t(x: jax.Array, table: Weight) -> jax.Array:
    """``x_..xD @ table_VxD.T`` in the dtype of ``x``: the output head of a model with tied embeddings."""
    if isinstance(table, LoRA):
        x = _scaled(x, table)
        x_xR = dot_t(x, table.b) * table.scale[0, 0].astype(x.dtype)
        return _frozen(dot_t, x, table.base, ()) + dot_t(x_xR, table.a)
    if isinstance(table, LowRank):
        return dot_t(dot_t(x, table.b), table.a)
    if isinstance(table, Observer):
        y_MxV = _observed(dot_t, x.reshape(-1, x.shape[-1]), table)
        return y_MxV.reshape(*x.shape[:-1], y_MxV.shape[-1])
    if isinstance(table, FakeQuant):
        return dot_t(_fake_round(x, table), table.dense)
    if is_leaf(table):
        return dot(x, table)  # codes have their contraction axis last, also those of a table
    if num_shards("length") > 1:
        return _contract_last(x, table.astype(x.dtype))
    y_MxV = _contract_last(x.reshape(-1, x.shape[-1]), table.astype(x.dtype))
    return y_MxV.reshape(*x.shape[:-1], y_MxV.shape[-1])


def take(table: Weight, ids: jax.Array) -> jax.Array:
    """The rows of ``table_VxD`` with these ids, ``[..., D]``, in the dtype of the table."""
    if isinstance(table, LoRA):
        rows = take(jax.tree.map(jax.lax.stop_gradient, table.base), ids)
        return _scaled(rows + (table.scale[0, 0] * jnp.take(table.a, ids, axis=0) @ table.b).astype(rows.dtype), table)
    if isinstance(table, Observer):
        return take(table.base, ids)
    if isinstance(table, FakeQuant):
        return take(table.dense, ids)
    if isinstance(table, LowRank):
        return dequantize(table)[ids]
    if isinstance(table, Codebook):  # its ``table`` is of values, and has no rows to take
        codes, scale = (None if part is None else jnp.take(part, ids, axis=0) for part in (table.codes, table.scale))
        rows = dataclasses.replace(table, codes=codes.reshape(-1, codes.shape[-1]), scale=scale)
        return coded_values(rows).reshape(codes.shape)
    rows = jax.tree.map(lambda part: jnp.take(part, ids, axis=0), table)
    return dequantize(rows) if is_leaf(rows) else rows


def ragged_dot(x_MxI: jax.Array, w_ExIxO: Weight, sizes_E: jax.Array) -> jax.Array:
    """The first ``sizes_E[0]`` rows times the first matrix, the next ``sizes_E[1]`` times the second, ...: ``[M, O]``.

    XLA has no ragged integer product: compressed matrices are dequantized whole, and int8 activations are only rounded.
    """
    if isinstance(w_ExIxO, LoRA):
        x_MxR = ragged_dot(_adapter_input(x_MxI, w_ExIxO), w_ExIxO.a, sizes_E)
        y_MxO = _frozen(ragged_dot, x_MxI, w_ExIxO.base, (sizes_E,))
        y_MxO += ragged_dot(x_MxR, w_ExIxO.scale * w_ExIxO.b, sizes_E)
        if w_ExIxO.magnitude is None:
            return y_MxO
        gain_MxO = jnp.repeat(dora_gain(w_ExIxO)[:, 0], sizes_E, axis=0, total_repeat_length=len(y_MxO))
        return (y_MxO * gain_MxO).astype(y_MxO.dtype)
    if isinstance(w_ExIxO, LowRank):
        return ragged_dot(ragged_dot(x_MxI, w_ExIxO.a, sizes_E), w_ExIxO.b, sizes_E)
    if isinstance(w_ExIxO, Observer):
        return _observed(ragged_dot, x_MxI, w_ExIxO, sizes_E)
    if isinstance(w_ExIxO, FakeQuant):
        return ragged_dot(_fake_round(x_MxI, w_ExIxO, sizes_E), w_ExIxO.dense, sizes_E)
    if is_leaf(w_ExIxO):
        if isinstance(w_ExIxO, QArray) and w_ExIxO.act_bits:
            codes_MxI, scale_Mx1 = _round_rows(x_MxI, w_ExIxO, sizes_E)
            x_MxI = (codes_MxI.astype(jnp.float32) * scale_Mx1).astype(x_MxI.dtype)
        w_ExIxO = dequantize(w_ExIxO)
    return jax.lax.ragged_dot(x_MxI, w_ExIxO.astype(x_MxI.dtype), sizes_E)


def _contract_last(x_MxI: jax.Array, w_OxI: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    return jax.lax.dot_general(x_MxI, w_OxI, (((x_MxI.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


def _weight_only_dot(x_MxI: jax.Array, w: QArray | Codebook) -> jax.Array:
    integers = isinstance(w, QArray) and jnp.issubdtype(w.codes.dtype, jnp.integer) and x_MxI.ndim == 2
    faster = {}
    if _takes_groups(x_MxI, w):
        faster["tpu"] = _grouped_dot
    if integers and w.scale.shape[-1] == 1:
        faster["cpu"] = _planes_dot
    if integers and weight_only.enabled() and weight_only.takes(x_MxI, w):
        faster["cuda"] = weight_only.dot
    return _by_platform(tuple(faster.items()), x_MxI, w) if faster else _converted_dot(x_MxI, w)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_platform(faster: tuple, x_MxI: jax.Array, w: QArray) -> jax.Array:
    """``_converted_dot`` by another product that is faster on some platforms; its gradients are those of the former."""
    return jax.lax.platform_dependent(x_MxI, w, default=_converted_dot, **dict(faster))


@_by_platform.defjvp
def _by_platform_jvp(faster, primals, tangents):
    return _by_platform(faster, *primals), jax.jvp(_converted_dot, primals, tangents)[1]


def _converted_dot(x_MxI: jax.Array, w: QArray | Codebook) -> jax.Array:
    """A product with the codes as floats. One scale for each output channel is applied to the result, which is less
    work, and integers are exact in any float type."""
    if w.scale is None:
        return _contract_last(x_MxI, codebook_values(w).astype(x_MxI.dtype))
    if w.scale.shape[-1] > 1:
        return _contract_last(x_MxI, coded_values(w).astype(x_MxI.dtype))
    values_OxI = centred_codes(w, x_MxI.dtype) if isinstance(w, QArray) else codebook_values(w).astype(x_MxI.dtype)
    return (_contract_last(x_MxI, values_OxI, jnp.float32) * w.scale[:, 0]).astype(x_MxI.dtype)


_FEW_ROWS = 1024


def _takes_groups(x_MxI: jax.Array, w: QArray | Codebook) -> bool:
    """Whether ``_grouped_dot`` takes this product: weights in whole groups, and so few rows that the time goes to
    reading the weights."""
    groups = 1 if w.scale is None else w.scale.shape[-1]
    few = x_MxI.ndim == 2 and x_MxI.shape[0] <= _FEW_ROWS
    return few and groups > 1 and groups * w.group == x_MxI.shape[1] and (isinstance(w, QArray) or w.bits <= 4)


def _grouped_dot(x_MxI: jax.Array, w: QArray | Codebook) -> jax.Array:
    """``_converted_dot`` as a product for each group, to which its scale is applied: only the codes are as large as the
    weight.

    XLA on TPU writes scales that are repeated along a row to memory before it multiplies with them. That makes 463 MiB
    of memory traffic for 16 rows by int4 weights of 8192 x 3584; products by groups make 15.5, and bfloat16 weights 56
    (compiled for v5e). A single row is doubled, because it would not be a matrix product.
    """
    rows, groups = x_MxI.shape[0], w.scale.shape[-1]
    x_MxGxK = (jnp.concatenate([x_MxI, x_MxI]) if rows == 1 else x_MxI).reshape(-1, groups, w.group)
    values_OxI = (w.codes if isinstance(w, QArray) else codebook_values(w)).astype(x_MxI.dtype)
    values_OxGxK = values_OxI.reshape(-1, groups, w.group)
    y_GxMxO = jnp.einsum("mgk,ogk->gmo", x_MxGxK, values_OxGxK, preferred_element_type=jnp.float32)
    y_MxO = jnp.sum(y_GxMxO * w.scale.T[:, None], 0)
    if isinstance(w, QArray) and w.zero is not None:
        sums_MxG = jnp.sum(x_MxGxK, -1, dtype=jnp.float32)
        y_MxO -= jnp.matmul(sums_MxG, (w.zero.astype(jnp.float32) * w.scale).T, precision="highest")
    return y_MxO[:rows].astype(x_MxI.dtype)


def _planes_dot(x_MxI: jax.Array, w: QArray) -> jax.Array:
    """``_converted_dot`` without converting the weight: ``x`` becomes a sum of int8 planes, whose products are exact in
    int32.

    XLA on CPU takes several times as long to convert a weight as to multiply with it. Each plane holds the remainder of
    the planes before it, times 254: two planes are exact to 2**-16 of a row's largest magnitude, three to 2**-24. Rows
    are multiplied 256 at a time, whose sums stay in the processor's cache (1024 x 4096, M = 512: 1.7 times as fast).
    """
    whole = x_MxI.shape[0] // 256 * 256
    if x_MxI.shape[0] > 256:
        y_NxMxO = jax.lax.map(lambda x_MxI: _planes_dot(x_MxI, w), x_MxI[:whole].reshape(-1, 256, x_MxI.shape[1]))
        y_MxO = y_NxMxO.reshape(whole, -1)
        return jnp.concatenate([y_MxO, _planes_dot(x_MxI[whole:], w)]) if whole < x_MxI.shape[0] else y_MxO
    scale_Mx1 = jnp.max(jnp.abs(x_MxI), -1, keepdims=True).astype(jnp.float32) / 127
    rest_MxI = x_MxI.astype(jnp.float32) * jnp.where(scale_Mx1 > 0, 1 / scale_Mx1, 0)
    planes = []
    for _ in range(2 if x_MxI.dtype.itemsize == 2 else 3):
        planes.append(jnp.round(rest_MxI))
        rest_MxI = (rest_MxI - planes[-1]) * 254
    sums_PxMxO = _integer_dot(jnp.concatenate(planes).astype(jnp.int8), w).reshape(len(planes), x_MxI.shape[0], -1)
    y_MxO = sum(254.0**-plane * sums for plane, sums in reversed(list(enumerate(sums_PxMxO))))
    return (y_MxO * scale_Mx1 * w.scale[:, 0]).astype(x_MxI.dtype)


def _integer_dot(codes_MxI: jax.Array, w: QArray) -> jax.Array:
    """``codes @ (w.codes - w.zero)``, summed in int32, as float32 ``[M, O]``."""
    sums_MxO = _contract_last(codes_MxI, w.codes.astype(jnp.int8), jnp.int32)
    if w.zero is not None:
        sums_MxO -= jnp.sum(codes_MxI, -1, keepdims=True, dtype=jnp.int32) * w.zero[:, 0].astype(jnp.int32)
    return sums_MxO.astype(jnp.float32)


def _rounded_dot(x_MxI: jax.Array, w: QArray, parts: int = 1) -> jax.Array:
    """A product with quantized activations: int8 by int8 accumulated in int32, or float8 by float8 in float32. The
    parts of a row share its scale.

    A single row of integers is doubled, because XLA on CPU is slow at M = 1 (27 against 0.9 ms, 2048 x 2048). Where
    groups of inputs have scales of their own, the rounded activations are multiplied as floats.
    """
    if w.scale.shape[-1] > 1:
        codes_MxI, scale_Mx1 = _round_rows(x_MxI, w)
        rounded_MxI = (codes_MxI.astype(jnp.float32) * scale_Mx1).astype(x_MxI.dtype)
        return _sum_of_parts(_weight_only_dot, rounded_MxI, dataclasses.replace(w, act_bits=0, act_scale=None), parts)
    rows, integer = x_MxI.shape[0], jnp.issubdtype(w.codes.dtype, jnp.integer)
    x_MxI = jnp.concatenate([x_MxI, x_MxI]) if rows == 1 and integer else x_MxI
    codes_MxI, scale_Mx1 = _round_rows(x_MxI, w)

    def product(codes_MxI: jax.Array, w: QArray) -> jax.Array:
        sums_MxO = _integer_dot(codes_MxI, w) if integer else _contract_last(codes_MxI, w.codes, jnp.float32)
        return sums_MxO * scale_Mx1 * w.scale[:, 0]

    y_MxO = _sum_of_parts(product, codes_MxI, dataclasses.replace(w, act_scale=None), parts, x_MxI.dtype)
    return y_MxO[:rows]


def _round_rows(x_MxI: jax.Array, w: QArray, sizes_E: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Codes of the rows, in the type of the weight's codes, and their scales ``[M, 1]``; see ``core.leaves.QArray``."""
    scale = w.act_scale
    if scale is not None:
        scale = scale.reshape(-1, 1)  # one a matrix
        scale = scale if sizes_E is None else jnp.repeat(scale, sizes_E, axis=0, total_repeat_length=x_MxI.shape[0])
    return quantize_tokens(x_MxI, scale, w.codes.dtype if w.codes.dtype == jnp.float8_e4m3fn else jnp.int8)


def _fake_round(x_MxI: jax.Array, w: FakeQuant, sizes_E: jax.Array | None = None) -> jax.Array:
    """The rows as ``_rounded_dot`` rounds them, as floats; no gradient passes where a value is clipped."""
    if w.coded is None:
        return x_MxI
    codes_MxI, scale_Mx1 = _round_rows(jax.lax.stop_gradient(x_MxI), w.coded, sizes_E)
    rounded_MxI = (codes_MxI.astype(jnp.float32) * scale_Mx1).astype(x_MxI.dtype)
    reach_Mx1 = scale_Mx1 * _largest_code(codes_MxI.dtype) * (1 + 1e-5)  # a row's own scale reaches all of it
    rounded_MxI = straight_through(x_MxI, rounded_MxI, jnp.abs(x_MxI) <= reach_Mx1)
    return jnp.where(w.active.reshape(-1)[0], rounded_MxI, x_MxI)


def quantize_tokens(
    x_MxI: jax.Array, scale_Mx1: jax.Array | None = None, dtype: jnp.dtype = jnp.int8
) -> tuple[jax.Array, jax.Array]:
    """Codes of every row, int8 in [-127, 127] or float8, and their float32 scales ``[M, 1]`` (or ``[1, 1]``).

    By default each row gets a scale that makes its largest magnitude the largest code; a row of zeros has scale 0. With
    a given scale, values beyond the largest code are clipped to it.
    """
    x_MxI = x_MxI.astype(jnp.float32)
    integer, limit = jnp.issubdtype(dtype, jnp.integer), _largest_code(dtype)
    if scale_Mx1 is None:
        scale_Mx1 = jnp.max(jnp.abs(x_MxI), -1, keepdims=True) / limit
    scaled_MxI = jnp.clip(x_MxI * jnp.where(scale_Mx1 > 0, 1 / scale_Mx1, 0), -limit, limit)
    return (jnp.round(scaled_MxI) if integer else scaled_MxI).astype(dtype), scale_Mx1


def _largest_code(dtype: jnp.dtype) -> float:
    return 127.0 if jnp.issubdtype(dtype, jnp.integer) else float(jnp.finfo(dtype).max)
