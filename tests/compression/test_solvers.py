"""Steps that solve with data, on whole small models: better than without data, exact about zeros, clear about gaps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression.names import parse
from jaxlm.compression.prune.sparsegpt import SparseGpt
from jaxlm.compression.quantize.gptq import Gptq
from jaxlm.compression.recipe import Recipe
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray, dequantize, is_leaf
from jaxlm.core.tree import flatten
from tests.compression.calibrated import error, make, run

NAMES = ("decoder", "moe", "seq2seq")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "with_data,without",
    [("w3a16-gptq-g16", "w3a16-rtn-g16"), ("sparse60-sparsegpt", "sparse60-wanda"), ("2:4-sparsegpt", "2:4-magnitude")],
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


@pytest.mark.parametrize("name", ["decoder", "moe"])
def test_zeros_survive_gptq_and_joint_pruning_rounds_what_is_left(name):
    pruned = run(name, "2:4-wanda")
    both = run(name, "2:4-wanda+w4a16-gptq-g16")
    joint = run(name, Recipe((SparseGpt(n=2, m=4, bits=4),)))
    for path, leaf in flatten(both.params).items():
        if isinstance(leaf, QArray):
            zero = np.asarray(flatten(pruned.params)[path]) == 0
            assert zero.mean() >= 0.5 and not np.asarray(dequantize(leaf))[zero].any()
            shared = np.asarray(dequantize(flatten(joint.params)[path]) == 0).swapaxes(-1, -2)
            assert (shared.reshape(*shared.shape[:-1], -1, 4).sum(-1) >= 2).all()
    assert error(name, joint.params) < error(name, both.params)


def test_true_sequential_sees_what_was_rounded_before():
    plain, after = run("decoder", Recipe((Gptq(2, 16),))), run("decoder", Recipe((Gptq(2, 16, true_sequential=True),)))
    flat, flat_after = flatten(plain.params), flatten(after.params)
    first, later = "decoder/layers/0/attn/q/kernel", "decoder/layers/0/mlp/down/kernel"
    assert jnp.array_equal(flat[first].codes[0], flat_after[first].codes[0])
    assert not jnp.array_equal(flat[later].codes[0], flat_after[later].codes[0])


def test_experts_that_saw_too_little_are_done_without_data():
    config, graphdef, params, calibration = make("moe")
    few = dataclasses.replace(calibration, batches=[(calibration.batches[0][0][:1, :6],)])
    done = Recipe((Gptq(4, 16),)).run(config, params, few)
    assert any("experts saw too few tokens" in note and "rounded to 4 bits without data" in note for note in done.notes)
    rounded = parse("w4a16-rtn-g16").apply(params)
    path = "decoder/layers/0/mlp/experts/down/kernel"
    seen = flatten(done.params)[path].codes == flatten(rounded)[path].codes
    assert seen[0].all(axis=(-1, -2)).any()
    assert not run("moe", "w4a16-gptq-g16").notes


@pytest.mark.parametrize("target", ["embed/table", ".*(embed/table|layers/0/.*/kernel)"])
def test_only_layers_are_calibrated(target):
    config, _, params, calibration = make("decoder")
    with pytest.raises(UserError, match="embed/table"):
        Recipe((Gptq(4, target=target),)).run(config, params, calibration)


def test_the_same_arguments_give_the_same_codes():
    first, second = run("decoder", "w4a16-gptq"), run("decoder", "w4a16-gptq")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
