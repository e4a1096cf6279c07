"""A model whose layers are taken apart is the same model."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import jaxlm
from jaxlm import nn
from jaxlm.compression import load_recipe
from jaxlm.core.tree import flatten
from jaxlm.hf.directory import export_model, write_model
from tests.models import build

DECODER = nn.DecoderConfig(
    vocab_size=31, width=16, heads=2, ffn=24, layers=4, windows=(3, 0), experts=2, dense_layers=(0, 1)
)
SEQ2SEQ = nn.preset("tiny", vocab_size=29, width=16, heads=4, ffn=24, encoder_layers=2, decoder_layers=3)


@pytest.mark.parametrize("config", [DECODER, SEQ2SEQ], ids=["decoder", "seq2seq"])
def test_it_computes_the_same_and_the_stacks_are_gone(config):
    graphdef, params = build(config)
    inputs = [np.arange(1, 8).reshape(1, 7)] * len(config.sides)
    expected = nnx.merge(graphdef, params)(*inputs)
    stacked = [leaf for path, leaf in flatten(params).items() if "/layers/" in path and len(leaf) > 1]
    apart, params = nn.unstack_layers(config, params)
    assert nn.single_layers(config) == apart and stacked and all(leaf.is_deleted() for leaf in stacked)
    graphdef, like = nn.abstract(apart)
    assert {path: leaf.shape for path, leaf in flatten(like).items()} == {
        path: leaf.shape for path, leaf in flatten(params).items()}
    np.testing.assert_allclose(nnx.merge(graphdef, params)(*inputs), expected, rtol=1e-5, atol=1e-6)
    again, same = nn.unstack_layers(apart, params)
    assert again == apart and not any(leaf.is_deleted() for leaf in jax.tree.leaves(same))


def test_layers_that_are_alike_are_traced_once():
    config = nn.single_layers(nn.DecoderConfig(vocab_size=31, width=16, heads=2, ffn=24, layers=6))
    graphdef, like = nn.abstract(config)
    jaxpr = jax.make_jaxpr(lambda params, x: nnx.merge(graphdef, params)(x))(like, np.ones((1, 4), np.int32))
    layers = [each.params["jaxpr"] for each in jaxpr.eqns if each.params.get("name") == "_traced_once"]
    assert len(layers) == 6 and len(set(map(id, layers))) == 1


@pytest.mark.parametrize("kind", ["ours", "Hugging Face", "quantized"])
def test_models_are_read_so(kind, tmp_path):
    config = nn.DecoderConfig(vocab_size=31, width=16, heads=2, ffn=24, layers=3)
    params = build(config)[1]
    if kind == "Hugging Face":
        export_model(tmp_path, config, params, None)
    else:
        if kind == "quantized":
            done = load_recipe("w8a8-dynamic").run(config, params)
            config, params = done.config, done.params
        write_model(tmp_path, config, params, None)
    stacked, apart = jaxlm.load(tmp_path), jaxlm.load(tmp_path, stacked=False)
    assert apart.config.layer_groups == (1, 1, 1) and stacked.config.layer_groups == ()
    tokens = np.arange(1, 9).reshape(1, 8)
    np.testing.assert_allclose(apart(tokens), stacked(tokens), rtol=1e-5, atol=1e-6)
