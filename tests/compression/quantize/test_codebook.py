import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression.quantize.codebook import E2M1, kmeans, mxfp4, nf4, nf4_table, round_to_table
from jaxlm.core.leaves import Codebook, dequantize


def naive_lloyd(values, counts, table, iterations, pinned):
    """By all distances, in float64."""
    for _ in range(iterations):
        nearest = np.abs(values[:, None] - table).argmin(1)
        for k in set(nearest) - {pinned}:
            if counts[nearest == k].sum() > 0:
                table[k] = np.average(values[nearest == k], weights=counts[nearest == k])
    return table


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("initial", ["linear", "quantile"])
def test_kmeans_is_lloyds_algorithm(initial, weighted, zeros):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2, 20, 30)).astype(np.float32)
    w[1] *= 10
    w[rng.random(w.shape) < 0.4 * zeros] = 0
    weights = rng.uniform(0, 2, (2, 20, 1)) if weighted else None
    codes, table = kmeans(jnp.asarray(w), 3, iterations=7, initial=initial, weights=weights)
    assert codes.dtype == jnp.uint8 and codes.shape == w.shape and table.shape == (2, 8)
    for i, matrix in enumerate(w.astype(np.float64)):
        values = matrix.ravel()
        counts = np.ones(600) if weights is None else np.repeat(weights[i, :, 0], 30)
        start = np.linspace(values.min(), values.max(), 8)
        if initial == "quantile":
            inner, k = (values[values != 0], 7) if zeros else (values, 8)
            start = np.sort([*np.quantile(inner, (np.arange(k) + 0.5) / k), *[0.0] * zeros])
        pinned = np.abs(start).argmin() if zeros else None
        if zeros:
            start[pinned] = 0
        want = naive_lloyd(values, counts, start, 7, pinned)
        np.testing.assert_allclose(table[i], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(codes[i], np.abs(matrix[..., None] - np.asarray(table[i])).argmin(-1))


def test_exact_zeros_stay_and_dense_weights_use_every_entry():
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(40, 50)) + 3).astype(np.float32)  # zero is far from the others
    sparse = np.where(rng.random(w.shape) < 0.5, 0, w)
    for bits in (1, 2, 8):
        codes, table = kmeans(jnp.asarray(sparse), bits)
        assert not np.asarray(table[codes])[sparse == 0].any()
        assert (np.diff(table) >= 0).all()
    codes, table = kmeans(jnp.asarray(w), 2)
    assert (table > 0).all() and set(np.unique(codes)) == {0, 1, 2, 3}


def test_few_values_are_kept_exactly():
    for values in ([0.0], [0.5], [-1.0, 0.0, 2.0], [1e-9, 3e4]):
        w = np.random.default_rng(0).choice(np.array(values, np.float32), (6, 7))
        codes, table = kmeans(jnp.asarray(w), 4)
        np.testing.assert_array_equal(table[codes], w)


def test_more_iterations_and_importance_lessen_the_error():
    rng = np.random.default_rng(0)
    w = rng.standard_t(4, (64, 64)).astype(np.float32)
    errors = []
    for iterations in (0, 1, 5, 300):
        codes, table = kmeans(jnp.asarray(w), 4, iterations=iterations)
        errors.append(np.square(np.asarray(table[codes]) - w).sum())
    assert errors[0] > errors[1] > errors[2] > errors[3]
    weights = np.where(np.arange(64) < 8, 100.0, 0.01)[:, None]
    w *= np.where(np.arange(64) < 8, 1.0, 7.0)[:, None]
    found = (kmeans(jnp.asarray(w), 3, weights=each) for each in (None, weights))
    plain, important = (np.sum(weights * np.square(np.asarray(table[codes]) - w)) for codes, table in found)
    assert important < 0.5 * plain


def test_nf4_has_the_published_values():
    want = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
    np.testing.assert_allclose(nf4_table(), want, atol=1e-6)


def test_rounding_takes_the_nearest_entry_in_any_order():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 9, 11)).astype(np.float32)
    table = rng.normal(size=(3, 16)).astype(np.float32)
    table[2] = 0.25  # equal entries
    codes = round_to_table(jnp.asarray(w), jnp.asarray(table))
    for i in range(3):
        np.testing.assert_array_equal(codes[i], np.abs(w[i, ..., None] - table[i]).argmin(-1))


def test_e2m1_rounds_halfway_to_even_and_saturates():
    w = jnp.array([0.0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -0.75, -5.0, -9.0, 0.26, 0.1])
    want = [0, 0, 0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -4, -6, 0.5, 0]
    codes = round_to_table(w, jnp.asarray(E2M1))
    np.testing.assert_array_equal(E2M1[np.asarray(codes)], want)
    assert int(codes[-1]) == 0  # never minus zero


@pytest.mark.parametrize("n_in", [pytest.param(64, marks=pytest.mark.slow), 70, 20])
def test_block_formats_against_float64(n_in):
    w = np.random.default_rng(0).normal(size=(2, 5, n_in)).astype(np.float32)
    w[0, 0] = 0
    w[1, 1] *= 1e-20
    for kind, quantize, table, group in (("nf4", nf4, nf4_table(), 64), ("mxfp4", mxfp4, E2M1, 32)):
        codes, scale = quantize(jnp.asarray(w))
        tables = jnp.tile(jnp.asarray(table), (2, 1))
        leaf = Codebook(codes, tables, scale, bits=4, group=group, kind=kind)
        got = np.asarray(dequantize(leaf), np.float64).swapaxes(-1, -2)
        for start in range(0, n_in, group):
            part = w[..., start : start + group].astype(np.float64)
            largest = np.abs(part).max(-1, keepdims=True)
            largest[largest == 0] = 1 if kind == "nf4" else 4
            step = largest if kind == "nf4" else 2.0 ** (np.floor(np.log2(largest)) - 2)
            np.testing.assert_allclose(scale[..., start // group : start // group + 1], step, rtol=1e-6)
            best = np.abs(part[..., None] / step[..., None] - table.astype(np.float64)).min(-1)
            np.testing.assert_allclose(np.abs(got[..., start : start + group] - part), best * step, atol=2e-7)
        assert (jnp.log2(scale) % 1 == 0).all() or kind == "nf4"


def test_the_gradient_of_a_table_is_the_sum_over_its_members():
    """Deep Compression, equation 3: what fine-tuning the shared values needs."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)
    codes, table = kmeans(w, 2)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6)), jnp.float32)
    got = jax.grad(lambda table: jnp.vdot(dequantize(Codebook(codes, table, None, bits=2)), g))(table)
    want = [np.asarray(g.T)[np.asarray(codes) == k].sum() for k in range(4)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
