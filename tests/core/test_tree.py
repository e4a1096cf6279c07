"""Paths, maps, rules and counts over parameter trees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core.errors import UserError
from jaxlm.core.tree import compose, count_bytes, count_params, flatten, map_params, rule, unflatten
from tests.models import build

CONFIG = nn.DecoderConfig(vocab_size=11, width=8, heads=2, ffn=16, layers=2)


@pytest.fixture(scope="module")
def params():
    return build(CONFIG)[1]


def test_unflatten_undoes_flatten(params):
    flat = flatten(params)
    assert "decoder/layers/0/attn/q/kernel" in flat
    back = unflatten(params, flat)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_unflatten_refuses_other_paths(params):
    flat = flatten(params)
    with pytest.raises(ValueError, match="embed/table"):
        unflatten(params, {path: leaf for path, leaf in flat.items() if path != "embed/table"})
    with pytest.raises(ValueError, match="stray"):
        unflatten(params, {**flat, "stray": jnp.zeros(1)})


def test_rule_touches_what_matches_and_nothing_else(params):
    doubled = flatten(rule(r".*/mlp/.*", lambda leaf: 2 * leaf)(params))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(doubled[path], 2 * leaf if "/mlp/" in path else leaf)


def test_a_rule_that_matches_nothing_is_an_error(params):
    with pytest.raises(UserError, match="no parameter matches 'attention'"):
        rule("attention", jnp.abs)(params)
    with pytest.raises(UserError):
        rule("embed", jnp.abs)(params)  # a prefix is not a match


def test_compose_goes_from_left_to_right_inside_jit(params):
    transform = compose(rule("embed/table", lambda x: x + 1), rule("embed/table", lambda x: 3 * x))
    got = flatten(jax.jit(transform)(params))["embed/table"]
    np.testing.assert_allclose(got, 3 * (flatten(params)["embed/table"] + 1), rtol=1e-6)


def test_counts_see_through_compression(params):
    dense = sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())
    small = rule(".*/mlp/.*", lambda leaf: quantize(leaf, bits=8, group=0, symmetric=True))(params)
    assert count_params(params) == count_params(small) == dense
    assert count_bytes(params) == 4 * dense
    weights, channels = 2 * 3 * 8 * 16, 2 * (16 + 16 + 8)
    assert count_bytes(small) == 4 * (dense - weights) + weights + 4 * channels
    assert count_bytes(jnp.zeros(10, jnp.int4)) == 5


def test_maps_keep_the_metadata(params):
    axes = [variable.get_metadata("axes") for _, variable in nnx.to_flat_state(params)]
    mapped = map_params(lambda _, leaf: leaf, params)
    assert axes == [variable.get_metadata("axes") for _, variable in nnx.to_flat_state(mapped)]
    assert ("layers", "embed", "heads") in axes
