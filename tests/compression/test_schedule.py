"""Straight-through gradients, values bit by bit those of the recipe, and the schedules against their closed forms."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.compression.names import parse
from jaxlm.compression.quantize.rtn import Quantize, quantize
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.schedule import (
    cosine,
    cubic,
    fake_compress,
    fake_leaf,
    pruned_counts,
    pruning_of,
    regrow,
    smallest_of_each,
)
from jaxlm.core import ops
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import FakeQuant, QArray, dequantize, is_leaf
from jaxlm.core.tree import flatten

KERNEL, HEAD = "decoder/layers/0/mlp/up/kernel", "head/kernel"
RECIPES = ["w4a16-rtn-g24", "w8a8-dynamic", "2:4-magnitude", "sparse50-magnitude+w4a8-dynamic"]
RECIPES += [
    pytest.param(name, marks=pytest.mark.slow)
    for name in (
        "w8a16-rtn-channel-sym", "w3a16-rtn-g24-sym", "w2a16-rtn", "w4a8-dynamic", "sparse50-magnitude",
        "2:4-magnitude+w4a16-rtn-g24",
    )
]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tree(**changes):
    leaves = {KERNEL: normal(2, 64, 24), HEAD: normal(24, 50, seed=1)} | changes
    return nnx.from_flat_state((tuple(path.split("/")), nnx.Param(leaf)) for path, leaf in leaves.items())


def product(params, x):
    return ops.dot(x, jax.tree.map(lambda part: part[1], flatten(params)[KERNEL]))


@pytest.mark.parametrize("name", RECIPES)
def test_values_are_those_of_the_recipe_and_gradients_those_of_a_dense_weight(name):
    """What is trained with is what the recipe ships: the weights bit by bit, the product to rounding."""
    recipe, params, x = parse(name), tree(), normal(5, 64, seed=2)
    at = jax.jit(lambda params, now: fake_compress(recipe, begin=3)(now)(params))
    fake, real = at(params, 3), jax.jit(recipe.apply)(params)
    np.testing.assert_array_equal(dequantize(flatten(fake)[KERNEL]), dequantize(flatten(real)[KERNEL]))
    np.testing.assert_allclose(product(fake, x), product(real, x), rtol=1e-5, atol=2e-5)
    for now, params_now in ((2, at(params, 2)), (3, fake)):
        np.testing.assert_array_equal(flatten(params_now)[HEAD], flatten(params)[HEAD])
        rows = x if now == 2 else _rounded(flatten(real)[KERNEL], x)

        def objective(kernel, x, now=now):
            return jnp.sum(product(fake_compress(recipe, begin=3)(now)(tree(**{KERNEL: kernel})), x) ** 2) / 2

        y = product(params_now, x)
        for_kernel, for_x = jax.grad(objective, (0, 1))(flatten(params)[KERNEL], x)
        np.testing.assert_allclose(for_kernel[1], rows.T @ y, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(for_x, y @ dequantize(flatten(params_now)[KERNEL])[1].T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(product(at(params, 2), x), product(params, x))


def _rounded(leaf, x):
    if not (isinstance(leaf, QArray) and leaf.act_bits):
        return x
    codes, scale = ops.quantize_tokens(x)
    return codes * scale


def test_no_gradient_where_a_grid_clips():
    w = jnp.array([[-2.0, -0.6, 0.1, 0.8, 3.0]]).T
    leaf = quantize(w, bits=4)
    narrow = dataclasses.replace(leaf, scale=jnp.full_like(leaf.scale, 0.125))  # reaches from -1 to 0.875
    narrow = dataclasses.replace(narrow, codes=jnp.clip(jnp.round(w.T / 0.125), -8, 7).astype(jnp.int8))
    for compressed, passes in ((leaf, [1, 1, 1, 1, 1]), (narrow, [0, 1, 1, 1, 0])):
        gradient = jax.grad(lambda w, compressed=compressed: fake_leaf(w, compressed).dense.sum())(w)
        np.testing.assert_array_equal(gradient[:, 0], passes)


@pytest.mark.parametrize("codes", [jnp.int8, jnp.float8_e4m3fn])
def test_no_gradient_for_activations_that_a_static_scale_clips(codes):
    w, x = normal(4, 3), jnp.array([[-9.0, 0.3, 0.9, 2.0]])
    leaf = quantize(w, bits=8, act_bits=8)
    leaf = dataclasses.replace(leaf, codes=leaf.codes.astype(codes), act_scale=jnp.full((1, 1), 1.0))
    limit = 127 if codes == jnp.int8 else 448
    leaf = dataclasses.replace(leaf, act_scale=leaf.act_scale / limit)  # reaches from -1 to 1
    fake = FakeQuant(dequantize(leaf), leaf, jnp.ones((1, 1), bool))
    np.testing.assert_allclose(ops.dot(x, fake), ops.dot(x, leaf), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: ops.dot(x, fake).sum())(x)
    np.testing.assert_allclose(gradient[0], [0, *dequantize(leaf)[1:3].sum(-1), 0], rtol=1e-5)


def test_every_product_knows_the_leaf():
    recipe = Recipe((Quantize(8, symmetric=True, act_bits=8, target=".*"),))
    table, experts, x = normal(10, 16), normal(3, 16, 6, seed=1), normal(4, 16, seed=2)
    leaves = {"table": table, "experts/kernel": experts}
    leaves = {f"embed/{path}" if path == "table" else path: leaf for path, leaf in leaves.items()}
    params = nnx.from_flat_state((tuple(path.split("/")), nnx.Param(leaf)) for path, leaf in leaves.items())
    fake, real = flatten(fake_compress(recipe)(jnp.int32(0))(params)), flatten(recipe.apply(params))
    close = dict(rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(ops.dot_t(x, fake["embed/table"]), ops.dot_t(x, real["embed/table"]), **close)
    np.testing.assert_array_equal(
        ops.take(fake["embed/table"], jnp.arange(3)), ops.take(real["embed/table"], jnp.arange(3)))
    sizes = jnp.array([1, 0, 3])
    np.testing.assert_allclose(
        ops.ragged_dot(x, fake["experts/kernel"], sizes), ops.ragged_dot(x, real["experts/kernel"], sizes), **close)


def test_compressing_what_was_pruned_is_compressing_what_was_not():
    recipe, params = parse("2:4-magnitude+w3a16-rtn-g24"), tree()
    before = recipe.apply(params)
    after = recipe.apply(pruning_of(recipe).apply(params))
    assert not any(is_leaf(leaf) for leaf in flatten(pruning_of(recipe).apply(params)).values())
    np.testing.assert_array_equal(dequantize(flatten(before)[KERNEL]), dequantize(flatten(after)[KERNEL]))


def test_a_step_that_needs_calibration_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Solved:
        kind = "gptq"

    with pytest.raises(UserError, match="'mine': a gptq step"):
        fake_compress(Recipe((Solved(),), name="mine"))


@pytest.mark.parametrize(("begin", "end"), [(0, 10), (5, 80)])
def test_schedules(begin, end):
    for t in range(end + 10):
        done = min(max((t - begin) / (end - begin), 0), 1)
        # Zhu and Gupta's equation with an initial sparsity of 0: s_f + (0 - s_f) (1 - (t - t0) / (n dt))^3
        assert float(cubic(t, begin, end)) == pytest.approx(1 + (0 - 1) * (1 - done) ** 3, abs=1e-6)
        assert float(cosine(t, begin, end)) == pytest.approx((1 + math.cos(math.pi * done)) / 2, abs=1e-6)
    assert float(cubic(end, begin, end)) == 1.0


def test_smallest_takes_a_traced_count():
    w = normal(2, 9, 7).at[0, :4].set(0.5)
    pick = jax.jit(lambda count: smallest_of_each(jnp.abs(w), count))
    for count in (0, 1, 20, 62, 63):
        mask = np.asarray(pick(count))
        assert list(mask.sum((1, 2))) == [count, count]
        for size, out in zip(np.abs(w), mask, strict=True):
            assert size[out].max(initial=0) <= size[~out].min(initial=9)


def test_erdos_renyi():
    shapes = {"wide": (3, 64, 256), "square": (3, 64, 64), "thin": (1, 64, 4)}
    sizes = {path: shape[-2] * shape[-1] for path, shape in shapes.items()}
    counts = pruned_counts(shapes, 0.8, "erdos_renyi")
    density = {path: 1 - counts[path] / sizes[path] for path in shapes}
    assert counts["thin"] == 0  # it would be more than full
    ratio = (64 + 64) / 64**2 / ((64 + 256) / (64 * 256))
    assert density["square"] / density["wide"] == pytest.approx(ratio, rel=1e-2)
    pruned = sum(shapes[path][0] * counts[path] for path in shapes)
    assert pruned == pytest.approx(0.8 * sum(shape[0] * sizes[path] for path, shape in shapes.items()), abs=6)
    assert pruned_counts(shapes, 0.8, "uniform") == {path: round(0.8 * size) for path, size in sizes.items()}


def naive_regrow(weight, gradient, mask, count):
    """Algorithm 1 of the paper with sorts, one matrix."""
    weight, gradient, mask = (np.asarray(x).ravel() for x in (weight, gradient, mask))
    active = np.flatnonzero(mask)
    kept = set(active) - set(active[np.argsort(np.abs(weight[active]), kind="stable")[:count]])
    outside = np.array([i for i in range(mask.size) if i not in kept])
    grown = outside[np.argsort(-np.abs(gradient[outside]))[:count]]
    new = np.zeros(mask.size, bool)
    new[[*kept, *grown]] = True
    return new


@pytest.mark.parametrize("count", [0, 1, 7, 18])
def test_regrow_against_sorts(count):
    mask = ~smallest_of_each(jnp.abs(normal(2, 9, 10, seed=3)), 72)
    weight, gradient = jnp.where(mask, normal(2, 9, 10), 0), normal(2, 9, 10, seed=1)
    new = jax.jit(regrow)(weight, gradient, mask, jnp.int32(count))
    for layer in range(2):
        expected = naive_regrow(weight[layer], gradient[layer], mask[layer], count)
        np.testing.assert_array_equal(np.asarray(new[layer]).ravel(), expected)


def test_regrow_keeps_the_number_where_gradients_are_zero():
    mask = ~smallest_of_each(jnp.abs(normal(1, 9, 10, seed=3)), 72)
    new = regrow(jnp.where(mask, 1.0, 0.0), jnp.zeros((1, 9, 10)), mask, jnp.int32(5))
    assert new.sum() == 18
