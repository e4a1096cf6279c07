"""From a configuration to a model: its structure (a graphdef) and its parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from flax import nnx

from jaxlm.core.tree import Params
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import DecoderLM
from jaxlm.nn.layers import ParamKeys
from jaxlm.nn.recurrent import LSTMLM
from jaxlm.nn.seq2seq import Seq2Seq

__all__ = ["abstract", "build", "initializer"]

_MODELS = {"decoder": DecoderLM, "seq2seq": Seq2Seq, "lstm": LSTMLM}


@functools.lru_cache(maxsize=64)  # so that one configuration is traced, and its initializer compiled, once
def initializer(config: ModelConfig) -> tuple[nnx.GraphDef, Callable[[jax.Array], Params]]:
    """The model's structure, and the pure function from a key to its parameters (to ``jit`` with out_shardings)."""

    def make(key):
        return _MODELS[config.kind](config, keys=ParamKeys(key))

    graphdef, _ = jax.eval_shape(lambda key: nnx.split(make(key)), jax.random.key(0))
    return graphdef, lambda key: nnx.state(make(key))


def build(config: ModelConfig, key: jax.Array) -> tuple[nnx.GraphDef, Params]:
    """A freshly initialised model: its structure and parameters."""
    graphdef, init = initializer(config)
    return graphdef, jax.jit(init)(key)


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """The model with shapes and dtypes in place of arrays; allocates nothing."""
    graphdef, init = initializer(config)
    return graphdef, jax.eval_shape(init, jax.random.key(0))
