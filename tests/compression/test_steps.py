"""Steps on whole small models: data makes them better, zeros stay zeros, and they say what they did without."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression.names import parse
from jaxlm.compression.prune.sparsegpt import SparseGpt
from jaxlm.compression.prune.structured import StructuredPrune
from jaxlm.compression.quantize.gptq import Gptq
from jaxlm.compression.recipe import Recipe
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, LowRank, QArray, dequantize, is_leaf
from jaxlm.core.tree import count_params, flatten
from tests.compression.calibrated import error, make, run
from tests.compression.models import some

SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", some("decoder", slow="moe seq2seq"))
@pytest.mark.parametrize(
    "with_data,without",
    [
        ("w3a16-gptq-g16", "w3a16-rtn-g16"), ("sparse50-sparsegpt", "sparse50-wanda"),
        pytest.param("2:4-sparsegpt", "2:4-magnitude", marks=SLOW),
    ],
)
def test_data_helps(name, with_data, without):
    solved, plain = run(name, with_data), run(name, without)
    assert error(name, solved.params) < 0.9 * error(name, plain.params)
    for path, leaf in flatten(solved.params).items():
        dense = flatten(make(name)[2])[path]
        if not path.endswith("kernel") or "router" in path:
            continue
        assert leaf.shape == dense.shape and is_leaf(leaf) == ("gptq" in with_data)
        assert jnp.any(dequantize(leaf) != dense), path


@pytest.mark.parametrize("name", some("decoder", slow="moe"))
def test_zeros_survive_gptq_and_joint_pruning_rounds_what_is_left(name):
    pruned = run(name, "2:4-wanda")
    both = run(name, "2:4-wanda+w3a16-gptq-g16")
    joint = run(name, Recipe((SparseGpt(n=2, m=4, bits=3),)))
    for path, leaf in flatten(both.params).items():
        if isinstance(leaf, QArray):
            zero = np.asarray(flatten(pruned.params)[path]) == 0
            assert zero.mean() >= 0.5 and not np.asarray(dequantize(leaf))[zero].any()
            shared = np.asarray(dequantize(flatten(joint.params)[path]) == 0).swapaxes(-1, -2)
            assert (shared.reshape(*shared.shape[:-1], -1, 4).sum(-1) >= 2).all()
    assert error(name, joint.params) < error(name, both.params)


def test_true_sequential_sees_what_was_rounded_before_and_the_same_arguments_give_the_same_codes():
    config, _, params, calibration = make("decoder")
    plain, again = run("decoder", "w3a16-gptq-g16"), parse("w3a16-gptq-g16").run(config, params, calibration)
    jax.tree.map(np.testing.assert_array_equal, plain.params, again.params)
    after = run("decoder", Recipe((Gptq(3, 16, true_sequential=True),)))
    flat, flat_after = flatten(plain.params), flatten(after.params)
    first, later = "decoder/layers/0/attn/q/kernel", "decoder/layers/0/mlp/down/kernel"
    assert jnp.array_equal(flat[first].codes[0], flat_after[first].codes[0])
    assert not jnp.array_equal(flat[later].codes[0], flat_after[later].codes[0])


def test_experts_that_saw_too_little_are_done_without_data():
    config, graphdef, params, calibration = make("moe")
    few = dataclasses.replace(calibration, batches=[(calibration.batches[0][0][:1, :6],)])
    recipe = Recipe((Gptq(4, 16, target=r".*/mlp/experts/down/kernel"),))
    done = recipe.run(config, params, few)
    assert any("experts saw too few tokens" in note and "rounded to 4 bits without data" in note for note in done.notes)
    path = "decoder/layers/0/mlp/experts/down/kernel"
    seen = flatten(done.params)[path].codes == flatten(parse("w4a16-rtn-g16").apply(params))[path].codes
    assert seen[0].all(axis=(-1, -2)).any()
    assert not recipe.run(config, params, calibration).notes


@pytest.mark.parametrize("target", ["embed/table", ".*(embed/table|layers/0/.*/kernel)"])
def test_only_layers_are_calibrated(target):
    config, _, params, calibration = make("decoder")
    with pytest.raises(UserError, match="embed/table"):
        Recipe((Gptq(4, target=target),)).run(config, params, calibration)


@pytest.mark.parametrize("name,recipe", [
    ("decoder", "prune-heads50"), ("decoder", "prune-width25"), ("seq2seq", "prune-ffn40"),
    pytest.param("seq2seq", "prune-heads50", marks=SLOW), pytest.param("seq2seq", "prune-width25", marks=SLOW),
    pytest.param("decoder", "prune-ffn40", marks=SLOW),
])
def test_pruned_models_are_smaller_and_data_helps(name, recipe):
    with_data, without = run(name, recipe), parse(recipe).run(*make(name)[0::2])
    assert count_params(with_data.params) == count_params(without.params) < count_params(make(name)[2])
    assert with_data.config == without.config != make(name)[0]
    assert error(name, with_data.params, with_data.config) < error(name, without.params, without.config)


def test_experts_and_layers_go():
    half = run("moe", "prune-experts50")
    assert half.config.experts == 2 and error("moe", half.params, half.config) > 0
    shallow = run("decoder", "drop-layers1")
    assert shallow.config.layers == 1 and "dropped layers" in shallow.notes[0]
    assert len(flatten(shallow.params)["decoder/layers/0/attn/q/kernel"]) == 1
    less = run("seq2seq", "drop-layers1")
    assert (less.config.encoder_layers, less.config.decoder_layers) == (1, 1)
    with pytest.raises(UserError, match="2 of 2"):
        run("decoder", "drop-layers2")


def test_rotation_keeps_the_model_and_low_rank_approximates_it():
    turned = run("decoder", "rotate")
    assert error("decoder", turned.params, turned.config) < 1e-7
    low = run("decoder", "lowrank60")
    leaves = {path: leaf for path, leaf in flatten(low.params).items() if is_leaf(leaf)}
    assert leaves and all(isinstance(leaf, LowRank) for leaf in leaves.values())
    rounded = parse("w8a16-rtn-channel").apply(low.params)  # the second step of lowrank60+w8a16-rtn-channel
    inner = flatten(rounded)["decoder/layers/0/mlp/up/kernel"]
    assert isinstance(inner.a, QArray) and isinstance(inner.b, QArray)
    assert error("decoder", rounded) == pytest.approx(error("decoder", low.params), rel=0.2)


def test_tables_and_shared_values():
    params = make("decoder")[2]
    for recipe, kind in [("nf4-g16", "nf4"), ("mxfp4", "mxfp4"), ("share4", "shared")]:
        small = parse(recipe).apply(params)
        leaf = flatten(small)["decoder/layers/0/mlp/up/kernel"]
        assert isinstance(leaf, Codebook) and leaf.kind == kind
        assert error("decoder", small) < error("decoder", run("decoder", "w2a16-rtn-g16").params)
    deep, pruned = run("decoder", "deep-compression"), run("decoder", "sparse50-sparsegpt")
    for path, leaf in flatten(deep.params).items():
        if is_leaf(leaf):
            zero = np.asarray(flatten(pruned.params)[path]) == 0
            assert zero.mean() >= 0.49 and not np.asarray(dequantize(leaf))[zero].any()
            assert len(np.unique(dequantize(leaf)[0])) <= 16
    assert parse("deep-compression").storage == "huffman"


def test_the_cache_is_a_matter_of_configuration():
    done = run("decoder", "w8a16-rtn-channel+kv4")
    assert done.config.kv_cache == "int4" and isinstance(flatten(done.params)["decoder/layers/0/mlp/up/kernel"], QArray)
    assert jnp.isfinite(error("decoder", done.params, done.config))


def test_unknown_units():
    with pytest.raises(UserError, match="tails"):
        StructuredPrune("tails", 0.5)(*make("decoder")[0::2], None, [])
