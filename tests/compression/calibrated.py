"""Small models with data to calibrate them with, and how far a compressed one is from the dense one."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm import nn
from jaxlm.compression.calibration import Calibration
from jaxlm.compression.names import parse
from jaxlm.core.leaves import dequantize_tree
from jaxlm.core.tree import flatten
from jaxlm.nn.layerwise import LayerwiseModel
from tests.models import build

# Few shapes of kernels, 32 x 32 and 32 x 16: each step compiles what it does anew for each.
DECODER = nn.DecoderConfig(vocab_size=31, width=32, heads=4, kv_heads=2, ffn=32, layers=2)
CONFIGS = {
    "decoder": DECODER,
    "moe": dataclasses.replace(DECODER, experts=4),
    "relu": dataclasses.replace(DECODER, activation="relu", norm="layernorm", mlp_bias=True, qkv_bias=True),
    "seq2seq": nn.preset(
        "tiny", max_positions=32, vocab_size=31, width=32, heads=4, ffn=32, encoder_layers=1, decoder_layers=2
    ),
}


def layerwise(config):
    return LayerwiseModel(config, nn.initializer(config)[0])


@functools.cache
def make(name, tokens=64):
    config = CONFIGS[name]
    graphdef, params = build(config)
    rng = np.random.default_rng(1)
    # Few directions of the width are in use, and channels are of unequal size: what steps with data can make use of.
    table = flatten(params)["embed/table"]
    basis = jnp.asarray(rng.normal(size=(6, 32)) * np.exp(rng.normal(size=32)), jnp.float32)
    params["embed"]["table"].set_value(jnp.asarray(rng.normal(size=(31, 6)), jnp.float32) @ basis + 0.1 * table)
    batches = [(rng.integers(3, 31, (4, tokens // 4)),) for _ in range(2)]
    if config.kind == "seq2seq":
        batches = [(rng.integers(3, 31, (4, 9)), batch) for (batch,) in batches]
    return config, graphdef, params, Calibration(batches, layerwise)


@functools.cache
def run(name, recipe):
    """The model compressed, with data, by a recipe or its name; made once for all tests."""
    config, _, params, calibration = make(name)
    return (parse(recipe) if isinstance(recipe, str) else recipe).run(config, params, calibration)


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, params, *batch):
    return nnx.merge(graphdef, params)(*batch)


def error(name, params, config=None):
    """Mean squared change of the logits on the calibration data.

    Weights are dequantized, so that one compiled model serves for all representations (``test_models`` proves that
    they compute the same), unless activations are rounded too.
    """
    before, graphdef, dense, calibration = make(name)
    other = graphdef if config in (None, before) else nn.initializer(config)[0]
    if not any(getattr(leaf, "act_bits", 0) for leaf in flatten(params).values()):
        params = dequantize_tree(params)
    changes = [logits(other, params, *each) - logits(graphdef, dense, *each) for each in calibration.batches]
    return np.mean([np.mean(change**2) for change in changes])
