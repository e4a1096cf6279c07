import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression.prune.scores import magnitude, n_of_m, wanda
from jaxlm.compression.prune.sparsegpt import sparsegpt
from jaxlm.compression.quantize.gptq import gptq
from jaxlm.compression.quantize.rtn import IntegerGrid
from tests.compression import naive


@pytest.mark.parametrize(
    "sparsity,pattern",
    [(0.5, None), (None, (2, 4)), (None, (3, 8)), pytest.param(0.8, None, marks=pytest.mark.slow)],
)
def test_sparsegpt_against_optimal_brain_surgeon_in_float64(sparsity, pattern):
    w, h = naive.problem(24, 70)
    h[5], h[:, 5] = 0, 0
    solution = sparsegpt(w, h, sparsity=pattern or sparsity, block=32)
    pruned, kept, info = solution.weights_OxI, solution.kept_OxI, solution.info
    w64, h64 = naive.prepared(w, h)
    expected, mask = naive.sparsegpt(w64, h64, sparsity, pattern, block=32)
    np.testing.assert_array_equal(kept, mask)
    np.testing.assert_allclose(pruned, expected, atol=2e-3)
    assert not np.asarray(pruned)[~mask].any()
    np.testing.assert_allclose(info.loss, naive.loss(w64, expected, h64), rtol=1e-3)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "sparsity,group",
    [(0.5, 32), ((2, 4), 0), pytest.param(0.5, 0, marks=SLOW), pytest.param((2, 4), 32, marks=SLOW)],
)
def test_joint_quantization(sparsity, group):
    w, h = naive.problem(24, 72)
    solution = sparsegpt(w, h, grid=IntegerGrid(4), group=group, sparsity=sparsity, block=32)
    w64, h64 = naive.prepared(w, h)
    grids = [naive.grid(w64[:, i : i + (group or 72)], 4, False) for i in range(0, 72, group or 72)]

    def fix(column, i):
        scale, zero = grids[i // (group or 72)]
        return (np.clip(np.rint(column / scale) + zero, -8, 7) - zero) * scale

    one, pattern = (None, sparsity) if isinstance(sparsity, tuple) else (sparsity, None)
    expected, mask = naive.sparsegpt(w64, h64, one, pattern, 32, fix)
    q = np.asarray(IntegerGrid(4).values(solution.codes_OxI, solution.params, group))
    same = np.isclose(q, expected, atol=1e-4)
    assert np.mean(solution.kept_OxI == mask) > 0.99 and same.mean() > 0.97  # what lies halfway may go either way
    assert not q[~np.asarray(solution.kept_OxI)].any()
    np.testing.assert_allclose(naive.loss(w64, q, h64), naive.loss(w64, expected, h64), rtol=0.05)


def test_it_beats_wanda_beats_magnitude():
    w, h = naive.problem(48, 96)
    norms = np.sqrt(np.diag(h))
    by_size = np.asarray(magnitude(jnp.asarray(w.T), sparsity=58 / 96)).T
    losses = [naive.loss(w, np.asarray(q), h) for q in (by_size, wanda(w, norms, sparsity=58 / 96))]
    losses.append(naive.loss(w, np.asarray(sparsegpt(w, h, sparsity=58 / 96).weights_OxI), h))
    assert losses[2] < 0.6 * losses[1] < 0.6 * losses[0]


@pytest.mark.parametrize("prune", ["magnitude", "wanda", "2:4"])
def test_masks_of_other_methods_survive_and_are_made_up_for(prune):
    w, h = naive.problem(24, 64)
    pruned = {
        "magnitude": lambda: magnitude(jnp.asarray(w.T), sparsity=0.5).T,
        "wanda": lambda: wanda(w, np.sqrt(np.diag(h)), sparsity=0.5),
        "2:4": lambda: n_of_m(jnp.asarray(w), n=2, m=4, axis=-1),
    }[prune]()
    kept = np.asarray(pruned) != 0
    solution = gptq(w, h, kept)
    assert not np.asarray(solution.weights_OxI)[~kept].any()
    assert naive.loss(w, np.asarray(solution.weights_OxI), h) < 0.9 * naive.loss(w, np.asarray(pruned), h)


@pytest.mark.parametrize("n,m", [(0, 0), (2, 4), (1, 3)])
def test_wanda_against_a_sort(n, m):
    rng = np.random.default_rng(0)
    w, norms = rng.normal(size=(2, 6, 40)).astype(np.float32), rng.uniform(0.1, 2, (2, 40)).astype(np.float32)
    pruned = np.asarray(wanda(w, norms, **({"n": n, "m": m} if m else {"sparsity": 0.3})))
    score = np.abs(w) * norms[:, None]
    for start in range(0, 40, m or 40):
        part = np.s_[..., start : start + (m or 40)]
        kept = min(n, score[part].shape[-1]) if m else 28
        ranks = np.argsort(np.argsort(-score[part], -1), -1)
        np.testing.assert_array_equal(pruned[part], np.where(ranks < kept, w[part], 0))


def test_sweeps_end_at_least_squares_over_the_kept_weights():
    w, h = naive.problem(12, 40)
    first, swept = (sparsegpt(w, h, sparsity=0.6, block=32, sweeps=sweeps) for sweeps in (0, 200))
    np.testing.assert_array_equal(first.kept_OxI, swept.kept_OxI)
    w64, h64 = naive.prepared(w, h)
    best = np.zeros_like(w64)
    for o, keep in enumerate(np.asarray(first.kept_OxI)):
        best[o, keep] = np.linalg.solve(h64[np.ix_(keep, keep)], h64[keep] @ w64[o])
    np.testing.assert_allclose(swept.info.loss, naive.loss(w64, best, h64), rtol=1e-3)
    np.testing.assert_allclose(swept.weights_OxI, best, atol=0.02)
    assert swept.info.loss < 0.97 * first.info.loss
