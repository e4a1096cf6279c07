"""Layer by layer is the whole model."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.compression.calibration import layer_params
from jaxlm.nn.layerwise import LayerwiseModel
from tests.models import build

DECODER = nn.DecoderConfig(vocab_size=31, width=16, heads=4, kv_heads=2, ffn=24, layers=3)
SEQ2SEQ = nn.preset("tiny", vocab_size=31, width=16, heads=4, ffn=24, encoder_layers=2, decoder_layers=3)
CONFIGS = {
    "decoder": DECODER,
    "windows": dataclasses.replace(DECODER, windows=(3, 0), rope_local_theta=100.0, layer_groups=(2, 1)),
    "moe": dataclasses.replace(DECODER, experts=4, dense_layers=(0,), norm_position="sandwich"),
    "learned": dataclasses.replace(DECODER, positions="learned", embed_norm=True, scan_layers=False, parallel=True),
    "seq2seq": SEQ2SEQ,
    "relative": dataclasses.replace(SEQ2SEQ, positions="relative", src_vocab_size=40, decoder_heads=2),
}
SOURCE = jnp.array([[5, 6, 7, 2, 0], [8, 9, 2, 0, 0]])
TARGET = jnp.asarray(np.random.default_rng(0).integers(3, 31, (2, 6))).at[1, 4:].set(0)


@functools.cache
def make(name):
    config = CONFIGS[name]
    graphdef, params = build(config)
    return LayerwiseModel(config, graphdef), params


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in ("decoder", "relative") else name for name in CONFIGS
])
def test_layer_by_layer_is_the_whole_model(name):
    walk, params = make(name)
    batch = (SOURCE, TARGET) if walk.config.kind == "seq2seq" else (TARGET,)
    places = list(walk.layer_positions())
    state = jax.jit(walk.embed)(params, batch)
    step, enter_decoder = jax.jit(walk.run_layer), jax.jit(walk.enter_decoder)
    for before, place in zip([places[0], *places], places, strict=False):
        state = enter_decoder(params, batch, state) if place.side != before.side else state
        state = step(params, place, layer_params(params, place), batch, state)
    whole = jax.jit(lambda params, batch: nnx.merge(walk.graphdef, params)(*batch))(params, batch)
    np.testing.assert_allclose(jax.jit(walk.logits)(params, state), whole, atol=1e-5)
    assert len(places) == (5 if len(batch) == 2 else 3)


def test_padding_does_not_count():
    walk, _ = make("seq2seq")
    batch = (SOURCE, jnp.array([[0, 4, 5], [0, 4, 0]]))  # models may start with the padding token
    encoder, *_, decoder = walk.layer_positions()
    source, target = [1, 1, 1, 1, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]
    for place, name, real in [
        (encoder, "attn/q/kernel", source), (decoder, "cross/v/kernel", source), (decoder, "cross/q/kernel", target),
        (decoder, "mlp/down/kernel", target),
    ]:
        np.testing.assert_array_equal(walk.row_weights(place, name, batch), real)
    assert make("decoder")[0].row_weights(decoder, "attn/q/kernel", batch[1:]) is None
