import itertools

import jax
import numpy as np
import pytest

from jaxlm.compression.prune.admm import search_mask
from jaxlm.compression.prune.sparsegpt import sparsegpt
from jaxlm.compression.quantize.rtn import IntegerGrid
from tests.compression import naive


def best(w, h, kept):
    """The least loss of one row whose other weights are 0."""
    drop = ~kept
    inverse = np.linalg.inv(h)
    return w[drop] @ np.linalg.solve(inverse[np.ix_(drop, drop)], w[drop])


@pytest.mark.parametrize("sparsity", [0.6, (2, 5)])
def test_it_is_near_the_best_of_all_masks(sparsity):
    # one row each, ten inputs: all masks can be tried
    problems = [naive.problem(1, 10, seed) for seed in range(20)]
    w, h = (np.stack(x) for x in zip(*problems, strict=True))
    kept = np.asarray(jax.vmap(lambda w, h: search_mask(w, h, sparsity, 30))(w, h))[:, 0]
    pattern = isinstance(sparsity, tuple)
    assert np.all(kept.reshape(20, -1, 5 if pattern else 10).sum(-1) == (2 if pattern else 4))
    masks = np.array(list(itertools.product([False, True], repeat=10)))
    masks = masks[np.all(masks.reshape(len(masks), -1, 5).sum(-1) == 2, -1) if pattern else masks.sum(-1) == 4]
    found, least, greedy = [], [], []
    for i, (w, h) in enumerate(problems):
        w64, h64 = naive.prepared(w, h)
        found.append(best(w64[0], h64, kept[i]))
        least.append(min(best(w64[0], h64, mask) for mask in masks))
        mask = naive.sparsegpt(w64, h64, *((None, sparsity) if pattern else (sparsity,)))[1]
        greedy.append(best(w64[0], h64, mask[0]))
    assert np.mean(found) < 1.25 * np.mean(least) and np.mean(found) < 0.9 * np.mean(greedy)


@pytest.mark.parametrize(
    "sparsity,grid",
    [
        ((2, 4), IntegerGrid(4)),
        pytest.param(0.8, None, marks=pytest.mark.slow),
        pytest.param(0.8, IntegerGrid(4), marks=pytest.mark.slow),
        pytest.param((2, 4), None, marks=pytest.mark.slow),
    ],
)
def test_a_solver_with_search_beats_one_without(sparsity, grid):
    w, h = naive.problem(24, 72)
    h[5], h[:, 5] = 0, 0
    w64, h64 = naive.prepared(w, h)
    losses = []
    for search in (0, 30):
        solution = sparsegpt(w, h, grid=grid, sparsity=sparsity, search=search, sweeps=5, block=32)
        q = solution.weights_OxI if grid is None else grid.values(solution.codes_OxI, solution.params)
        kept = np.asarray(solution.kept_OxI)
        assert not np.asarray(q)[~kept].any() and round((~kept).mean(), 2) == (0.5 if sparsity == (2, 4) else 0.8)
        losses.append(naive.loss(w64, np.asarray(q), h64))
        np.testing.assert_allclose(losses[-1], solution.info.loss, rtol=1e-3)
    assert losses[1] < 0.9 * losses[0]


def test_a_hopeless_hessian_leaves_the_inputs_sizes():
    w = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    kept = search_mask(w, -np.ones((16, 16), np.float32), 0.5, 5)
    np.testing.assert_array_equal(kept, np.abs(w) > np.median(np.abs(w)))
