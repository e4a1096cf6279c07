import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.compression.quantize import rtn
from jaxlm.compression.quantize.codebook import nf4, nf4_table
from jaxlm.compression.quantize.float8 import quantize_float8
from jaxlm.core import ops
from jaxlm.core.leaves import Codebook, LoRA, LowRank, Observer, dequantize
from jaxlm.core.sharding import make_mesh, shardings
from tests.training.hlo import Collective, collectives

# Compiled whole: op by op, each of their steps would be a program of its own.
quantize = jax.jit(rtn.quantize, static_argnames=("bits", "group", "symmetric", "act_bits", "axis"))
dot, dequantized = jax.jit(ops.dot), jax.jit(dequantize)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def nf4_leaf(w):
    codes, scale = nf4(w.T, group=8)
    return Codebook(codes, jnp.asarray(nf4_table(), jnp.float32), scale, bits=4, group=8, kind="nf4")


def integer_reference(x, leaf):
    """w8a8 in NumPy: int64 sums of the codes, float64 scales."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    scale = np.abs(x).max(-1, keepdims=True).astype(np.float32).astype(np.float64) / 127
    codes = np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)).astype(np.int64)
    zero = 0 if leaf.zero is None else np.asarray(leaf.zero, np.int64)
    weights = np.asarray(leaf.codes, np.int64) - zero
    return codes @ weights.T * scale * np.asarray(leaf.scale, np.float64)[:, 0]


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)])
def test_dense_dot_and_its_gradients(shape):
    x, w = normal(*shape), normal(7, 5, seed=1)
    np.testing.assert_allclose(dot(x, w), np.einsum("...i,io->...o", x, w), rtol=1e-5, atol=1e-6)
    grads = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(dot(x, w))), (0, 1)))(x, w)
    x, w = np.asarray(x), np.asarray(w)
    back = np.cos(x @ w)
    for gradient, plain in zip(grads, (back @ w.T, x.reshape(-1, 7).T @ back.reshape(-1, 5)), strict=True):
        np.testing.assert_allclose(gradient, plain, rtol=1e-4, atol=1e-5)


def test_dot_keeps_the_dtype_of_its_input():
    w = normal(40, 6)
    leaves = [w, quantize(w, bits=4, group=16), quantize(w, bits=8), quantize(w, bits=8, act_bits=8)]
    for dtype in (jnp.float32, jnp.bfloat16):
        for leaf in leaves:
            assert dot(normal(2, 40, dtype=dtype), leaf).dtype == dtype


@pytest.mark.parametrize(("bits", "group", "symmetric"), [
    (3, 16, True), (8, 128, False), (8, 0, True), (3, 16, False),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in [
        (3, 0, True), (3, 128, True), (8, 16, True), (8, 128, True), (3, 0, False), (3, 128, False), (8, 0, False),
        (8, 16, False)]),
])
def test_weight_only_dot_is_the_dot_with_the_dequantized_weight(bits, group, symmetric):
    x, leaf = normal(3, 5, 40), quantize(normal(40, 6, seed=1), bits=bits, group=group, symmetric=symmetric)
    exact = np.asarray(x, np.float64) @ np.asarray(dequantized(leaf), np.float64)
    np.testing.assert_allclose(dot(x, leaf), exact, atol=1e-5 * np.abs(exact).max())
    half = dot(x.astype(jnp.bfloat16), leaf).astype(jnp.float32)
    np.testing.assert_allclose(half, exact, atol=2e-2 * np.abs(exact).max())


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("leaf_of", [
    lambda w: quantize(w, bits=4, group=8), lambda w: quantize(w, bits=8, group=20, symmetric=False),
    nf4_leaf,
], ids=["int4", "int8 with zeros", "nf4"])
def test_dots_by_groups_are_those_with_the_dequantized_weight(rows, leaf_of):
    x, leaf = normal(rows, 40), leaf_of(normal(40, 6, seed=1))
    exact = np.asarray(x, np.float64) @ np.asarray(dequantized(leaf), np.float64)
    assert ops._takes_groups(x, leaf)
    np.testing.assert_allclose(jax.jit(ops._grouped_dot)(x, leaf), exact, atol=1e-6 * np.abs(exact).max())
    half = jax.jit(ops._grouped_dot)(x.astype(jnp.bfloat16), leaf)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=2e-2 * np.abs(exact).max())


def test_what_goes_by_groups():
    leaf = quantize(normal(40, 6), bits=4, group=8)
    assert not ops._takes_groups(normal(2000, 40), leaf)  # many rows are not held up by reading the weight
    assert not ops._takes_groups(normal(2, 40), quantize(normal(40, 6), bits=4))
    assert not ops._takes_groups(normal(2, 40), quantize(normal(40, 6), bits=4, group=16))  # a shorter last group


@pytest.mark.parametrize(("rows", "dtype", "error"), [
    (1, jnp.float32, 2e-7), (300, jnp.float32, 2e-7), (3, jnp.bfloat16, 2e-5),
])
def test_weight_only_dots_by_planes_are_as_exact_as_their_activations(rows, dtype, error):
    """Values of very different size in a row, which planes could lose. 300 rows go in two parts."""
    x = (normal(rows, 40) * 10.0 ** jnp.arange(-4, 4).repeat(5)).at[0].set(0).astype(dtype)
    x = x.at[-1, 0].set(3e4)
    leaf = quantize(normal(40, 6, seed=1), bits=8, symmetric=False)
    weights = np.asarray(dequantized(leaf), np.float64)
    exact = np.asarray(x, np.float64) @ weights
    y = jax.jit(ops._planes_dot)(x, leaf)
    assert y.dtype == dtype
    most = np.abs(np.asarray(x, np.float64)).max(1, keepdims=True) * np.abs(weights).sum(0)
    rounding = np.abs(exact) * float(jnp.finfo(dtype).eps)
    assert (np.abs(np.asarray(y, np.float64) - exact) <= error * most + rounding).all()
    assert not np.isfinite(dot(x.at[-1, 3].set(jnp.nan), leaf)[-1]).any()


@pytest.mark.parametrize(("rows", "symmetric"), [
    (1, True), (9, False),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in [(2, True), (9, True), (1, False), (2, False)]),
])
def test_integer_dot_is_exact(rows, symmetric):
    x, leaf = normal(rows, 300), quantize(normal(300, 20, seed=1), bits=8, symmetric=symmetric, act_bits=8)
    x = jnp.round(x * 64) / 64  # products of these by 127 / max are never a rounding error away from a tie
    np.testing.assert_allclose(jax.jit(ops.dot)(x, leaf), integer_reference(x, leaf), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_are_rounded_beside_weights_in_groups_too(symmetric):
    """W4A8: the same product as in float64, of the rounded rows by the weights."""
    x, leaf = normal(3, 300), quantize(normal(300, 20, seed=1), bits=4, group=32, symmetric=symmetric, act_bits=8)
    largest = np.abs(np.float64(x)).max(1, keepdims=True)
    rounded = np.round(np.float64(x) / largest * 127) / 127 * largest
    expected = rounded @ np.asarray(dequantized(leaf), np.float64)
    np.testing.assert_allclose(jax.jit(ops.dot)(x, leaf), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - np.float64(x) @ np.asarray(dequantized(leaf), np.float64)).max() > 1e-2


def test_integer_dot_of_each_row_is_its_own():
    leaf = quantize(normal(64, 8, seed=1), bits=8, act_bits=8)
    x = normal(4, 64) * jnp.array([[1.0], [1e-6], [0.0], [1e6]])
    together = dot(x, leaf)
    for row in range(4):
        np.testing.assert_allclose(dot(x[row], leaf), together[row], rtol=1e-6)
    assert not together[2].any()
    np.testing.assert_allclose(together, x @ dequantized(leaf), atol=np.asarray(jnp.abs(x).max(-1)).max() * 0.3)


def test_integer_dot_passes_nan_on():
    leaf = quantize(normal(64, 8, seed=1), bits=8, act_bits=8)
    y = dot(normal(3, 64).at[1, 5].set(jnp.nan), leaf)
    assert jnp.isnan(y[1]).all() and jnp.isfinite(y[jnp.array([0, 2])]).all()


@pytest.mark.parametrize("act_bits", [0, 8])
def test_stacked_leaves_are_scanned_and_mapped(act_bits):
    x, leaf = normal(5, 24), quantize(normal(3, 24, 8, seed=1), bits=8, act_bits=act_bits)
    layers = [jax.tree.map(lambda part, i=i: part[i], leaf) for i in range(3)]
    each = jnp.stack([dot(x, layer) for layer in layers])
    _, scanned = jax.jit(lambda x, leaf: jax.lax.scan(lambda _, layer: (None, dot(x, layer)), None, leaf))(x, leaf)
    np.testing.assert_allclose(scanned, each, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(ops.dot, (None, 0))(x, leaf), each, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("leaf_of", [lambda t: t, lambda t: quantize(t, bits=4, group=8, symmetric=False, axis=-1)])
def test_tables_give_rows_and_logits(leaf_of):
    table = leaf_of(normal(11, 20))
    ids, x = jnp.array([[3, 0], [10, 3]]), normal(2, 5, 20, seed=2)
    dense = np.asarray(dequantized(table))
    assert table.shape == (11, 20)
    np.testing.assert_array_equal(ops.take(table, ids), dense[np.asarray(ids)])
    np.testing.assert_allclose(ops.dot_t(x, table), np.asarray(x) @ dense.T, rtol=1e-5, atol=1e-5)


def test_integer_head():
    table = quantize(normal(11, 20), bits=8, act_bits=8, axis=-1)
    x = normal(3, 20, seed=2)
    np.testing.assert_allclose(ops.dot_t(x, table), integer_reference(x, table), rtol=1e-5, atol=1e-5)


def adapted(base, *, rank=3, seed=5):
    *lead, n_in, n_out = base.shape
    scale = jnp.full((*lead, 1, 1), 0.7) * (1 + jnp.arange(np.prod(lead, dtype=int))).reshape(*lead, 1, 1)
    return LoRA(base, normal(*lead, n_in, rank, seed=seed), normal(*lead, rank, n_out, seed=seed + 1), scale)


BASES = [lambda w: w, lambda w: quantize(w, bits=4, group=8), lambda w: quantize(w, bits=8), adapted]


@pytest.mark.parametrize("base_of", BASES)
def test_an_adapted_dot_is_the_dot_with_the_sum(base_of):
    leaf, x = adapted(base_of(normal(24, 6))), normal(2, 5, 24, seed=2)
    a, b = np.asarray(leaf.a, np.float64), np.asarray(leaf.b, np.float64)
    dense = np.asarray(dequantized(leaf.base), np.float64) + 0.7 * a @ b
    assert leaf.shape == (24, 6) and leaf.ndim == 2 and leaf.dtype == jnp.float32
    np.testing.assert_allclose(dequantized(leaf), dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(ops.dot)(x, leaf), np.asarray(x, np.float64) @ dense, rtol=1e-4, atol=1e-4)
    half = dot(x.astype(jnp.bfloat16), leaf)
    assert half.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ dense
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=3e-2 * np.abs(exact).max())


def test_an_adapter_over_int8_activations_leaves_them_to_the_base():
    leaf, x = adapted(quantize(normal(64, 8, seed=1), bits=8, act_bits=8)), normal(3, 64)
    delta = 0.7 * np.asarray(x) @ np.asarray(leaf.a) @ np.asarray(leaf.b)
    np.testing.assert_allclose(dot(x, leaf) - dot(x, leaf.base), delta, rtol=1e-4, atol=1e-4)


def test_no_product_of_an_adapter_is_as_large_as_its_base():
    leaf = adapted(normal(50, 40))
    shapes = {v.aval.shape for eqn in jax.make_jaxpr(ops.dot)(normal(2, 50), leaf).eqns for v in eqn.outvars}
    assert (50, 40) not in shapes and (2, 3) in shapes


def test_gradients_reach_an_adapter_and_not_a_frozen_base():
    x, base = normal(4, 24), quantize(normal(24, 6), bits=4, group=8)

    def loss(parts, base):
        return jnp.sum(jnp.sin(dot(x, LoRA(base, **parts, scale=jnp.full((1, 1), 0.7)))))

    def plain(parts, base):
        return jnp.sum(jnp.sin(x @ (dequantized(base) + 0.7 * parts["a"] @ parts["b"])))

    parts = {"a": normal(24, 3, seed=5), "b": normal(3, 6, seed=6)}
    for frozen in (base, dequantized(base)):
        grads, expected = jax.jit(lambda parts, base: (jax.grad(loss)(parts, base), jax.grad(plain)(parts, base)))(
            parts, frozen)
        assert all(jnp.abs(each).max() > 0.1 for each in grads.values())
        jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-4), grads, expected)


def test_stacked_adapters_are_scanned_and_mapped():
    x, leaf = normal(5, 24), adapted(normal(3, 24, 8, seed=1))
    dense = dequantized(leaf)
    assert dense.shape == (3, 24, 8)
    each = jnp.stack([x @ dense[i] for i in range(3)])
    _, scanned = jax.jit(lambda x, leaf: jax.lax.scan(lambda _, layer: (None, dot(x, layer)), None, leaf))(x, leaf)
    np.testing.assert_allclose(scanned, each, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(ops.dot, (None, 0))(x, leaf), each, rtol=1e-4, atol=1e-4)
    sizes, rows = jnp.array([2, 0, 3]), [0, 0, 2, 2, 2]
    ragged = jnp.stack([x[i] @ dense[expert] for i, expert in enumerate(rows)])
    np.testing.assert_allclose(ops.ragged_dot(x, leaf, sizes), ragged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base_of", [lambda t: t, lambda t: quantize(t, bits=4, group=8, axis=-1)])
def test_adapted_tables_give_rows_and_logits(base_of):
    table, ids, x = adapted(base_of(normal(11, 20))), jnp.array([[3, 0], [10, 3]]), normal(2, 5, 20, seed=2)
    dense = np.asarray(dequantized(table))
    np.testing.assert_allclose(ops.take(table, ids), dense[np.asarray(ids)], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ops.take(table, jnp.int32(3)), dense[3], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ops.dot_t(x, table), np.asarray(x) @ dense.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("product", ["dot", "dot_t", "ragged"])
def test_taps_of_gradients_measure_what_comes_back(product):
    """The gradients themselves are the reading; and the product and its gradients are as without a tap."""
    x, sizes = normal(6, 4), jnp.asarray([2, 4]) if product == "ragged" else None
    w = normal(*{"dot": (4, 5), "dot_t": (5, 4), "ragged": (2, 4, 5)}[product], seed=1)

    def apply(x, w):
        return ops.ragged_dot(x, w, sizes) if product == "ragged" else getattr(ops, product)(x, w)

    def measure(g_MxO, weight_M, sizes_E):
        assert (sizes_E is None) == (product != "ragged")
        return g_MxO

    def loss(x, reading):
        return jnp.sum(jnp.sin(apply(x, w if reading is None else Observer(w, reading, None, measure, gradient=True))))

    @jax.jit
    def both(x):
        return jax.grad(loss, (0, 1))(x, jnp.zeros((6, 5))), jnp.cos(apply(x, w)), jax.grad(loss)(x, None)

    (through, reading), back, plain = both(x)
    np.testing.assert_allclose(reading, back, rtol=1e-6)
    np.testing.assert_allclose(through, plain, rtol=1e-6)


def static_leaf(w):
    return dataclasses.replace(quantize(w, bits=8, act_bits=8), act_scale=jnp.full((1, 1), 3 / 127))


SPLIT = {
    "int8": lambda w: quantize(w, bits=8, act_bits=8),
    "int8, asymmetric": lambda w: quantize(w, bits=8, symmetric=False, act_bits=8),
    "int8, static": static_leaf,
    "float8": lambda w: quantize_float8(w, act_bits=8),
    "weights only": lambda w: quantize(w, bits=8, symmetric=False),
    "groups": lambda w: quantize(w, bits=4, group=8, symmetric=False),
    "nf4": nf4_leaf,
    "int8 under an adapter": lambda w: LoRA(
        quantize(w, bits=8, act_bits=8), normal(64, 2, seed=3), normal(2, 24, seed=4), jnp.ones((1, 1))),
    "low rank": lambda w: LowRank(quantize(w[:, :16], bits=8, act_bits=8), normal(16, 24, seed=3)),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_devices_sum_scaled_results_in_the_dtype_of_the_input(kind):
    """Not the int32 or float32 in which a product accumulates, which would be twice the bytes."""
    x, leaf = normal(6, 64, dtype=jnp.bfloat16), SPLIT[kind](normal(64, 24, seed=1))
    mesh = make_mesh(data=1, tensor=4, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(leaf, shardings(nnx.Param(leaf, axes=("mlp", "embed")), mesh).get_value())
        x_split = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "tensor")))
        program = jax.jit(partial(ops.dot, parts=4), out_shardings=jax.NamedSharding(mesh, jax.P()))
        program = program.lower(x_split, placed).compile()
        got = np.asarray(program(x_split, placed), np.float32)
    found = collectives(program.as_text())
    small = Collective("all-reduce", "f32", 6, False)  # the largest magnitude of each row
    sums = [each for each in found if each != small and each.elements > 12]
    assert sum(each.elements for each in sums) <= (2 if "adapter" in kind else 1) * 6 * 24
    assert {(each.kind, each.dtype) for each in sums} == {("all-reduce", "bf16")}, found
    want = np.asarray(dot(x, leaf), np.float32)
    np.testing.assert_allclose(got, want, atol=4 * 2**-8 * np.abs(want).max())
