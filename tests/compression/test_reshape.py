"""Steps that reshape a model, by name: they run, with data they are better, and rounding can follow."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression.names import parse
from jaxlm.compression.prune.structured import StructuredPrune
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, LowRank, QArray, dequantize, is_leaf
from jaxlm.core.tree import count_params, flatten
from tests.compression.calibrated import error, make, run


@pytest.mark.parametrize("name", ["decoder", "seq2seq"])
@pytest.mark.parametrize("recipe", ["prune-heads50", "prune-ffn40", "prune-width25"])
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
    with pytest.raises(UserError, match="dropping 2 of 2"):
        run("decoder", "drop-layers2")


def test_rotation_keeps_the_model_and_low_rank_approximates_it():
    turned = run("decoder", "rotate")
    assert error("decoder", turned.params, turned.config) < 1e-7
    low = run("decoder", "lowrank60")
    leaves = {path: leaf for path, leaf in flatten(low.params).items() if is_leaf(leaf)}
    assert leaves and all(isinstance(leaf, LowRank) for leaf in leaves.values())
    rounded = run("decoder", "lowrank60+w8a16-rtn-channel")
    inner = flatten(rounded.params)["decoder/layers/0/mlp/up/kernel"]
    assert isinstance(inner.a, QArray) and isinstance(inner.b, QArray)
    assert error("decoder", rounded.params) == pytest.approx(error("decoder", low.params), rel=0.2)


def test_tables_and_shared_values():
    params = make("decoder")[2]
    for recipe, kind in [("nf4-g16", "nf4"), ("mxfp4", "mxfp4"), ("share4", "shared")]:
        small = parse(recipe).apply(params)
        leaf = flatten(small)["decoder/layers/0/mlp/up/kernel"]
        assert isinstance(leaf, Codebook) and leaf.kind == kind
        assert error("decoder", small) < error("decoder", parse("w2a16-rtn-g16").apply(params))
    deep = run("decoder", "deep-compression")
    pruned = run("decoder", "sparse50-sparsegpt")
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
    with pytest.raises(UserError, match="use heads, ffn, experts or width"):
        StructuredPrune("tails", 0.5)(*make("decoder")[0::2], None, [])
