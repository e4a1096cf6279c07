import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core.leaves import dequantize


def naive(w_OxI, bits, group, symmetric):
    """Codes, scales, zeros and the dense result, row by row and group by group, in float64."""
    group = group or w_OxI.shape[1]
    codes, dense = np.zeros(w_OxI.shape, int), np.zeros(w_OxI.shape)
    scales = np.zeros((w_OxI.shape[0], -(-w_OxI.shape[1] // group)))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for o, row in enumerate(w_OxI):
        for g in range(scales.shape[1]):
            part = slice(g * group, (g + 1) * group)
            least, most = min(row[part].min(), 0), max(row[part].max(), 0)
            span = 2 * max(-least, most) if symmetric else most - least
            scale = span / (2**bits - 1) if span else 1.0
            zero = 0 if symmetric else np.rint(-least / scale) + low
            codes[o, part] = np.clip(np.rint(row[part] / scale) + zero, low, high)
            dense[o, part] = (codes[o, part] - zero) * scale
            scales[o, g] = scale
    return codes, scales, dense


@pytest.mark.parametrize("bits,group", [(2, 48), (3, 0), (4, 48), (5, 0), (6, 32), (7, 500), (8, 0), (8, 48)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_against_a_naive_float64_reference(bits, group, symmetric):
    w = np.random.default_rng(bits).normal(size=(2, 100, 7)).astype(np.float32) + (0 if symmetric else 0.3)
    leaf = quantize(jnp.asarray(w), bits=bits, group=group, symmetric=symmetric)
    step = np.repeat(np.asarray(leaf.scale), leaf.group or 100, -1)[..., :100].swapaxes(-1, -2)
    assert np.all(np.abs(np.asarray(dequantize(leaf)) - w) <= step * (0.5 + 1e-4))
    assert (leaf.bits, leaf.group) == (bits, 0 if group == 500 else group) and (leaf.zero is None) == symmetric
    for layer in range(2):
        codes, scales, dense = naive(w[layer].T.astype(np.float64), bits, group, symmetric)
        np.testing.assert_allclose(leaf.scale[layer], scales, rtol=1e-6)
        # float32 may round what lies halfway (as the extremes of a symmetric grid do) the other way
        differs = np.asarray(leaf.codes[layer]) != codes
        place = np.abs(w[layer] / step[layer]).T % 1
        assert np.all(np.abs(place[differs] - 0.5) < 1e-4)
        agree = np.where(differs, 0, np.asarray(dequantize(leaf)[layer]).T)
        np.testing.assert_allclose(agree, np.where(differs, 0, dense), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_outermost_values_of_a_symmetric_grid_have_its_outermost_codes(bits):
    w = np.random.default_rng(bits).normal(size=(64, 500)).astype(np.float32)
    w[0] = np.where(np.arange(500) % 2, 1, -1) * np.abs(w).max(0)
    codes = np.asarray(quantize(jnp.asarray(w), bits=bits).codes)
    assert (codes[:, 0] == np.where(w[0] > 0, 2 ** (bits - 1) - 1, -(2 ** (bits - 1)))).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_are_exact(bits, symmetric):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 16)) + rng.choice([-3, 0, 3], (1, 16))  # columns on one side of zero too
    w[rng.random(w.shape) < 0.5] = 0
    w[:, 3] = 0  # an output channel of nothing but zeros
    dense = np.asarray(dequantize(quantize(jnp.asarray(w, jnp.float32), bits=bits, group=24, symmetric=symmetric)))
    assert not dense[w == 0].any()


@pytest.mark.parametrize("constant", [-2.5, 0.75])
def test_constant_rows_are_exact_with_a_zero_point(constant):
    leaf = quantize(jnp.full((30, 4), constant), bits=3, group=8, symmetric=False)
    np.testing.assert_allclose(dequantize(leaf), constant, rtol=1e-6)


def test_extremes_stay_finite():
    w = jnp.array([[1e-38, 1e38], [-1e-38, -1e38], [0.0, 1.0]])
    for symmetric in (True, False):
        assert jnp.isfinite(dequantize(quantize(w, bits=4, symmetric=symmetric))).all()


def test_axis_is_the_contraction():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(20, 12)), jnp.float32)
    kernel, table = quantize(w, bits=4, group=8), quantize(w.T, bits=4, group=8, axis=-1)
    np.testing.assert_array_equal(kernel.codes, table.codes)
    np.testing.assert_array_equal(dequantize(kernel), dequantize(table).T)


def test_it_is_a_pure_transform():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40, 12)), jnp.bfloat16)
    eager = quantize(w, bits=4, group=16, symmetric=False)
    jitted = jax.jit(lambda w: quantize(w, bits=4, group=16, symmetric=False))(w)
    mapped = jax.vmap(lambda w: quantize(w, bits=4, group=16, symmetric=False))(w)
    for other in (jitted, mapped):
        np.testing.assert_array_equal(other.codes, eager.codes)
        np.testing.assert_allclose(other.scale, eager.scale, rtol=1e-6)
