"""Folding changes nothing; what is built on it makes rounding better."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression.calibration import layer_params
from jaxlm.compression.layer_groups import join
from jaxlm.compression.names import parse
from jaxlm.compression.observers import BINS, histogram
from jaxlm.compression.quantize.activations import SmoothQuant, StaticActivations, clip_limit
from jaxlm.compression.quantize.awq import Awq, best_scale
from jaxlm.compression.quantize.fold import ScaleMapping, fold_scale, scale_mappings
from jaxlm.compression.quantize.rtn import Quantize
from jaxlm.compression.recipe import Recipe
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray, dequantize, is_leaf
from jaxlm.core.tree import flatten
from tests.compression.calibrated import CONFIGS, error, make, run
from tests.compression.models import some

FOLDS = {"decoder": 4, "moe": 4, "relu": 4, "seq2seq": 4}  # in the first layer


@pytest.mark.parametrize("name", CONFIGS)
def test_folding_any_scale_changes_nothing(name):
    config, _, params, calibration = make(name)
    rng, layers, counts = np.random.default_rng(0), [], []
    for place in calibration.layerwise(config).layer_positions():
        layer = layer_params(params, place)
        found = scale_mappings(config, place.side, layer)
        counts.append(len(found))
        for each in found:
            kernel = layer[each.kernels[0]]
            experts = kernel.shape[:-2] if not each.from_norm else ()
            scale = jnp.asarray(rng.uniform(0.2, 5, (*experts, kernel.shape[-2])), jnp.float32)
            layer = fold_scale(layer, each, each.share_within_heads(scale))
        layers.append((place, layer))
    assert counts[0] == FOLDS[name] and (name != "seq2seq" or counts[-1] == 6)
    _, after = join(config, params, layers)
    assert error(name, after) < 1e-9
    changed = [path for path, leaf in flatten(after).items() if not jnp.array_equal(leaf, flatten(params)[path])]
    assert len(changed) >= 8


def test_what_cannot_be_folded_is_not():
    config, _, params, calibration = make("decoder")
    layer = layer_params(params, next(iter(calibration.layerwise(config).layer_positions())))

    def producers(**changes):
        found = scale_mappings(dataclasses.replace(config, **changes), "decoder", layer)
        return [each.producer for each in found]

    assert producers() == ["attn_norm", "attn/v", "mlp_norm", "mlp/up"]
    assert producers(norm_position="post") == producers(norm_position="output") == ["attn/v", "mlp/up"]
    assert producers(activation="gelu") == ["attn_norm", "attn/v", "mlp_norm"]
    assert producers(clip_qkv=1.0) == ["attn_norm", "mlp_norm", "mlp/up"]
    shared = scale_mappings(dataclasses.replace(config, parallel=True, shared_norm=True), "decoder", layer)[0]
    readers = ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up")
    assert shared.producer == "attn_norm" and shared.kernels == tuple(f"{name}/kernel" for name in readers)


@pytest.mark.parametrize("name", some("decoder", slow="relu moe seq2seq"))
def test_awq_is_better_than_rounding(name):
    rounded = parse("w3a16-rtn-g16").apply(make(name)[2])
    assert error(name, run(name, "w3a16-awq-g16").params) < 0.95 * error(name, rounded)


def test_the_best_scale_is_the_best_of_those_tried():
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(6, 32)), rng.normal(size=(200, 32)) * np.exp(rng.normal(size=32))
    h, size = x.T @ x / 200, np.abs(x).mean(0)
    what = ScaleMapping(("mlp/down/kernel",), "mlp/up")
    found = np.asarray(best_scale([jnp.asarray(w, jnp.float32)], jnp.asarray(h, jnp.float32),
                                  jnp.asarray(size, jnp.float32), what, bits=3, group=16, symmetric=False), np.float64)

    def loss(scale):
        groups = (w * scale).reshape(6, 2, 16)
        low, high = np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0)
        step = (high - low) / 7
        zero = np.rint(-low / step)
        codes = np.clip(np.rint(groups / step) + zero, 0, 7)
        difference = ((codes - zero) * step).reshape(6, 32) / scale - w
        return np.trace(difference @ h @ difference.T)

    tried = [size**power / np.sqrt((size**power).max() * (size**power).min()) for power in np.arange(20) / 20]
    assert loss(found) == pytest.approx(min(map(loss, tried)), rel=1e-3) and loss(found) < loss(np.ones(32))


def test_channels_that_query_heads_share_get_one_scale():
    what = ScaleMapping(("attn/o/kernel",), "attn/v", (2, 3, 4))
    tied = what.share_within_heads(jnp.arange(24.0)).reshape(2, 3, 4)
    np.testing.assert_array_equal(tied, np.broadcast_to(tied[:, :1], (2, 3, 4)))
    np.testing.assert_array_equal(tied[:, 0], np.arange(24).reshape(2, 3, 4).max(1))


def test_zeros_survive_awq():
    pruned, both = run("decoder", "2:4-wanda"), run("decoder", "2:4-wanda+w4a16-awq-g16")
    for path, leaf in flatten(both.params).items():
        if is_leaf(leaf):
            assert not np.asarray(dequantize(leaf))[np.asarray(flatten(pruned.params)[path]) == 0].any()


@pytest.mark.parametrize("name", some("decoder", "moe", slow="relu seq2seq"))
def test_smoothing_changes_nothing_and_helps_rounding(name):
    config, graphdef, params, calibration = make(name)
    smooth = run(name, Recipe((SmoothQuant(0.5),)))
    assert error(name, smooth.params) < 1e-9
    norms = [path for path in flatten(params) if path.endswith(("attn_norm/scale", "mlp_norm/scale"))]
    assert all(not jnp.array_equal(flatten(params)[path], flatten(smooth.params)[path]) for path in norms)
    # Rows of an activation then have channels of like size: per-token rounding loses less.
    rounded = Recipe((Quantize(6, symmetric=True, act_bits=8),))
    assert error(name, rounded.apply(smooth.params)) < 1.5 * error(name, rounded.apply(params))


STATIC = [("w8a8-static", "decoder"), ("fp8-static", "moe")]
STATIC += [
    pytest.param(recipe, name, marks=pytest.mark.slow)
    for recipe in ("w8a8-static", "fp8-static") for name in CONFIGS if (recipe, name) not in STATIC
]


@pytest.mark.parametrize("recipe,name", STATIC)
def test_static_ranges_are_those_of_the_data(recipe, name):
    done = run(name, recipe)
    leaves = [leaf for leaf in flatten(done.params).values() if isinstance(leaf, QArray)]
    assert leaves and all(leaf.act_scale.shape == (*leaf.codes.shape[:-2], 1, 1) for leaf in leaves)
    assert all((np.asarray(leaf.act_scale) > 0).all() and leaf.act_bits == 8 for leaf in leaves)
    dynamic = {"w8a8-static": "w8a8-dynamic", "fp8-static": "fp8"}[recipe]
    assert error(name, done.params) < 4 * error(name, parse(dynamic).apply(make(name)[2]))


def test_clips_of_a_histogram():
    x = np.random.default_rng(0).normal(size=(4096, 16)).astype(np.float32)
    x[0, 0] = 40.0
    reading = histogram(jnp.asarray(x), None, None)
    counts, largest = np.asarray(reading["counts"]), float(reading["largest"][0])
    assert counts.sum() == x.size and len(counts) == BINS
    assert clip_limit(counts, largest, "max") == 40 == clip_limit(counts, largest, "mse", "float8")
    assert clip_limit(counts, largest, "percentile") == pytest.approx(np.quantile(np.abs(x), 0.9999), rel=0.05)

    def squared_error(limit):
        step = limit / 127
        return np.sum((np.clip(np.rint(x / step), -127, 127) * step - x) ** 2)

    best = min(largest * np.linspace(0.05, 1, 96), key=squared_error)
    assert squared_error(clip_limit(counts, largest, "mse")) < 1.1 * squared_error(best)
    assert squared_error(best) < 0.8 * squared_error(largest)


@pytest.mark.parametrize(
    "step,fields", [(Awq, {"bits": 9}), (SmoothQuant, {"alpha": 2.0}), (StaticActivations, {"format": "int4"})]
)
def test_impossible_steps(step, fields):
    with pytest.raises(UserError):
        step(**fields)
