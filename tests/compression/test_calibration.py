"""What taps measure, against the inputs themselves; and layers joined again."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import nn
from jaxlm.compression.calibration import Calibration, layer_params, solve_layers
from jaxlm.compression.layer_groups import join
from jaxlm.compression.observers import BINS, bin_values, gram, histogram, moments
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core.leaves import QArray, dequantize
from jaxlm.core.tree import flatten
from jaxlm.nn.layerwise import LayerwiseModel
from tests.models import build

DECODER = nn.DecoderConfig(vocab_size=31, width=16, heads=4, kv_heads=2, ffn=24, layers=3)
CONFIGS = {
    "decoder": DECODER,
    "moe": dataclasses.replace(DECODER, experts=4, layers=2),
    "seq2seq": nn.preset("tiny", vocab_size=31, width=16, heads=4, ffn=24, encoder_layers=2, decoder_layers=2),
}


def walk_of(config):
    return LayerwiseModel(config, nn.initializer(config)[0])


@functools.cache
def make(name):
    config = CONFIGS[name]
    rng = np.random.default_rng(1)
    batches = [(rng.integers(3, 31, (2, 7)),), (rng.integers(3, 31, (2, 7)),)]
    if config.kind == "seq2seq":
        source = np.array([[5, 6, 7, 2, 0], [8, 9, 2, 0, 0]])
        batches = [(source, tokens) for (tokens,) in batches]
        batches[0][1][1, 4:] = 0
    return config, build(config)[1], Calibration(batches, walk_of)


def first_block(name, targets):
    """The first layer that has targets, in the hands of a solver."""
    config, params, calibration = make(name)
    found = []
    solve_layers(config, params, calibration, lambda block: found.append(block) or block.params, targets, [])
    return found


def norm(x, scale, bias=None, eps=1e-5):
    x = np.asarray(x, np.float64)
    x = x if bias is None else x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale
    return y if bias is None else y + bias


@pytest.mark.parametrize("name", [pytest.param("decoder", marks=pytest.mark.slow), "seq2seq"])
def test_readings_are_those_of_the_inputs(name):
    """The input of ``attn/q`` in the first layer is the normalised embedding, padding left out."""
    block = first_block(name, lambda path: path.endswith("attn/q/kernel"))[0]
    rows = []
    for batch, (x, _) in zip(block.batches, block.inputs, strict=True):
        real = np.ones(batch[0].shape, bool) if name == "decoder" else batch[0] != 0
        rows.append(norm(x, block.params["attn_norm/scale"], block.params.get("attn_norm/bias"))[real])
    x_MxI = np.concatenate(rows)
    reading = block.observe(gram)["attn/q/kernel"]
    assert reading["count"] == len(x_MxI) == (28 if name == "decoder" else 14)
    np.testing.assert_allclose(reading["gram"], x_MxI.T @ x_MxI, rtol=1e-4, atol=1e-4)
    reading = block.observe(moments)["attn/q/kernel"]
    np.testing.assert_allclose(reading["square"], (x_MxI**2).sum(0), rtol=1e-4)
    np.testing.assert_allclose(reading["size"], np.abs(x_MxI).sum(0), rtol=1e-4)
    np.testing.assert_allclose(reading["largest"], np.abs(x_MxI).max(0), rtol=1e-4)
    reading = block.observe(histogram)["attn/q/kernel"]
    np.testing.assert_allclose(reading["largest"], np.abs(x_MxI).max(), rtol=1e-4)
    counts = np.asarray(reading["counts"])
    bins = np.clip(np.floor(64 * (np.log2(np.maximum(np.abs(x_MxI), 1e-20)) - 16)) + BINS, 0, BINS - 1)
    expected = np.bincount(bins.astype(int).ravel(), minlength=BINS)
    assert np.abs(np.cumsum(counts[1:] - expected[1:])).max() <= 2  # the lowest one also has the padding
    assert bin_values()[np.argmax(counts[1:]) + 1] < 4


def test_experts_are_told_apart():
    block = first_block("moe", lambda path: "/experts/" in path)[0]
    names = ("mlp/experts/gate/kernel", "mlp/experts/up/kernel")
    readings = block.observe(gram, names)
    counts = np.asarray(readings[names[0]]["count"])
    assert counts.sum() == 2 * 28 and len(counts) == 4 and counts.min() >= 0
    # The sum over experts is the sum over tokens, each counted for two experts; the layer's own numbers say which.
    moment = block.observe(moments, names)[names[0]]
    diagonals_ExI = np.diagonal(readings[names[0]]["gram"], axis1=1, axis2=2)
    np.testing.assert_allclose(diagonals_ExI, moment["square"], rtol=1e-4, atol=1e-5)
    whole = block.observe(gram, ["mlp/router/kernel"])["mlp/router/kernel"]["gram"]
    np.testing.assert_allclose(readings[names[1]]["gram"].sum(0), 2 * whole, rtol=1e-4, atol=1e-4)


def test_a_layer_is_given_what_the_solved_ones_before_it_give():
    config, params, calibration = make("decoder")
    seen = []

    def solve(block):
        seen.append(np.asarray(block.inputs[0][0]))
        return block.params | {name: jnp.zeros_like(block.params[name]) for name in block.targets}

    outputs = ("o/kernel", "down/kernel")
    layers = solve_layers(config, params, calibration, solve, lambda path: path.endswith(outputs), [])
    for state in seen[1:]:  # nothing is added to the residual stream any more
        np.testing.assert_array_equal(state, seen[0])
    config_after, after = join(config, params, layers)
    assert config_after == config and jax.tree.structure(after) == jax.tree.structure(params)
    assert not flatten(after)["decoder/layers/0/attn/o/kernel"].any()
    assert [place.row for place, _ in layers] == [0, 1, 2]


@pytest.mark.parametrize("name", ["decoder", pytest.param("seq2seq", marks=pytest.mark.slow)])
def test_originals_are_what_the_layers_gave_before(name):
    config, params, calibration = make(name)

    def solve_with(replace):
        seen = []

        def solve(block):
            seen.append((block.dense_outputs, block.outputs(block.params)))
            return block.params | {name: jnp.zeros_like(block.params[name]) for name in block.targets if replace}

        solve_layers(config, params, calibration, solve, lambda path: path.endswith("o/kernel"), [], dense_outputs=True)
        return seen

    plain, solved = solve_with(False), solve_with(True)
    for (before, given), (still, changed) in zip(plain, solved, strict=True):
        jax.tree.map(np.testing.assert_array_equal, before, given)
        jax.tree.map(np.testing.assert_array_equal, before, still)
        assert (changed[0][0] != still[0][0]).any() == (still is not solved[0][0])  # all but the first


def test_joining_untouched_layers_changes_nothing():
    for name in CONFIGS:
        config, params, _ = make(name)
        layers = [(place, layer_params(params, place)) for place in walk_of(config).layer_positions()]
        config_after, after = join(config, params, layers)
        assert config_after == config
        jax.tree.map(np.testing.assert_array_equal, after, params)


def test_layers_of_several_representations_become_layer_groups():
    config, params, calibration = make("seq2seq")
    walk = walk_of(config)
    bits = iter([4, 3, 8, 8])
    layers = []
    for place in walk.layer_positions():
        layer = layer_params(params, place)
        kernel = quantize(layer["mlp/up/kernel"], bits=next(bits))
        layers.append((place, layer | {"mlp/up/kernel": kernel}))
    mixed, after = join(config, params, layers)
    assert (mixed.encoder_layer_groups, mixed.decoder_layer_groups) == ((1, 1), ())
    flat = flatten(after)
    assert flat["encoder/layers/1/mlp/up/kernel"].bits == 3 and flat["decoder/layers/0/mlp/up/kernel"].shape[0] == 2
    assert isinstance(flat["encoder/layers/0/mlp/up/kernel"], QArray)
    graphdef, like = nn.abstract(mixed)
    assert list(flatten(like)) == list(flat)
    dense = jax.tree.map(dequantize, dict(flat), is_leaf=lambda leaf: isinstance(leaf, QArray))
    assert {path: leaf.shape for path, leaf in dense.items()} == {p: leaf.shape for p, leaf in flatten(like).items()}
