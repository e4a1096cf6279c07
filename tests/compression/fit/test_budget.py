"""Budgets: the best choice against all choices, sizes as stored, and recipes that make the same again."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.checkpoint.storage import leaf_bytes
from jaxlm.compression.calibration import Calibration
from jaxlm.compression.fit.budget import Budget, LossTarget
from jaxlm.compression.fit.fisher import layer_statistics, loss_increase
from jaxlm.compression.fit.frontier import pareto_frontier
from jaxlm.compression.fit.kernel_solver import KernelChoice, Solver
from jaxlm.compression.fit.mixed_precision import MixedPrecision
from jaxlm.compression.fit.search import BudgetSearch
from jaxlm.compression.fit.sensitivity import measure_sensitivity
from jaxlm.compression.prune.sparsegpt import sparsegpt
from jaxlm.compression.quantize.gptq import gptq
from jaxlm.compression.quantize.rtn import IntegerGrid
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.steps import LAYER_KERNELS
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray, dequantize
from jaxlm.core.tree import flatten, unflatten
from jaxlm.nn.layerwise import LayerwiseModel
from tests.models import build

DECODER = nn.DecoderConfig(vocab_size=13, width=16, heads=2, kv_heads=1, ffn=16, layers=2)
CONFIGS = {
    "decoder": DECODER,
    "moe": dataclasses.replace(DECODER, experts=2, layers=1),
    "seq2seq": nn.preset("tiny", vocab_size=13, width=16, heads=2, ffn=16, encoder_layers=1, decoder_layers=1),
}
KINDS = ["decoder", *(pytest.param(name, marks=pytest.mark.slow) for name in ("moe", "seq2seq"))]
SOLVER = Solver(clip=1.0, sweeps=0, search=2)
CANDIDATES = tuple({"bits": bits, "group": group} for bits, group in ((2, 8), (3, 8), (5, 8), (8, 0)))


@functools.cache
def make(name):
    config = CONFIGS[name]
    graphdef, params = build(config)
    rng = np.random.default_rng(1)
    batches = [(rng.integers(3, 13, (4, 8)),) for _ in range(2)]
    if config.kind == "seq2seq":
        batches = [(rng.integers(3, 13, (4, 5)), batch) for (batch,) in batches]
    return graphdef, params, Calibration(batches, lambda config: LayerwiseModel(config, nn.initializer(config)[0]))


@functools.cache
def fitting(name):
    _, params, calibration = make(name)
    sensitivity = measure_sensitivity(CONFIGS[name], params, calibration, leaf_bytes, SOLVER, CANDIDATES)
    return BudgetSearch(CONFIGS[name], params, calibration, sensitivity, leaf_bytes)


def is_kernel(path):
    return re.fullmatch(LAYER_KERNELS, path) and "router" not in path


def kernel_bytes(config, params, packed):
    return sum(size.nbytes for path, size in packed.sizes.items() if is_kernel(path))


def table(rng, things=4, options=4):
    sizes = [sorted(rng.integers(1, 40, options).tolist()) for _ in range(things)]
    losses = [sorted(rng.random(options).tolist(), reverse=True) for _ in range(things)]
    return sizes, losses


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_the_best_of_all_choices(seed):
    sizes, losses = table(np.random.default_rng(seed))
    found = pareto_frontier(sizes, losses)
    every = list(itertools.product(*map(range, map(len, sizes))))
    weights = [sum(size[pick] for size, pick in zip(sizes, picks, strict=True)) for picks in every]
    costs = [sum(loss[pick] for loss, pick in zip(losses, picks, strict=True)) for picks in every]
    for most in range(min(weights) - 1, max(weights) + 2):
        best = min((cost for cost, weight in zip(costs, weights, strict=True) if weight <= most), default=None)
        at = found.within(most)
        assert (at is None) == (best is None)
        if at is not None:
            assert found.loss[at] == pytest.approx(best) and found.size[at] <= most
            assert found.size[at] == sum(size[pick] for size, pick in zip(sizes, found.picks[at], strict=True))
            assert found.loss[at] == pytest.approx(
                sum(loss[pick] for loss, pick in zip(losses, found.picks[at], strict=True))
            )


def test_a_larger_budget_never_predicts_more_loss_and_few_points_do():
    sizes, losses = table(np.random.default_rng(0), 30, 8)
    exact, coarse = pareto_frontier(sizes, losses, 1 << 20), pareto_frontier(sizes, losses, 256)
    for found in (exact, coarse):
        assert (np.diff(found.size) > 0).all() and (np.diff(found.loss) < 0).all()
    assert len(coarse.size) <= 256 < len(exact.size) and coarse.size[0] == exact.size[0]
    for most in range(int(exact.size[0] / 0.95) + 1, int(exact.size[-1])):
        assert coarse.loss[coarse.within(most)] <= exact.loss[exact.within(0.95 * most)]


@pytest.mark.parametrize(
    "text,budget",
    [("3.2bits", Budget(bits=3.2)), ("4 bit", Budget(bits=4)), ("900MiB", Budget(bytes=900 << 20)),
     ("1.5 GB", Budget(bytes=1_500_000_000)), ("2000B", Budget(bytes=2000)), ("12kB", Budget(bytes=12_000)),
     ("70%zeros", Budget(zeros=0.7)), ("62.5 % zeros", Budget(zeros=0.625))],
)  # fmt: skip
def test_budgets_in_words(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    "text", ["", "3.2", "bits", "-3bits", "0bits", "0MB", "3iB", "3Mbit", "1e3B", "+1%", "100%zeros", "0%zeros"]
)
def test_mistakes_in_budgets(text):
    with pytest.raises(UserError, match="give bits a weight as 3.2bits"):
        Budget.parse(text)


def test_perplexities_in_words():
    assert LossTarget.parse("+1%").limit(2.0) == pytest.approx(2 + math.log(1.01))
    assert LossTarget.parse("46.5").limit(2.0) == pytest.approx(math.log(46.5))
    with pytest.raises(UserError, match="a perplexity of 5 is less than the 7.3891 of the dense model"):
        LossTarget.parse("5").limit(2.0)
    for text in ("1%", "+1", "-1%", "+0%", "0.5", "good"):
        with pytest.raises(UserError, match="give one as 46.5"):
            LossTarget.parse(text)


@pytest.mark.parametrize("name", KINDS)
def test_sensitivity_is_the_squared_gradient_of_each_output(name):
    """That there is one for every kernel; and of the last one, which the final norm alone follows, its expectation."""
    config, (_, params, calibration) = CONFIGS[name], make(name)
    statistics = layer_statistics(config, params, calibration, is_kernel)
    found = [each.fisher for each in statistics]
    places = list(calibration.layerwise(config).layer_positions())
    tokens = sum(batch[-1].size for batch in calibration.batches)
    assert len(found) == len(places)
    for place, layer in zip(places, found, strict=True):
        kernels = {path for path in flatten(params) if path.startswith(place.prefix) and is_kernel(path)}
        assert {place.prefix + each for each in layer} == kernels
        for each, g_O in layer.items():
            kernel = flatten(params)[place.prefix + each]
            assert g_O.shape == (*kernel.shape[1:-2], kernel.shape[-1]) and (g_O >= 0).all()
    if name == "decoder":
        walk, errors = calibration.layerwise(config), []

        @jax.jit
        def last(x_NxD):
            leave = lambda x_D: walk.logits(params, (x_D[None, None], None))[0, 0]  # noqa: E731
            return jax.vmap(jax.jacobian(leave))(x_NxD), jax.nn.softmax(jax.vmap(leave)(x_NxD))

        for batch in calibration.batches:
            state = walk.embed(params, batch)
            for place in places:
                layer = {
                    path.removeprefix(place.prefix): leaf[place.row]
                    for path, leaf in flatten(params).items() if path.startswith(place.prefix)
                }  # fmt: skip
                state = walk.run_layer(params, place, layer, batch, state)
            x_NxD = state[0].reshape(-1, 16)
            j_NxVxD, p_NxV = map(np.asarray, last(x_NxD))
            mean_NxD = np.einsum("nv,nvd->nd", p_NxV, j_NxVxD)
            errors.append(np.einsum("nv,nvd->d", p_NxV, (j_NxVxD - mean_NxD[:, None]) ** 2))
        np.testing.assert_allclose(found[-1]["mlp/down/kernel"].sum(), sum(errors).sum() / tokens, rtol=0.3)


def test_the_loss_of_an_error():
    rng = np.random.default_rng(0)
    error, x, g = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 7, 5)), rng.random((2, 3))
    want = sum(0.5 * (g[e] * ((x[e] @ error[e]) ** 2).mean(0)).sum() for e in range(2))
    gram = np.einsum("eni,enj->eij", x, x) / 7
    assert float(loss_increase(*map(jnp.float32, (error, gram, g)))) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_fits_and_its_recipe_makes_it_again(name):
    config, (_, params, calibration) = CONFIGS[name], make(name)
    best = fitting(name)
    weights = sum(best.sensitivity.weights.values())
    assert weights == sum(leaf.size for path, leaf in flatten(params).items() if is_kernel(path))
    least = int(best.frontier.size[0])
    limit = int(1.35 * least)
    done = best.within(Budget(bits=8 * limit / weights), kernel_bytes)
    size = kernel_bytes(done.model.config, done.model.params, done.packed)
    assert 0.97 * limit < size <= limit
    assert {row.kernel for row in done.kernels} == set(best.sensitivity.candidates)
    assert len({row.choice.bits for row in done.kernels}) > 1 and all(row.final >= 0 for row in done.kernels)
    recipe = Recipe.from_json(json.loads(json.dumps(done.recipe.to_json())))
    assert recipe == done.recipe
    again = recipe.run(config, params, calibration)
    assert again.config == done.model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, done.model.params)
    if name == "decoder":  # mixed in one model: as chosen, and it runs
        for row in done.kernels:
            number, kernel = row.kernel.removeprefix("decoder/").split("/", 1)
            layer_groups = done.model.config.layer_groups or (2,)
            starts = np.cumsum([0, *layer_groups])
            layer_group = int(np.searchsorted(starts, int(number), side="right")) - 1
            leaf = flatten(done.model.params)[f"decoder/layers/{layer_group}/{kernel}/kernel"]
            assert leaf.bits == row.choice.bits and leaf.group == row.choice.group
        graphdef = nn.initializer(done.model.config)[0]
        assert jnp.isfinite(nnx.merge(graphdef, done.model.params)(calibration.batches[0][0])).all()


@pytest.mark.parametrize("name", KINDS)
def test_zeros_go_where_they_cost_least(name):
    """And predict less loss than as many of them in every kernel alike."""
    config, (_, params, calibration) = CONFIGS[name], make(name)
    nonzero = lambda leaf: int(jnp.count_nonzero(leaf))  # noqa: E731
    candidates = [{"sparsity": share} for share in (0.5, 0.75)]
    sensitivity = measure_sensitivity(config, params, calibration, nonzero, SOLVER, candidates)
    best = BudgetSearch(config, params, calibration, sensitivity, nonzero)
    done = best.within(
        Budget(zeros=0.5),
        lambda config, params, _: sum(nonzero(leaf) for path, leaf in flatten(params).items() if is_kernel(path)),
    )
    kernels = {path: leaf for path, leaf in flatten(done.model.params).items() if is_kernel(path)}
    zeros = sum(int((leaf == 0).sum()) for leaf in kernels.values()) / sum(leaf.size for leaf in kernels.values())
    assert 0.5 <= zeros < 0.56
    assert len({row.choice and row.choice.sparsity for row in done.kernels}) > 1
    alike = sum(next(each.loss for each in options if each.choice and each.choice.sparsity == 0.5)
                for options in best.sensitivity.candidates.values())  # fmt: skip
    assert sum(row.predicted for row in done.kernels) < alike
    assert Recipe.from_json(json.loads(json.dumps(done.recipe.to_json()))) == done.recipe


def test_impossible_budgets_say_what_is_possible():
    best = fitting("decoder")
    weights = sum(best.sensitivity.weights.values())
    with pytest.raises(UserError) as error:
        best.within(Budget(bits=1), kernel_bytes)
    least = float(re.search(r"the least possible is (\S+) bits a weight", str(error.value))[1])
    done = best.within(Budget(bits=least * 1.001), kernel_bytes)
    assert 8 * kernel_bytes(done.model.config, done.model.params, done.packed) / weights <= least * 1.001


def test_the_smallest_model_that_keeps_a_loss():
    """A loss that rises three times as fast as predicted; judged in the layer groups of the dense model."""
    best, (graphdef, params, calibration) = fitting("decoder"), make("decoder")
    tried = []

    @jax.jit
    def divergence(now):
        logits = (nnx.merge(graphdef, each)(calibration.batches[0][0]) for each in (params, now))
        log_p, log_q = map(jax.nn.log_softmax, logits)
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    def loss(now):
        tried.append(2 + 3 * float(divergence(now)))
        return tried[-1]

    most = 2 + 3 * 2 * float(best.frontier.loss[len(best.frontier.loss) // 2])
    done = best.within_loss(LossTarget(perplexity=math.exp(most)), loss)
    assert len(tried) <= 9 and max(tried) > most, "smaller ones were tried"
    assert 0.7 * (most - 2) < loss(best.expand(done.model)) - 2 <= most - 2


def test_what_a_mixed_step_leaves_alone_and_what_it_refuses():
    _, params, calibration = make("decoder")
    choices = KernelChoice("decoder/0/mlp/up", 3), KernelChoice("decoder/1/mlp/up", 4, 8, sparsity=0.5)
    step = MixedPrecision(choices, 1.0, 0, 2)
    config, after = step(DECODER, params, calibration, [])
    flat = flatten(after)
    assert config.layer_groups == (1, 1)
    assert [path for path, leaf in flat.items() if isinstance(leaf, QArray)] == [
        "decoder/layers/0/mlp/up/kernel", "decoder/layers/1/mlp/up/kernel",
    ]  # fmt: skip
    assert float(jnp.mean(dequantize(flat["decoder/layers/1/mlp/up/kernel"]) == 0)) >= 0.5
    for strange in ("decoder/2/mlp/up", "decoder/1/mlp/upp", "encoder/0/mlp/up", "up"):
        with pytest.raises(UserError, match=f"a mixed step names {strange}, and the model has no such kernel"):
            MixedPrecision((KernelChoice(strange, 3),))(DECODER, params, calibration, [])


def test_zeros_of_a_sparse_model_stay():
    _, params, calibration = make("decoder")
    path = "decoder/layers/0/mlp/up/kernel"
    kernel = flatten(params)[path]
    sparse = unflatten(params, flatten(params) | {path: jnp.where(jnp.abs(kernel) < 0.2, 0, kernel)})
    names = [f"decoder/{layer}/mlp/up" for layer in range(2)]
    _, after = MixedPrecision(tuple(KernelChoice(name, 4) for name in names), 1.0, 1)(DECODER, sparse, calibration, [])
    zero = flatten(sparse)[path] == 0
    assert 0.3 < zero.mean() < 1 and not dequantize(flatten(after)[path])[zero].any()


def test_kernels_that_are_solved_for_together_are_those_solved_for_alone():
    rng = np.random.default_rng(0)
    kernels = {name: jnp.asarray(rng.normal(size=(16, width)), jnp.float32) for name, width in (("q", 12), ("k", 8))}
    kernels["k"] = jnp.where(jnp.abs(kernels["k"]) < 0.3, 0, kernels["k"])
    x_MxI = rng.normal(size=(64, 16)) @ rng.normal(size=(16, 16))
    h_IxI = jnp.asarray(x_MxI.T @ x_MxI / 64, jnp.float32)
    choices = {
        "q": [KernelChoice("q", 3), KernelChoice("q", 4, 8, sparsity=0.5)], "k": [KernelChoice("k", 2, 8)], "v": [],
    }
    solver = Solver(clip=0.8, sweeps=1, search=3)
    found = solver(kernels, h_IxI, choices)
    assert {name: len(some) for name, some in found.items()} == {"q": 2, "k": 1, "v": 0}
    for name, each in (("q", choices["q"][0]), ("q", choices["q"][1]), ("k", choices["k"][0])):
        w_OxI = kernels[name].T
        options = {"grid": IntegerGrid(each.bits, min_clip=0.8), "group": each.group, "sweeps": 1}
        if each.sparse:
            alone = sparsegpt(w_OxI, h_IxI, sparsity=0.5, search=3, act_order=True, **options)
        else:
            alone = gptq(w_OxI, h_IxI, w_OxI != 0, **options)
        leaf = found[name][choices[name].index(each)][0]
        np.testing.assert_array_equal(leaf.codes, alone.codes_OxI)
        np.testing.assert_allclose(leaf.scale, alone.params[0], rtol=1e-6)
        assert (leaf.bits, leaf.group) == (each.bits, each.group)


def test_no_kernel_is_solved_for_twice(monkeypatch):
    best, calls = fitting("decoder"), []
    first = best.run(len(best.frontier.size) // 2)
    solve = Solver.__call__
    monkeypatch.setattr(Solver, "__call__", lambda self, *args: calls.append(args) or solve(self, *args))
    again = best.run(len(best.frontier.size) // 2)
    assert not calls and again.kernels == first.kernels
    jax.tree.map(np.testing.assert_array_equal, again.model.params, first.model.params)
