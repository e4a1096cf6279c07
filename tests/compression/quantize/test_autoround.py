"""Learned rounding: its arithmetic and gradients against float64 NumPy, what it finds, and what it must leave alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression.calibration import CalibratedLayer
from jaxlm.compression.names import parse
from jaxlm.compression.quantize.autoround import AutoRound, Kernel, RoundingParams
from jaxlm.compression.quantize.rtn import group_range, quantize
from jaxlm.compression.recipe import Recipe
from jaxlm.core import ops
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray, coded_values, dequantize
from jaxlm.core.tree import flatten
from tests.compression.calibrated import error, make, run
from tests.compression.models import some

NAME = "mlp/down/kernel"


@dataclass(frozen=True)
class Linear:
    """A walk whose only layer is a product. Tokens are 1, or 0 where there is padding."""

    def run_layer(self, params, place, layer, batch, state):
        return ops.dot(state[0], layer[NAME]), None

    def row_weights(self, place, name, batch):
        return (batch[0] > 0).reshape(-1).astype(jnp.float32)


@dataclass(frozen=True)
class Here:
    prefix: str = ""


jax.tree_util.register_static(Here)


def block_of(w, inputs, tokens=None, seed=0):
    tokens = [jnp.ones(x.shape[:2], int) for x in inputs] if tokens is None else tokens
    states = [(jnp.asarray(x, jnp.float32), None) for x in inputs]
    layer = {NAME: jnp.asarray(w, jnp.float32)}
    block = CalibratedLayer(Linear(), {}, Here(), layer, (NAME,), [(each,) for each in tokens], states, seed=seed)
    return dataclasses.replace(block, dense_outputs=block.outputs(layer))


def problem(n_in=12, n_out=3, seed=0, lengths=(8, 5)):
    """A weight ``[in, out]`` and correlated inputs in batches of several shapes."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(n_in // 2, n_in))
    inputs = [rng.normal(size=(4, n, len(mix))) @ mix + 0.3 * rng.normal(size=(4, n, n_in)) for n in lengths]
    return rng.normal(size=(n_in, n_out)), inputs


def loss(w, leaf, inputs):
    x = np.concatenate([each.reshape(-1, each.shape[-1]) for each in inputs])
    return np.mean((x @ (w - np.asarray(dequantize(leaf), np.float64))) ** 2)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_and_its_gradients_against_numpy(symmetric):
    bits, group, rng = 3, 5, np.random.default_rng(0)
    w, c = rng.normal(size=(2, 4, 12)), rng.normal(size=(2, 4, 12))
    w[0, 0, :7] = 0  # a group of zeros, and zeros in a group
    v, below, above = rng.uniform(-0.5, 0.5, w.shape), *rng.uniform(0.5, 1, (2, 2, 4, 3))
    step = AutoRound(bits, group, symmetric)
    low, high = group_range(jnp.asarray(w, jnp.float32), group, symmetric)
    kernel = Kernel(jnp.asarray(w, jnp.float32), low, high, jnp.ones(()))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(learned):
        leaf = step.rounded(kernel, learned)
        return jnp.sum(coded_values(leaf) * c), leaf

    got, leaf = gradient(RoundingParams(*[jnp.asarray(x, jnp.float32) for x in (v, below, above)]))
    got, leaf = jax.tree.map(np.asarray, (got, leaf))
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for index in np.ndindex(2, 4, 3):
        e, o, g = index
        part = (e, o, slice(g * group, (g + 1) * group))
        small, large = min(w[part].min(), 0), max(w[part].max(), 0)
        if symmetric:
            small, large = -max(-small, large), max(-small, large)
        span = large * above[index] - small * below[index]
        s = span / (2**bits - 1) if span else 1.0
        z = 0 if symmetric else np.rint(-small * below[index] / s) + least
        codes = np.rint(w[part] / s + np.where(w[part] == 0, 0, v[part])) + z
        inside = (codes >= least) & (codes <= most)
        codes = np.clip(codes, least, most)
        np.testing.assert_array_equal(leaf.codes[part], codes)
        np.testing.assert_allclose(leaf.scale[index], s, rtol=1e-6)
        np.testing.assert_allclose(got.offset_OxI[part], np.where(inside & (w[part] != 0), c[part] * s, 0), rtol=1e-5)
        # value = (clip(w / s + v + z) - z) * s with z = -small / s: rounding counts as the identity
        by_s = np.where(inside, codes - z - w[part] / s, codes - z - (0 if symmetric else small * below[index] / s))
        by_s = np.sum(c[part] * by_s) / (2**bits - 1) * (span > 0)
        by_low = 0 if symmetric else np.sum(c[part] * ~inside)
        np.testing.assert_allclose(got.above_OxG[index], by_s * large, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.below_OxG[index], (by_low - by_s) * small, rtol=1e-4, atol=1e-5)


def test_it_comes_nearer_to_the_best_of_all_roundings_than_to_the_nearest():
    """Of the 2**12 ways to round each output's weights up or down, on the grid of rounding to nearest."""
    w, inputs = problem()
    leaf = AutoRound(2, 0, iterations=200, tokens=40).solve(block_of(w, inputs))[NAME]
    nearest = quantize(jnp.asarray(w, jnp.float32), bits=2, symmetric=False)
    x = np.concatenate([each.reshape(-1, 12) for each in inputs])
    best = 0
    for o in range(3):
        scale, zero = float(nearest.scale[o, 0]), int(nearest.zero[o, 0])
        down = np.floor(w[:, o] / scale)
        ways = down + np.array(list(itertools.product((0, 1), repeat=12)))
        ways = np.clip(ways, -2 - zero, 1 - zero) * scale
        best += np.min(np.mean((x @ (w[:, o : o + 1] - ways.T)) ** 2, 0)) / 3
    assert best < loss(w, leaf, inputs) < (best + loss(w, nearest, inputs)) / 2


@pytest.mark.parametrize("group,symmetric", [(5, False), (5, True), pytest.param(0, False, marks=pytest.mark.slow)])
def test_leaves_are_as_everywhere_and_a_ragged_group_learns(group, symmetric):
    w, inputs = problem(seed=1)
    leaf = AutoRound(3, group, symmetric, iterations=60, tokens=40).solve(block_of(w, inputs))[NAME]
    like = quantize(jnp.asarray(w, jnp.float32), bits=3, group=group, symmetric=symmetric)
    assert jax.tree.structure(leaf) == jax.tree.structure(like)
    for mine, theirs in zip(jax.tree.leaves(leaf), jax.tree.leaves(like), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    assert leaf.codes.min() >= -4 and leaf.codes.max() <= 3 and (leaf.scale > 0).all()
    assert (leaf.scale <= like.scale * (1 + 1e-6)).all() and (leaf.scale >= like.scale * (0.5 - 1e-6)).all()
    assert loss(w, leaf, inputs) < 0.9 * loss(w, like, inputs)


def test_it_never_ends_worse_than_it_began():
    w, inputs = problem(seed=2)
    nearest = quantize(jnp.asarray(w, jnp.float32), bits=2, symmetric=False)
    for seed in range(2):  # one iteration goes as far as offsets may: much too far
        leaf = AutoRound(2, 0, iterations=1, tokens=8).solve(block_of(w, inputs, seed=seed))[NAME]
        assert loss(w, leaf, inputs) <= loss(w, nearest, inputs) * (1 + 1e-6)
    exact = dequantize(nearest)  # no error, and so nothing to learn
    leaf = AutoRound(2, 0, iterations=20).solve(block_of(exact, inputs))[NAME]
    np.testing.assert_array_equal(dequantize(leaf), dequantize(quantize(exact, bits=2, symmetric=False)))


def test_padding_counts_for_nothing():
    w, inputs = problem(seed=3)
    tokens = [np.random.default_rng(5).integers(0, 2, x.shape[:2]) for x in inputs]
    loud = [np.where(t[..., None] == 0, 1e3 * x[:, ::-1], x) for t, x in zip(tokens, inputs, strict=True)]
    step = AutoRound(2, 4, iterations=30, tokens=40)
    quiet, noisy = (step.solve(block_of(w, x, [jnp.asarray(t) for t in tokens]))[NAME] for x in (inputs, loud))
    jax.tree.map(np.testing.assert_array_equal, quiet, noisy)


LEARN = AutoRound(2, 16, iterations=40, tokens=32)


@pytest.mark.parametrize("name", some("decoder", slow="moe seq2seq"))
def test_models_are_nearer_than_rounded_to_nearest(name):
    learned = run(name, Recipe((LEARN,)))
    assert error(name, learned.params) < 0.4 * error(name, run(name, "w2a16-rtn-g16").params)
    assert not learned.notes
    if name == "moe":
        leaf = flatten(learned.params)["decoder/layers/0/mlp/experts/up/kernel"]
        assert isinstance(leaf, QArray) and leaf.codes.shape == (2, 4, 32, 32) and leaf.scale.shape == (2, 4, 40, 2)


def test_the_seed_decides():
    config, _, params, calibration = make("decoder")
    recipe = Recipe((LEARN,))
    first, second = run("decoder", recipe), recipe.run(config, params, calibration)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    changed = recipe.run(config, params, dataclasses.replace(calibration, seed=7))
    path = "decoder/layers/0/attn/q/kernel"
    assert not jnp.array_equal(flatten(first.params)[path].codes, flatten(changed.params)[path].codes)


def test_zeros_stay_zeros():
    pruned, both = run("decoder", "2:4-wanda"), run("decoder", Recipe((*parse("2:4-wanda").steps, LEARN)))
    for path, leaf in flatten(both.params).items():
        if isinstance(leaf, QArray):
            zero = np.asarray(flatten(pruned.params)[path]) == 0
            assert zero.mean() >= 0.5 and not np.asarray(dequantize(leaf))[zero].any()


def test_experts_that_saw_too_little_are_rounded_to_nearest():
    config, _, params, calibration = make("moe")
    few = dataclasses.replace(calibration, batches=[(calibration.batches[0][0][:1, :6],)])
    step = dataclasses.replace(LEARN, iterations=2, target=r".*/mlp/experts/down/kernel")
    done = Recipe((step,)).run(config, params, few)
    assert any("experts saw too few tokens" in note and "rounded to 2 bits without data" in note for note in done.notes)
    path = "decoder/layers/0/mlp/experts/down/kernel"
    rounded = flatten(parse("w2a16-rtn-g16").apply(params))[path]
    same = jax.tree.map(lambda a, b: (a == b).all(axis=(-1, -2)), flatten(done.params)[path], rounded)
    assert same.codes[0].any() and (same.codes == same.scale).all()


def test_mistakes():
    with pytest.raises(UserError, match="0 iterations of 2048 tokens learn nothing"):
        AutoRound(2, iterations=0)
    with pytest.raises(UserError, match="9 bits"):
        AutoRound(9)
