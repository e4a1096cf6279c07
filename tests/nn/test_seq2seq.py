"""The encoder-decoder: padding, causality, cached decoding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.core.tree import flatten
from tests.nn.test_decoder import assert_decoded_alike, random_params

SMALL = nn.preset("tiny", vocab_size=29, width=16, heads=4, ffn=24, encoder_layers=2, decoder_layers=3, dropout=0.1)
VARIANTS = {
    "pre-norm": {},
    "post-norm": dict(norm_position="post", embed_norm=True, tie_embeddings=False),
    "relative": dict(positions="relative", norm="rmsnorm", activation="geglu_tanh", kv_heads=2),
    "rotary": dict(positions="rotary", encoder_layer_groups=(1, 1), decoder_layers=2, decoder_layer_groups=(1, 1),
                   scan_layers=False),
    "learned": dict(positions="learned", position_offset=2, max_positions=16),
    "unequal": dict(decoder_heads=2, decoder_ffn=40, src_vocab_size=31, logits_bias=True, norm_position="sandwich"),
}


def make(**changes):
    graphdef, like = nn.abstract(dataclasses.replace(SMALL, **changes))
    return graphdef, random_params(like, 0.2)


forward = jax.jit(lambda graphdef, params, *args: nnx.merge(graphdef, params)(*args), static_argnums=0)
decode = jax.jit(lambda graphdef, params, *args: nnx.merge(graphdef, params).decode(*args), static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def start(graphdef, params, src, length):
    model = nnx.merge(graphdef, params)
    return model.init_cache(model.encode(src), src != 0, length)


def ids(batch, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(3, 29, (batch, length)))


@pytest.mark.parametrize("name", [
    name if name == "pre-norm" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS
])
def test_padding_and_batch_mates_change_nothing(name):
    model = make(**VARIANTS[name])
    src, tgt = ids(1, 6), ids(1, 5, seed=1)
    alone = forward(*model, src, tgt)
    mates = forward(
        *model,
        jnp.concatenate([jnp.pad(src, ((0, 0), (0, 4))), ids(2, 10, seed=2)]),
        jnp.concatenate([jnp.pad(tgt, ((0, 0), (0, 3))), ids(2, 8, seed=3)]),
    )
    np.testing.assert_allclose(mates[:1, :5], alone, atol=1e-5)


@pytest.mark.parametrize("name, kv_cache", [
    *((name, "full") for name in ("pre-norm", "relative", "rotary", "unequal")),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in [
        ("post-norm", "full"), ("learned", "full"), ("rotary", "int8"), ("relative", "int4"), ("post-norm", "fp8")]),
])
def test_cached_decoding_equals_the_full_forward(name, kv_cache):
    model = make(**VARIANTS[name], kv_cache=kv_cache)
    src, tgt = jnp.pad(ids(3, 7), ((0, 0), (0, 2))), ids(3, 8, seed=1)
    full = forward(*model, src, tgt)
    cache = start(*model, src, 8)
    steps = []
    for begin, end in [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8)]:
        logits, cache = decode(*model, tgt[:, begin:end], cache)
        steps.append(logits)
    assert_decoded_alike(np.concatenate(steps, 1), full, kv_cache, 1e-5)
    assert (kv_cache == "full") == all(isinstance(x, jax.Array) for x in (*cache.keys, *cache.memory[0]))


def test_the_target_is_causal_and_the_source_is_not():
    model = make()
    src, tgt = ids(1, 6), ids(1, 5, seed=1)
    base = forward(*model, src, tgt)
    later = forward(*model, src, tgt.at[0, 3].set(3))
    np.testing.assert_array_equal(base[:, :3], later[:, :3])
    assert jnp.abs(base[:, 3:] - later[:, 3:]).max() > 1e-4
    other = forward(*model, src.at[0, 5].set(3), tgt)
    assert (jnp.abs(base - other).max(-1) > 1e-5).all()


def test_the_beams_of_a_sentence_share_its_memory():
    model = make()
    src, tgt = ids(2, 6), ids(4, 5, seed=1)
    forked = start(*model, src, 5).fork(2)
    assert forked.memory[0][0].shape[1] == 2
    _, cache = decode(*model, tgt[:, :4], forked)
    got, _ = decode(*model, tgt[jnp.array([1, 0, 3, 3]), 4:], cache.reorder(jnp.array([[1, 0], [1, 1]])))
    want = forward(*model, src[jnp.array([0, 0, 1, 1])], tgt[jnp.array([1, 0, 3, 3])])
    np.testing.assert_allclose(got, want[:, 4:], atol=1e-5)


def test_parameters_are_shared_between_the_languages():
    _, params = nn.abstract(SMALL)
    tables = [path for path in flatten(params) if path.endswith("table")]
    assert tables == ["embed/table"]
