"""From a configuration to a model: its structure (a graphdef) and its parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from jaxlm.core.tree import Params
from jaxlm.nn.config import ModelConfig, layer_groups_of
from jaxlm.nn.decoder import DecoderLM
from jaxlm.nn.layers import ParamKeys
from jaxlm.nn.positions import text_lengths
from jaxlm.nn.recurrent import LSTMLM
from jaxlm.nn.seq2seq import Seq2Seq

__all__ = ["abstract", "batch_arguments", "build", "initializer", "single_layers", "unstack_layers"]

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


def single_layers(config: ModelConfig) -> ModelConfig:
    """The model with a layer group for each layer, so that no layer is a part of a larger array.

    XLA on CPUs copies each layer out of a stack before it multiplies with it, which is twice the memory traffic of a
    step of decoding.
    """
    groups = {
        "layer_groups" if config.kind == "decoder" else f"{side}_layer_groups": (1,) * config.side_layers(side)
        for side in config.sides
    }
    return dataclasses.replace(config, **groups)


def unstack_layers(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The model with ``single_layers``. The arrays of stacks are deleted one after the other, so that a model takes
    hardly more memory while it is taken apart."""
    runs = {
        (side, "layers", group): run
        for side in config.sides for group, run in enumerate(layer_groups_of(config, side))
    }  # fmt: skip
    out = []
    for path, variable in nnx.to_flat_state(params):
        run, stacked = runs.get(path[:3], ()), variable.get_value()
        if len(run) < 2:
            out.append(((*path[:2], *run, *path[3:]) if run else path, variable))
            continue
        for row, layer in enumerate(run):
            alone = jax.tree.map(lambda array, row=row: array[row : row + 1], stacked)
            out.append(((*path[:2], layer, *path[3:]), variable.replace(jax.block_until_ready(alone))))
        jax.tree.map(lambda array: array.delete(), stacked)
    return single_layers(config), nnx.from_flat_state(out)
