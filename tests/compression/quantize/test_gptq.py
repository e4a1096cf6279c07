import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.compression.prune.sparsegpt import sparsegpt
from jaxlm.compression.quantize.gptq import gptq
from jaxlm.compression.quantize.rtn import IntegerGrid, fit_grid, round_to_grid
from jaxlm.core.errors import UserError
from tests.compression import naive


def gptq_integers(w, h, kept=None, *, bits, symmetric=False, **options):
    """Codes, scale, zero and the solver's info."""
    found = gptq(w, h, kept, grid=IntegerGrid(bits, symmetric), **options)
    return found.codes_OxI, *found.params, found.info


def dense(codes, scale, zero, group):
    return np.asarray(IntegerGrid(8).values(codes, (scale, zero), group), np.float64)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "bits,group,symmetric,act_order,static,masked",
    [
        (4, 32, False, True, True, True),  # 72 inputs: the last group is shorter
        (3, 32, True, False, False, False),
        (2, 24, False, False, False, True),
        (4, 0, True, False, False, False),
        pytest.param(2, 0, False, True, True, False, marks=SLOW),
        pytest.param(4, 32, False, True, True, False, marks=SLOW),
        pytest.param(3, 32, True, False, False, True, marks=SLOW),
        pytest.param(2, 24, False, False, False, False, marks=SLOW),
        pytest.param(2, 0, False, True, True, True, marks=SLOW),
        pytest.param(4, 0, True, False, False, True, marks=SLOW),
    ],
)
def test_gptq_against_optimal_brain_surgeon_in_float64(bits, group, symmetric, act_order, static, masked):
    w, h = naive.problem(24, 72, seed=bits)
    w[3], h[5], h[:, 5], h[40], h[:, 40] = 0, 0, 0, 0, 0  # an output of nothing, and two dead inputs
    kept = np.random.default_rng(1).random(w.shape) < 0.5 if masked else None
    codes, scale, zero, info = gptq_integers(
        w, h, kept, bits=bits, group=group, symmetric=symmetric, act_order=act_order, static_groups=static, block=32
    )
    w64, h64 = naive.prepared(w, h)
    expected, scales, zeros, margin = naive.gptq(w64, h64, bits, group, symmetric, act_order, static, kept)
    assert codes.dtype == jnp.int8 and scale.shape == scales.shape and (zero is None) == symmetric
    # A row agrees as long as no weight lies within float32's reach of halfway between two grid points.
    order = np.argsort(-np.diag(h64), kind="stable") if act_order else np.arange(72)
    sure = np.logical_and.accumulate(margin[:, order] > 1e-3, 1)[:, np.argsort(order)]
    differs = np.asarray(codes) != expected
    assert not differs[sure].any() and sure.mean() > 0.5 and differs.mean() < 0.1
    whole = ~differs.any(1)
    assert whole.sum() >= 16
    np.testing.assert_allclose(np.asarray(scale)[whole], scales[whole], rtol=1e-4)
    if not symmetric:
        np.testing.assert_array_equal(np.asarray(zero)[whole], zeros[whole])
    q = dense(codes, scale, zero, group)
    assert not q[:, [5, 40]].any() and not q[3].any()
    if masked:
        assert not q[~kept].any()
    np.testing.assert_allclose(info.loss, naive.loss(w64, q, h64), rtol=1e-3)
    assert info.retries == 0 and not info.failed


def test_it_beats_rounding():
    w, h = naive.problem(16, 48)
    scale, zero = fit_grid(jnp.asarray(w), 3, 16, False)
    rounded = naive.loss(w, dense(round_to_grid(w, scale, zero, 3, 16), scale, zero, 16), h)
    assert gptq_integers(w, h, bits=3, group=16)[3].loss < 0.7 * rounded


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_for_clips_finds_the_best_of_all_shrinks(symmetric):
    rng = np.random.default_rng(0)
    w, weight = rng.standard_t(4, (2, 5, 40)).astype(np.float32), rng.uniform(0.1, 3, (2, 40)).astype(np.float32)
    scale, zero = fit_grid(jnp.asarray(w), 3, 16, symmetric, jnp.asarray(weight), 0.4)

    def cost(scale, zero):
        q = dense(round_to_grid(w, scale, zero, 3, 16), scale, zero, 16)
        each = np.pad(weight[:, None] * (w - q) ** 2, ((0, 0), (0, 0), (0, 8)))
        return each.reshape(2, 5, 3, 16).sum(-1)

    # shrinking a group's span is shrinking its values: the grid of by * w, for every factor
    tried = [cost(*fit_grid(jnp.asarray(by * w), 3, 16, symmetric)) for by in np.linspace(1, 0.4, 61)]
    np.testing.assert_allclose(cost(scale, zero), np.min(tried, 0), rtol=0.02)
    assert np.mean(cost(scale, zero)) < 0.95 * np.mean(tried[0])


def test_without_correlations_it_is_rounding_to_nearest():
    w, _ = naive.problem(16, 48)
    codes, scale, zero, _ = gptq_integers(w, np.diag(np.linspace(1, 2, 48, dtype=np.float32)), bits=3, group=16)
    expected = fit_grid(jnp.asarray(w), 3, 16, False)
    np.testing.assert_allclose(scale, expected[0], rtol=1e-6)
    np.testing.assert_array_equal(codes, round_to_grid(w, *expected, 3, 16))


def test_the_scale_of_the_hessian_does_not_matter():
    w, h = naive.problem(16, 48)
    h[7], h[:, 7] = 0, 0
    one, other = (gptq_integers(w, h * by, bits=3, group=16)[0] for by in (1, 2.0**12))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("least_eigenvalue,retries", [(-0.05, 1), (-0.5, 2), (-5, 3)])
def test_a_hessian_that_is_not_positive_definite_gets_ten_times_the_damping(least_eigenvalue, retries):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(32, 32)))
    values = np.r_[least_eigenvalue, rng.uniform(0.5, 1.5, 31)]
    h = (basis * (values / values.mean()) @ basis.T).astype(np.float32)
    w = rng.normal(size=(8, 32)).astype(np.float32)
    codes, scale, zero, info = gptq_integers(w, h, bits=4, group=16)
    assert info.retries == retries and not info.failed and jnp.isfinite(info.loss)
    np.testing.assert_allclose(info.damping, 0.01 * 10**retries, rtol=1e-5)
    again = gptq_integers(w, h, bits=4, group=16, damping=0.01 * 10**retries)
    np.testing.assert_array_equal(codes, again[0])


@pytest.mark.parametrize("broken", ["negative", "nan", "zero"])
def test_a_hopeless_hessian_means_rounding_to_nearest(broken):
    w, _ = naive.problem(8, 32)
    h = {"negative": -np.ones((32, 32)), "nan": np.full((32, 32), np.nan), "zero": np.zeros((32, 32))}[broken]
    codes, scale, zero, info = gptq_integers(w, h.astype(np.float32), bits=4, group=16)
    assert info.failed == (broken == "negative") and jnp.isfinite(info.loss)
    expected = fit_grid(jnp.asarray(w), 4, 16, False)
    if broken == "zero":  # every input is dead
        assert not dense(codes, scale, zero, 16).any()
    else:
        np.testing.assert_array_equal(codes, round_to_grid(w, *expected, 4, 16))


def test_stacks_are_solved_at_once_each_with_its_own_hessian():
    problems = [naive.problem(8, 32, seed) for seed in range(3)]
    problems[1][1][:] = problems[1][1] - 2 * np.eye(32)  # needs more damping than the others
    w, h = (np.stack(x) for x in zip(*problems, strict=True))
    stacked = gptq_integers(w, h, bits=4, group=16)
    assert stacked[3].retries.shape == (3,) and stacked[3].retries[1] > 0 == stacked[3].retries[0]
    for i in range(3):
        alone = gptq_integers(w[i], h[i], bits=4, group=16)
        for one, together in zip(jax.tree.leaves(alone), jax.tree.leaves(stacked), strict=True):
            np.testing.assert_allclose(one, together[i], rtol=1e-4)


@pytest.mark.parametrize(
    "solve,options", [(gptq, {"grid": IntegerGrid(4), "group": 16}), (sparsegpt, {"sparsity": 0.5})]
)
def test_rows_may_be_sharded(solve, options):
    w, h = naive.problem(32, 48)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(w, NamedSharding(mesh, PartitionSpec("rows")))
    whole, parts = solve(w, h, block=16, **options), solve(sharded, h, block=16, **options)
    result = parts.weights_OxI if parts.codes_OxI is None else parts.codes_OxI
    assert result.sharding.spec[0] == "rows"
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """A grid that is no integers: the nearest of a table's values, scaled to the largest."""

    table: jax.Array

    def fit(self, w_OxI, group, weight_I=None):
        return fit_grid(w_OxI, 2, group, True)[0]

    def codes(self, w_OxI, params, group=0):
        assert not group
        return jnp.argmin(jnp.abs(w_OxI[..., None] / params[..., None] - self.table), -1).astype(jnp.uint8)

    def values(self, codes_OxI, params, group=0):
        return self.table[codes_OxI] * params


def test_any_grid_will_do():
    w, h = naive.problem(16, 48)
    table = jnp.array([-1.5, -0.6, -0.2, 0, 0.3, 0.9, 1.6])
    solution = gptq(w, h, grid=Table(table), group=16)
    assert solution.codes_OxI.dtype == jnp.uint8 and solution.codes_OxI.max() == 6
    scale = np.repeat(np.asarray(solution.params), 16, 1)
    q = np.asarray(table)[solution.codes_OxI] * scale
    nearest = np.abs(w[..., None] - np.asarray(table) * scale[..., None]).argmin(-1)
    assert naive.loss(w, q, h) < 0.7 * naive.loss(w, np.asarray(table)[nearest] * scale, h)


@pytest.mark.parametrize(
    "solve,options,says",
    [
        (gptq, {"grid": IntegerGrid(4), "group": 8, "static_groups": False}, "act-order"),
        (gptq, {}, "mask"),
        (sparsegpt, {"sparsity": (2, 4), "act_order": True}, "N:M"),
        (sparsegpt, {"sparsity": (4, 4)}, "4, 4"),
        (sparsegpt, {"sparsity": 1.0}, "1.0"),
    ],
)
def test_mistakes(solve, options, says):
    with pytest.raises(UserError, match=says):
        solve(np.ones((4, 16), np.float32), np.eye(16, dtype=np.float32), **options)


@pytest.mark.parametrize(
    "options", [{"act_order": True}, pytest.param({"act_order": False, "static_groups": False}, marks=SLOW)]
)
def test_sweeps_end_where_no_code_can_be_better(options):
    w, h = naive.problem(12, 40)
    kept = np.random.default_rng(1).random(w.shape) < 0.7
    losses = []
    for sweeps in (0, 1, 30):
        codes, scale, zero, info = gptq_integers(w, h, kept, bits=3, group=16, sweeps=sweeps, block=32, **options)
        w64, h64 = naive.prepared(w, h)
        q = dense(codes, scale, zero, 16)
        np.testing.assert_allclose(info.loss, naive.loss(w64, q, h64), rtol=1e-3)
        losses.append(float(info.loss))
        assert not q[~kept].any()
    assert losses[2] <= losses[1] < 0.95 * losses[0]
    step = np.repeat(scale, 16, 1)[:, :40]
    slope = 2 * (q - w64) @ h64
    for way, possible in ((1, np.asarray(codes) < 3), (-1, np.asarray(codes) > -4)):
        change = way * step * slope + step**2 * np.diag(h64)  # of the loss, by one step of one code
        assert np.all(change[possible & kept] > -1e-3 * losses[2] / w.size)
