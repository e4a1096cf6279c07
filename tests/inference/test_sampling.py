"""Filters against NumPy in float64, samples against their distribution, and rows against the same rows alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.inference.sampling import Sampling, filter_logits, greedy, sample, top_k

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("size", [3, 64, 65, 1000, 4097])
@pytest.mark.parametrize("k", [1, 2, 10])
def test_top_k_is_exact(size, k):
    x = RNG.normal(size=(7, size)).astype(np.float32)
    k = min(k, size)
    values, indices = jax.jit(top_k, static_argnums=1)(x, k)
    order = np.argsort(-x, axis=1)[:, :k]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=1))


def test_top_k_stays_within_the_row_where_all_is_excluded():
    x = np.full((2, 1000), -np.inf, np.float32)
    assert np.asarray(jax.jit(top_k, static_argnums=1)(x, 10)[1]).max() < 1000


def test_greedy_takes_the_first_of_equals():
    x = np.zeros((2, 300), np.float32)
    x[0, [77, 200, 290]] = 1.0
    np.testing.assert_array_equal(jax.jit(greedy)(x), [77, 0])


def kept_by_numpy(logits, temperature, k, p, min_p):
    """The tokens of one row that the filters keep, by sorting in float64."""
    scaled = logits.astype(np.float64) / temperature
    probability = np.exp(scaled - scaled.max())
    probability /= probability.sum()
    order = np.argsort(-probability)
    kept = order[: k or len(order)]
    mass = np.cumsum(probability[kept]) / probability[kept].sum()
    kept = kept[: int(np.searchsorted(mass, p)) + 1]
    return {i for i in kept if probability[i] >= min_p * probability.max()}


CASES = [
    (1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1), (1.5, 40, 0.6, 0.02),
    (2.0, 1, 0.5, 0.5), (0.3, 500, 0.95, 0.0), (1.0, 0, 0.01, 0.0),
]  # fmt: skip


def test_filters_keep_what_sorting_keeps_each_row_by_its_own_settings():
    logits = RNG.normal(scale=2.0, size=(len(CASES), 301)).astype(np.float32)
    t, k, p, m = (np.array(column) for column in zip(*CASES, strict=True))
    sampling = Sampling(*(x.astype(d) for x, d in ((t, "f4"), (k, "i4"), (p, "f4"), (m, "f4"))))
    left = np.asarray(jax.jit(filter_logits)(logits, sampling))
    for row, (case, result) in enumerate(zip(CASES, left, strict=True)):
        assert set(np.flatnonzero(result > -np.inf)) == kept_by_numpy(logits[row], *case)
        kept = result > -np.inf
        np.testing.assert_allclose(result[kept], logits[row][kept] / case[0], rtol=1e-6)


def test_draws_follow_the_filtered_distribution():
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0], np.float32)
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    settings = Sampling.for_batch(draws, temperature=0.8, top_k=3)
    tokens = np.asarray(jax.jit(sample)(np.broadcast_to(logits, (draws, 5)), keys, settings))
    wanted = np.exp(logits[:3] / 0.8) / np.exp(logits[:3] / 0.8).sum()
    seen = np.bincount(tokens, minlength=5) / draws
    assert (seen[3:] == 0).all()
    np.testing.assert_allclose(seen[:3], wanted, atol=4 * np.sqrt(0.25 / draws))


def test_a_row_is_its_own_business():
    logits = RNG.normal(size=(4, 50)).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), 4)
    temperatures, top_ks, top_ps = np.float32([0, 1, 2, 0]), np.int32([0, 3, 0, 7]), np.float32([1, 1, 0.9, 0.1])
    mixed = Sampling(temperatures, top_ks, top_ps, np.zeros(4, np.float32))
    draw = jax.jit(sample)
    together = np.asarray(draw(logits, keys, mixed))
    for row in range(4):
        alone = draw(logits[row : row + 1], keys[row : row + 1], jax.tree.map(lambda x, r=row: x[r : r + 1], mixed))
        assert together[row] == alone[0]
    np.testing.assert_array_equal(together[[0, 3]], logits.argmax(-1)[[0, 3]])


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": -2}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"min_p": 2}]
)
def test_meaningless_settings_are_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling.for_batch(1, **bad)
