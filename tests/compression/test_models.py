"""Whole models, compressed: the same structure runs every representation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.compression.names import parse
from jaxlm.compression.placement import place
from jaxlm.core.leaves import dequantize_tree, is_leaf
from jaxlm.core.tree import flatten

DECODER = nn.DecoderConfig(vocab_size=50, width=128, heads=4, kv_heads=2, ffn=160, layers=3, segments=(2, 1))
CONFIGS = {
    "decoder": DECODER,
    "unrolled": dataclasses.replace(DECODER, scan_layers=False),
    "bfloat16": dataclasses.replace(DECODER, dtype="bfloat16"),
    "seq2seq": nn.Seq2SeqConfig(vocab_size=50, width=128, heads=4, ffn=160, encoder_layers=2, decoder_layers=2),
    "lstm": nn.LSTMConfig(vocab_size=50, width=128, layers=2),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 50, (2, 9)))


@functools.cache
def build(name):
    return nn.build(CONFIGS[name], jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, params):
    model = nnx.merge(graphdef, params)
    return model(TOKENS, TOKENS[:, ::-1]) if model.config.kind == "seq2seq" else model(TOKENS)


@pytest.mark.parametrize("name", CONFIGS)
def test_weight_only_models_equal_their_dequantized_ones(name):
    graphdef, params = build(name)
    small = jax.jit(parse("w4a16-rtn-g48").apply)(params)
    loose = 0.05 if name == "bfloat16" else 1e-4
    assert sum(map(is_leaf, flatten(small).values())) >= 4
    np.testing.assert_allclose(logits(graphdef, small), logits(graphdef, dequantize_tree(small)), atol=loose)
    placed, notes = place(small, "cpu")
    assert jax.tree.structure(placed) == jax.tree.structure(params) and notes
    np.testing.assert_allclose(logits(graphdef, small), logits(graphdef, placed), atol=loose)


@pytest.mark.parametrize("name", CONFIGS)
def test_integer_models_are_near_the_dense_ones(name):
    graphdef, params = build(name)
    small = jax.jit(parse("w8a8-dynamic").apply)(params)
    dense = logits(graphdef, params)
    assert jnp.abs(logits(graphdef, small) - dense).max() < 0.05 * jnp.abs(dense).max()


def test_an_integer_model_decodes_as_it_reads():
    graphdef, params = build("decoder")
    small = jax.jit(parse("w8a8-dynamic").apply)(params)
    whole, cache = logits(graphdef, small), nnx.merge(graphdef, small).init_cache(2, 9)
    decode = jax.jit(lambda params, tokens, cache: nnx.merge(graphdef, params).decode(tokens, cache))
    for t in range(9):
        step, cache = decode(small, TOKENS[:, t : t + 1], cache)
        np.testing.assert_allclose(step[:, 0], whole[:, t], atol=2e-2 * float(jnp.abs(whole).max()))
