"""Whole models, compressed: the same structure runs every representation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.checkpoint.storage import leaf_bytes
from jaxlm.compress import compress
from jaxlm.compression.names import parse
from jaxlm.compression.platforms import lower_for_platform
from jaxlm.compression.quantize.half_precision import HalfPrecision
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core.leaves import dequantize_tree, is_leaf
from jaxlm.core.tree import flatten, map_params
from jaxlm.hf.directory import weight_bytes
from jaxlm.model import LM, load
from tests import models

DECODER = nn.DecoderConfig(vocab_size=50, width=128, heads=4, kv_heads=2, ffn=160, layers=3, layer_groups=(2, 1))
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
    """With random biases too: zeros take no bytes."""
    graphdef, params = models.build(CONFIGS[name])
    rng = np.random.default_rng(1)

    def leaf(path, each):
        return jnp.asarray(rng.normal(0, 0.1, each.shape), each.dtype) if path.endswith("/bias") else each

    return graphdef, map_params(leaf, params)


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, params):
    model = nnx.merge(graphdef, params)
    return model(TOKENS, TOKENS[:, ::-1]) if model.config.kind == "seq2seq" else model(TOKENS)


KINDS = [
    name if name in ("decoder", "lstm") else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS
]


@pytest.mark.parametrize("name", KINDS)
def test_weight_only_models_equal_their_dequantized_ones(name):
    graphdef, params = build(name)
    small = jax.jit(parse("w4a16-rtn-g48").apply)(params)
    loose = 0.05 if name == "bfloat16" else 1e-4
    assert sum(map(is_leaf, flatten(small).values())) >= 4
    np.testing.assert_allclose(logits(graphdef, small), logits(graphdef, dequantize_tree(small)), atol=loose)
    placed, notes = lower_for_platform(small, "cpu")
    assert jax.tree.structure(placed) == jax.tree.structure(params) and notes
    np.testing.assert_allclose(logits(graphdef, small), logits(graphdef, placed), atol=loose)


@pytest.mark.parametrize("name", KINDS)
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


@pytest.mark.parametrize("name", [
    pytest.param("decoder", marks=pytest.mark.slow), pytest.param("seq2seq", marks=pytest.mark.slow), "lstm",
])
def test_half_takes_half_the_bytes_and_hardly_changes_anything(name):
    graphdef, params = build(name)
    exact = parse("w4a16-rtn-g48").apply(params)
    half = parse("w4a16-rtn-g48+half").run(CONFIGS[name], params).params
    want = logits(graphdef, exact)
    assert 0 < jnp.abs(logits(graphdef, half) - want).max() < 0.03 * jnp.abs(want).max()
    for (path, was), now in zip(flatten(exact).items(), flatten(half).values(), strict=True):
        assert 0.45 < leaf_bytes(now) / leaf_bytes(was) < (0.95 if is_leaf(was) else 0.6), path
        if is_leaf(was):
            np.testing.assert_array_equal(now.codes, was.codes)
            np.testing.assert_allclose(now.scale, was.scale, rtol=2**-11)
            assert now.scale.dtype == jnp.float32
        else:
            np.testing.assert_allclose(now.astype(jnp.float32), was, rtol=2**-8)


def test_scales_that_float16_does_not_reach_stay():
    leaf = quantize(jnp.array([[1e-6, 1.0, 1e6]] * 4), bits=4, group=0, symmetric=True)
    kept = flatten(HalfPrecision()(None, nnx.State({"kernel": nnx.Param(leaf)}), None, [])[1])
    np.testing.assert_array_equal(kept["kernel"].scale[jnp.array([0, 2])], leaf.scale[jnp.array([0, 2])])
    assert kept["kernel"].scale[1] == leaf.scale[1].astype(jnp.float16) != leaf.scale[1]


def test_a_dense_model_in_half_is_saved_in_half(tmp_path):
    graphdef, params = build("decoder")
    lm = LM(CONFIGS["decoder"], graphdef, params, None)
    half = compress(lm, "half")
    out = half.save(tmp_path / "half")
    assert weight_bytes(out) < 0.52 * weight_bytes(lm.save(tmp_path / "dense"))
    jax.tree.map(np.testing.assert_array_equal, load(out).params, jax.tree.map(jnp.float32, half.params))
