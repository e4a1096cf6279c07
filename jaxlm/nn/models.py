"""From a configuration to a model: its structure (a graphdef) and its parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from jaxlm.core.tree import Params
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import DecoderLM
from jaxlm.nn.layers import ParamKeys
from jaxlm.nn.positions import text_lengths
from jaxlm.nn.recurrent import LSTMLM
from jaxlm.nn.seq2seq import Seq2Seq

__all__ = ["abstract", "batch_arguments", "build", "initializer"]

_MODELS = {"decoder": DecoderLM, "seq2seq": Seq2Seq, "lstm": LSTMLM}


@functools.lru_cache(maxsize=64)  # a configuration is traced once, and jit compiles one function for it
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, Params, Callable[[jax.Array], Params]]:
    def split(key):
        return nnx.split(_MODELS[config.kind](config, keys=ParamKeys(key)))

    graphdef, shapes = jax.eval_shape(split, jax.random.key(0))
    return graphdef, shapes, lambda key: split(key)[1]


def initializer(config: ModelConfig) -> tuple[nnx.GraphDef, Callable[[jax.Array], Params]]:
    """The model's structure, and the pure function from a key to its parameters (to ``jit`` with out_shardings)."""
    graphdef, _, init = _structure(config)
    return graphdef, init


def build(config: ModelConfig, key: jax.Array) -> tuple[nnx.GraphDef, Params]:
    """A freshly initialised model: its structure and parameters."""
    graphdef, init = initializer(config)
    return graphdef, jax.jit(init)(key)


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """The model with shapes and dtypes in place of arrays; allocates nothing."""
    graphdef, shapes, _ = _structure(config)
    return graphdef, jax.tree.map(lambda shape: shape, shapes)  # a tree of the caller's own


def batch_arguments(
    config: ModelConfig, batch: Mapping[str, jax.Array]
) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
    """The arguments with which a model is called for a batch, those without names and those with names.

    ``batch`` holds ``inputs`` ``[B, T]``; for a translation model ``src`` ``[B, S]``; where documents are packed
    ``segment_ids`` and ``positions`` ``[B, T]``; otherwise ``weights`` ``[B, T]``, 0 in the padding at the end.
    """
    inputs = (batch["src"], batch["inputs"]) if "src" in batch else (batch["inputs"],)
    named = {f"{name}_BxT": batch[name] for name in ("segment_ids", "positions") if name in batch}
    if config.rotates_by_length and not named:
        named["length_B"] = text_lengths(batch["weights"])
    return inputs, named
