"""Models and batches without values: the shapes, dtypes and shardings that a forecast compiles."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxlm import nn
from jaxlm.compression.platforms import lower_for_platform
from jaxlm.compression.recipe import Recipe
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import is_leaf
from jaxlm.core.sharding import batch_sharding, num_batch_shards, override_sharding, spec
from jaxlm.core.tree import Leaf, Params, map_params
from jaxlm.data.batches.buckets import bucket_rows
from jaxlm.data.config import DataConfig
from jaxlm.nn.config import ModelConfig
from jaxlm.training.config import Experiment
from jaxlm.training.lora import add_adapters, freeze_base
from jaxlm.training.setup import with_model

__all__ = [
    "abstract_batch", "abstract_compressed", "abstract_trained", "cache_shardings", "with_shardings", "with_vocab_size",
]

_CACHE_AXES = ("layers", "batch", "kv_heads", None, None, None)  # [L, B, G, beams, slots, K]


def with_vocab_size(config: Experiment) -> ModelConfig:
    """The configuration of the model with the vocabulary size that training takes from the tokenizer.

    Raises:
        UserError: when the size is known only after the tokenizer is loaded.
    """
    config = with_model(config)
    model, data = config.model, config.data
    if model.vocab_size:
        return model
    if data.tokenizer or data.tokenizer_kind != "bpe":
        raise UserError("the vocabulary size is known only once the tokenizer is loaded: set --model.vocab_size N")
    return dataclasses.replace(model, vocab_size=data.vocab_size)


def abstract_batch(config: Experiment, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch with the fields and shapes that the loader makes: arrays [B, T]. For translation data it is a batch of
    the longest bucket.

    Raises:
        UserError: when ``data.batch_size`` is not a multiple of the batch shards times ``train.accumulate``.
    """
    multiple = num_batch_shards(mesh) * config.train.accumulate
    data: DataConfig = config.data
    if config.model.kind == "seq2seq":
        length = max(data.buckets)
        shape, names = (bucket_rows(length, data.batch_tokens, multiple), length), ("src", "inputs", "targets")
    else:
        if data.batch_size % multiple:
            raise UserError(
                f"data.batch_size {data.batch_size} does not divide evenly into {multiple} shards and micro-batches; "
                f"make it a multiple of {multiple}"
            )
        shape, names = (data.batch_size, data.seq_len), ("inputs", "targets")
        packed = data.packing == "documents" or any(f"{form}:" in data.train for form in ("chat", "instruct"))
        names += ("segment_ids", "positions") if packed else ()
    types = dict.fromkeys(names, jnp.int32) | {"weights": jnp.float32}
    layout = batch_sharding(mesh)
    if config.dpo.beta:
        types = {f"{side}_{name}": dtype for side in ("chosen", "rejected") for name, dtype in types.items()}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in types.items()}


def abstract_trained(config: Experiment, platform: str) -> tuple[nnx.GraphDef, Params]:
    """The model that training holds in memory, without values: with the shardings that ``mesh.rules`` override, and for
    LoRA with adapters on a frozen, possibly compressed, base."""
    graphdef, like = nn.abstract(config.model)

    def make(params: Params) -> Params:
        if config.lora.rank:
            params = add_adapters(config.lora, freeze_base(config.lora.base, params, platform), jax.random.key(0))
        return override_sharding(config.mesh.rules)(params)

    return graphdef, jax.eval_shape(make, like)


def with_shardings(tree: Any, layout: Any) -> Any:
    """The abstract arrays of ``tree`` with the shardings of ``layout``, a tree of the same structure."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, layout)


def cache_shardings(cache: Any, mesh: Mesh) -> Any:
    """Shardings for a decoding cache: rows and heads are split like those of activations, all else is replicated."""

    def keys_or_values(x):
        return NamedSharding(mesh, spec(x.shape, _CACHE_AXES[: x.ndim], mesh))

    def per_row(x):
        return NamedSharding(mesh, spec(x.shape, ("batch",) + (None,) * (x.ndim - 1) if x.ndim else (), mesh))

    layout = jax.tree.map(per_row, cache)
    return layout.replace(
        keys=jax.tree.map(keys_or_values, cache.keys), values=jax.tree.map(keys_or_values, cache.values)
    )


def abstract_compressed(recipe: Recipe | None, config: ModelConfig, like: Params, dtype: str, platform: str):
    """Configuration and abstract parameters of the model that a server holds in memory: compressed by a recipe, dense
    weights in ``dtype``, lowered for the platform. Of a calibrated step only the shapes of its result are computed.

    Raises:
        UserError: when the shapes of the result depend on the weights.
    """
    found: dict[str, ModelConfig] = {}

    def make(params: Params) -> Params:
        found["config"] = config
        if recipe is not None:
            steps = (each for step in recipe.steps for each in step.without_data(config))
            result = Recipe(tuple(steps), recipe.storage).run(config, params)
            found["config"], params = result.config, result.params
        params = map_params(lambda path, leaf: _cast(leaf, dtype), params)
        return lower_for_platform(params, platform)[0]

    try:
        abstract = jax.eval_shape(make, like)
    except jax.errors.ConcretizationTypeError:
        raise UserError(
            f"the shapes that recipe {recipe.name} makes depend on the weights; forecast the compressed model instead"
        ) from None
    return found["config"], abstract


def _cast(leaf: Leaf, dtype: str) -> Leaf:
    return leaf.astype(dtype) if not is_leaf(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
