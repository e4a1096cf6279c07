import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression.prune.scores import magnitude, n_of_m
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core.leaves import dequantize


@pytest.mark.parametrize("sparsity", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_magnitude_drops_the_smallest_of_each_matrix(sparsity, dtype):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40, 30)) * [[[1]], [[10]], [[0.1]]], dtype)
    pruned = magnitude(w, sparsity=sparsity)
    assert pruned.dtype == dtype
    for before, after in zip(np.asarray(w, np.float64), np.asarray(pruned, np.float64), strict=True):
        kept = after != 0
        assert np.count_nonzero(~kept) == math.ceil(round(sparsity * before.size, 6))
        np.testing.assert_array_equal(after[kept], before[kept])
        assert np.abs(before[~kept]).max(initial=0) <= np.abs(before[kept]).min()


def test_magnitude_among_equals_and_zeros():
    assert np.count_nonzero(magnitude(jnp.ones((10, 10)), sparsity=0.37)) == 63
    w = jnp.ones((10, 10)).at[:5].set(0)
    np.testing.assert_array_equal(magnitude(w, sparsity=0.5), w)
    assert not magnitude(jnp.zeros((4, 4)), sparsity=0.5).any()


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("n_in", [32, 30])
@pytest.mark.parametrize("axis", [-2, -1])
def test_n_of_m_keeps_the_largest_of_each_group(n, m, n_in, axis):
    w = np.random.default_rng(0).normal(size=(2, n_in, 6)).astype(np.float32)
    w[0, :m] = 0.5  # equals
    w = np.moveaxis(w, -2, axis)
    pruned = np.asarray(n_of_m(jnp.asarray(w), n=n, m=m, axis=axis))
    before, after = np.moveaxis(w, axis, -1), np.moveaxis(pruned, axis, -1)
    for start in range(0, n_in, m):
        size = np.abs(before[..., start : start + m])
        kept = after[..., start : start + m] != 0
        assert np.all(kept.sum(-1) == min(n, size.shape[-1]))
        assert np.all(np.where(kept, size, np.inf).min(-1) >= np.where(kept, 0, size).max(-1))
    np.testing.assert_array_equal(pruned[pruned != 0], w[pruned != 0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("prune", [lambda w: magnitude(w, sparsity=0.6), lambda w: n_of_m(w, n=2, m=4)])
def test_pruned_weights_stay_zero_when_quantized(prune, symmetric):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 16)) + 0.2, jnp.float32)
    both = jax.jit(lambda w: dequantize(quantize(prune(w), bits=4, group=24, symmetric=symmetric)))(w)
    assert not np.asarray(both)[np.asarray(prune(w)) == 0].any()
