"""Models without weights: what a forecast compiles, as shapes, types and layouts."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxlm import nn
from jaxlm.compression.fit.mixed_precision import Mixed
from jaxlm.compression.low_rank import rank_for
from jaxlm.compression.platforms import place
from jaxlm.compression.quantize.activations import Smooth, Static
from jaxlm.compression.quantize.autoround import AutoRound
from jaxlm.compression.quantize.awq import Awq
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.reshape import Factor, Rotate
from jaxlm.compression.solvers import Gptq, SparseGpt, Wanda
from jaxlm.compression.steps import Float8, Quantize, Step, WeightStep
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import LowRank, is_leaf
from jaxlm.core.sharding import batch_sharding, batch_ways, override_sharding, spec
from jaxlm.core.tree import Leaf, Params, map_params
from jaxlm.data.batches.buckets import bucket_rows
from jaxlm.data.config import DataConfig
from jaxlm.nn.config import ModelConfig
from jaxlm.training.config import Experiment
from jaxlm.training.lora import adapt, freeze
from jaxlm.training.setup import with_model

__all__ = ["cache_layout", "complete_model", "compressed", "train_batch", "trained_model", "with_layout"]

_CACHE_AXES = ("layers", "batch", "kv_heads", None, None, None)  # [L, B, G, beams, slots, K]


def complete_model(config: Experiment) -> ModelConfig:
    """The model with its vocabulary, which training takes from the tokenizer. UserError where only that knows it."""
    config = with_model(config)
    model, data = config.model, config.data
    if model.vocab_size:
        return model
    if data.tokenizer or data.tokenizer_kind != "bpe":
        raise UserError("the vocabulary's size is known only with the tokenizer; give it: --model.vocab_size N")
    return dataclasses.replace(model, vocab_size=data.vocab_size)


def train_batch(config: Experiment, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the loader makes it; of translation data the one of the longest bucket."""
    multiple = batch_ways(mesh) * config.train.accumulate
    data: DataConfig = config.data
    if config.model.kind == "seq2seq":
        length = max(data.buckets)
        shape, names = (bucket_rows(length, data.batch_tokens, multiple), length), ("src", "inputs", "targets")
    else:
        if data.batch_size % multiple:
            raise UserError(
                f"data.batch_size {data.batch_size} cannot be shared evenly by {multiple} devices or micro-batches; "
                "make it a multiple"
            )
        shape, names = (data.batch_size, data.seq_len), ("inputs", "targets")
        packed = data.packing == "documents" or any(f"{form}:" in data.train for form in ("chat", "instruct"))
        names += ("segment_ids", "positions") if packed else ()
    types = dict.fromkeys(names, jnp.int32) | {"weights": jnp.float32}
    layout = batch_sharding(mesh)
    if config.dpo.beta:
        types = {f"{side}_{name}": dtype for side in ("chosen", "rejected") for name, dtype in types.items()}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in types.items()}


def trained_model(config: Experiment, platform: str) -> tuple[nnx.GraphDef, Params]:
    """The model of an experiment as its training holds it, abstract: relocated, with adapters on a compressed base."""
    graphdef, like = nn.abstract(config.model)

    def make(params: Params) -> Params:
        if config.lora.rank:
            params = adapt(config.lora, freeze(config.lora.base, params, platform), jax.random.key(0))
        return override_sharding(config.mesh.rules)(params)

    return graphdef, jax.eval_shape(make, like)


def with_layout(tree: Any, layout: Any) -> Any:
    """Abstract arrays with the shardings of a tree of the same structure."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, layout)


def cache_layout(cache: Any, mesh: Mesh) -> Any:
    """Shardings for a decoding cache: rows and heads are split as those of activations, the rest is on every device."""

    def of_kept(x):
        return NamedSharding(mesh, spec(x.shape, _CACHE_AXES[: x.ndim], mesh))

    def of_rows(x):
        return NamedSharding(mesh, spec(x.shape, ("batch",) + (None,) * (x.ndim - 1) if x.ndim else (), mesh))

    layout = jax.tree.map(of_rows, cache)
    return layout.replace(keys=jax.tree.map(of_kept, cache.keys), values=jax.tree.map(of_kept, cache.values))


def compressed(recipe: Recipe | None, config: ModelConfig, like: Params, dtype: str, platform: str):
    """Configuration and abstract parameters of a model as a server holds it: compressed by a recipe, the rest in
    ``dtype``, placed for the platform. A calibrated step counts by the shape of its result. UserError where that
    depends on data."""
    found: dict[str, ModelConfig] = {}

    def make(params: Params) -> Params:
        found["config"] = config
        if recipe is not None:
            steps = (each for step in recipe.steps for each in _without_data(step, config.tie_embeddings))
            result = Recipe(tuple(steps), recipe.storage).run(config, params)
            found["config"], params = result.config, result.params
        params = map_params(lambda path, leaf: _cast(leaf, dtype), params)
        return place(params, platform)[0]

    try:
        abstract = jax.eval_shape(make, like)
    except jax.errors.ConcretizationTypeError:
        raise UserError(f"what recipe {recipe.name} makes depends on the weights; forecast the model it made") from None
    return found["config"], abstract


def _cast(leaf: Leaf, dtype: str) -> Leaf:
    return leaf.astype(dtype) if not is_leaf(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _without_data(step: Step, tied: bool) -> tuple[Step, ...]:
    """Steps that give leaves of the same shapes without calibration."""
    match step:
        case Gptq() | Awq() | AutoRound():
            return (Quantize(step.bits, step.group, step.symmetric, target=step.target),)
        case SparseGpt(bits=bits) if bits:
            return (Quantize(bits, step.group, step.symmetric, target=step.target),)
        case SparseGpt() | Wanda() | Smooth():
            return ()
        case Static(format="int8"):
            return (Quantize(8, symmetric=True, act_bits=8, target=step.target),)
        case Static():
            return (Float8(target=step.target),)
        case Factor():
            return (_Factors(step.share, step.target),)
        case Rotate() if not tied:  # else the head may become one of its own
            return ()
        case Mixed():
            raise UserError("a recipe fitted to a budget chose for one model; give a recipe by name")
    return (step,)


@dataclasses.dataclass(frozen=True)
class _Factors(WeightStep):
    """Two factors of the rank that ``Factor`` takes."""

    kind: ClassVar[str] = "factors"
    share: float
    target: str

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        rank = rank_for(dense.shape, self.share)
        return LowRank(dense[..., :rank], dense[..., :rank, :])
