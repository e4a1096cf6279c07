"""Low-rank adapters to train: where they are, how they start, and what they stand on."""

from __future__ import annotations

import math
import re
from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.compression.names import load_recipe
from jaxlm.compression.platforms import narrow
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.steps import WeightStep, matching
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import LoRA, column_norms, dequantize, is_leaf
from jaxlm.core.tree import Leaf, Params, flatten, map_params, unflatten
from jaxlm.training.config import Experiment, LoraConfig

__all__ = ["add_adapters", "check_lora", "freeze_base", "remove_adapters"]


def check_lora(config: Experiment) -> None:
    """UserError on settings of ``lora`` that make no sense, or go with nothing else in the experiment."""
    lora = config.lora
    if lora.rank < 0 or not 0 <= lora.dropout < 1:
        raise UserError(f"lora.rank={lora.rank}, lora.dropout={lora.dropout}: a rank of 1 or more, a dropout below 1")
    if lora.rank and (config.qat.recipe or config.prune.sparsity):
        raise UserError("adapters are trained on frozen weights, which qat and prune would change; leave out either")


def freeze_base(base: str, params: Params, platform: str) -> Params:
    """Weights as ``base`` says (``LoraConfig.base``) and as ``platform`` holds them, one after the other: never are
    all of them there twice. What a recipe leaves, and what is compressed already, stays as it is.

    UserError on a recipe that there is not, or that needs more than the weights: compress with that first.
    """
    if base in ("float32", "bfloat16"):
        return map_params(lambda _, leaf: leaf if is_leaf(leaf) else _cast(leaf, base), params)
    recipe = load_recipe(base)
    chosen = _chosen(recipe, params)
    leaves = flatten(params)
    for path, leaf in leaves.items():
        if path in chosen:
            leaves[path] = _compressed(recipe, path, leaf, platform)
    return unflatten(params, leaves)


def _chosen(recipe: Recipe, params: Params) -> set[str]:
    """The dense weights that a recipe compresses."""
    found: set[str] = set()
    for step in recipe.steps:
        if not isinstance(step, WeightStep):
            raise UserError(
                f"lora.base {recipe.name}: {step.kind} needs more than the weights; `jaxlm compress` the model by "
                "it, and start from that with lora.base float32"
            )
        found |= set(matching(step.target, params))
    flat = flatten(params)
    if done := [path for path in sorted(found) if is_leaf(flat[path])]:
        raise UserError(f"lora.base {recipe.name}: {done[0]} is compressed already; leave it so by float32")
    return found


@partial(jax.jit, static_argnums=(0, 1, 3))
def _compressed(recipe: Recipe, path: str, leaf: jax.Array, platform: str) -> Leaf:
    for step in recipe.steps:
        if re.fullmatch(step.target, path):
            leaf = step.weight(leaf, -1 if path.endswith("/table") else -2)
    return leaf if platform == "cpu" else narrow(leaf)


def _cast(leaf: jax.Array, dtype: str) -> jax.Array:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def add_adapters(config: LoraConfig, params: Params, key: jax.Array) -> Params:
    """The model with an adapter, which changes nothing yet, at each of the targets: ``a`` uniform in +-1 / sqrt(in), as
    PEFT starts it, ``b`` zero, magnitudes those of the base. Shapes alone will do, under ``jax.eval_shape``.

    UserError where the target matches nothing, or what is no matrix.
    """
    found = matching(config.target, params)
    if not found:
        raise UserError(f"lora.target {config.target!r} matches no parameter; see `jaxlm inspect` for their paths")
    for path in found:
        if not path.endswith(("/kernel", "/table")):
            raise UserError(f"lora.target matches {path}; only kernels and tables have adapters")
    scale = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
    number = {path: index for index, path in enumerate(found)}

    def of_leaf(path: str, leaf: Leaf) -> Leaf:
        if path not in number:
            return leaf
        *lead, n_in, n_out = leaf.shape
        bound = n_in**-0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, number[path]), (*lead, n_in, config.rank), jnp.float32, -bound, bound
        )
        magnitude = _norms(leaf) if config.dora else None
        zeros = jnp.zeros((*lead, config.rank, n_out))
        return LoRA(leaf, a, zeros, jnp.full((*lead, 1, 1), scale), magnitude, dropout=config.dropout)

    return map_params(of_leaf, params)


@jax.jit
def _norms(leaf: Leaf) -> jax.Array:
    return column_norms(dequantize(leaf, jnp.float32))


def remove_adapters(params: Params) -> Params:
    """The model as it was before."""
    return map_params(lambda _, leaf: leaf.base if isinstance(leaf, LoRA) else leaf, params)
