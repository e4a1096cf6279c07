import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.core.leaves import LoRA, QArray, dequantize, dequantize_tree, is_leaf, merge_adapters
from jaxlm.core.tree import count_params, map_params


def make(*lead, n_in=10, n_out=6, group=0, zero=True, axis=-2, bits=4):
    rng = np.random.default_rng(0)
    groups = -(-n_in // group) if group else 1
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (*lead, n_out, n_in)).astype(np.int8)
    scale = rng.uniform(0.1, 1, (*lead, n_out, groups)).astype(np.float32)
    zeros = rng.integers(-8, 8, scale.shape).astype(np.int8) if zero else None
    return QArray(*jax.tree.map(jnp.asarray, (codes, scale, zeros)), bits, group, 0, axis)


def naive(leaf):
    """(codes - zero) * scale, entry by entry in float64."""
    codes, scale = np.asarray(leaf.codes, np.float64), np.asarray(leaf.scale, np.float64)
    zero = np.zeros_like(scale) if leaf.zero is None else np.asarray(leaf.zero, np.float64)
    dense = np.empty_like(codes)
    for *rest, i in np.ndindex(codes.shape):
        at = (*rest, i // leaf.group if leaf.group else 0)
        dense[(*rest, i)] = (codes[(*rest, i)] - zero[at]) * scale[at]
    return dense.swapaxes(-1, -2) if leaf.axis == -2 else dense


@pytest.mark.parametrize("group", [0, 1, 4, 5])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("axis", [-2, -1])
def test_dequantize_is_its_definition_for_ragged_groups_too(group, zero, axis):
    leaf = make(3, group=group, zero=zero, axis=axis)
    dense = dequantize(leaf)
    assert dense.shape == leaf.shape == ((3, 10, 6) if axis == -2 else (3, 6, 10))
    assert dense.dtype == leaf.dtype == jnp.float32 and dense.ndim == leaf.ndim
    np.testing.assert_allclose(dense, naive(leaf), rtol=1e-6)


def test_a_stack_is_sliced_by_scan_and_mapped_by_vmap():
    leaf = make(3, group=4)
    _, scanned = jax.lax.scan(lambda _, layer: (None, dequantize(layer)), None, leaf)
    np.testing.assert_array_equal(scanned, dequantize(leaf))
    np.testing.assert_array_equal(jax.vmap(dequantize)(leaf), dequantize(leaf))
    np.testing.assert_array_equal(jax.jit(dequantize)(leaf), dequantize(leaf))


def test_int4_codes_dequantize_alike():
    leaf = make(group=4)
    narrow = QArray(leaf.codes.astype(jnp.int4), leaf.scale, leaf.zero, 4, 4)
    np.testing.assert_array_equal(dequantize(narrow), dequantize(leaf))


def test_dequantize_tree_opens_only_compressed_leaves():
    leaf, dense = make(group=4), jnp.ones((2, 3), jnp.bfloat16)
    params = nnx.State({"a": {"kernel": nnx.Param(leaf, axes=("x", "y"))}, "b": nnx.Param(dense)})
    plain = dequantize_tree(params)
    assert not is_leaf(plain["a"]["kernel"].get_value())
    np.testing.assert_array_equal(plain["a"]["kernel"].get_value(), dequantize(leaf))
    assert plain["a"]["kernel"].get_metadata("axes") == ("x", "y")
    assert plain["b"].get_value().dtype == jnp.bfloat16
    assert count_params(params) == count_params(plain) == 66


def test_adapters_are_leaves_and_merging_leaves_quantized_ones_alone():
    rng = np.random.default_rng(1)
    base = make(3, group=4)
    a, b = jnp.asarray(rng.normal(size=(3, 10, 2)), jnp.float32), jnp.asarray(rng.normal(size=(3, 2, 6)), jnp.float32)
    leaf = LoRA(base, a, b, jnp.arange(3.0).reshape(3, 1, 1))
    params = nnx.State({
        "a": nnx.Param(leaf, axes=("layers", "x", "y")), "b": nnx.Param(base, axes=("layers", "x", "y")),
        "c": nnx.Param(jnp.ones(2)),
    })
    seen = []
    map_params(lambda path, value: seen.append((path, type(value))) or value, params)
    assert seen[:2] == [("a", LoRA), ("b", QArray)] and is_leaf(leaf)
    merged = merge_adapters(params)
    expected = naive(base) + np.arange(3.0).reshape(3, 1, 1) * (np.asarray(a, np.float64) @ np.asarray(b, np.float64))
    np.testing.assert_allclose(merged["a"].get_value(), expected, rtol=1e-5, atol=1e-5)
    assert merged["a"].get_metadata("axes") == ("layers", "x", "y")
    assert isinstance(merged["b"].get_value(), QArray)
    assert count_params(params) == count_params(merged) == 2 * 180 + 2
    assert not is_leaf(dequantize_tree(params)["a"].get_value())
    assert dequantize(leaf, jnp.bfloat16).dtype == jnp.bfloat16
