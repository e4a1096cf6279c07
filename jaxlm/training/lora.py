"""Low-rank adapters for training: which parameters get one, how adapters start, and the frozen base under them."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.compression.names import load_recipe
from jaxlm.compression.platforms import to_native_4bit
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.steps import WeightStep, matching
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import LoRA, column_norms, dequantize, is_leaf
from jaxlm.core.tree import Leaf, Params, flatten, map_params, unflatten
from jaxlm.core.untrusted import Pattern
from jaxlm.training.config import Experiment, LoraConfig

__all__ = ["add_adapters", "check_lora", "freeze_base", "remove_adapters"]


def check_lora(config: Experiment) -> None:
    """Checks the ``lora`` section of an experiment.

    Raises:
        UserError: when a field is out of range, or the experiment also sets ``qat`` or ``prune``.
    """
    lora = config.lora
    if lora.rank < 0 or not 0 <= lora.dropout < 1:
        raise UserError(f"lora.rank={lora.rank} must be 1 or more and lora.dropout={lora.dropout} from 0 to below 1")
    if lora.rank and (config.qat.recipe or config.prune.sparsity):
        raise UserError("lora.rank trains adapters on frozen weights, which qat and prune change; set one of them")


def freeze_base(base: str, params: Params, platform: str) -> Params:
    """The frozen weights under adapters, converted one after the other, so that memory never holds all of them twice.

    Args:
        base: ``LoraConfig.base``: a dtype or a recipe. Weights that a recipe does not match, and weights that are
            compressed already, stay as they are.
        params: the model's parameters.
        platform: the JAX platform that computes with them.

    Raises:
        UserError: when the recipe is unknown, or needs more than the weights (compress the model by it first).
    """
    if base in ("float32", "bfloat16"):
        return map_params(lambda _, leaf: leaf if is_leaf(leaf) else _cast(leaf, base), params)
    recipe = load_recipe(base)
    chosen = _chosen(recipe, params)
    leaves = flatten(params)
    for path, leaf in leaves.items():
        if path in chosen:
            steps = tuple(step for step in recipe.steps if Pattern(step.target, "a step's target").fullmatch(path))
            leaves[path] = _compressed(steps, -1 if path.endswith("/table") else -2, leaf, platform)
    return unflatten(params, leaves)


def _chosen(recipe: Recipe, params: Params) -> set[str]:
    """The paths of the dense weights that a recipe compresses."""
    found: set[str] = set()
    for step in recipe.steps:
        if not isinstance(step, WeightStep):
            raise UserError(
                f"lora.base {recipe.name}: {step.kind} needs more than the weights; compress the model by it "
                "(jaxlm compress) and start from that with lora.base float32"
            )
        found |= set(matching(step.target, params))
    flat = flatten(params)
    if done := [path for path in sorted(found) if is_leaf(flat[path])]:
        raise UserError(f"lora.base {recipe.name}: {done[0]} is compressed already; keep it by lora.base float32")
    return found


@partial(jax.jit, static_argnums=(0, 1, 3))
def _compressed(steps: tuple[WeightStep, ...], axis: int, leaf: jax.Array, platform: str) -> Leaf:
    for step in steps:
        leaf = step.weight(leaf, axis)
    return leaf if platform == "cpu" else to_native_4bit(leaf)


def _cast(leaf: jax.Array, dtype: str) -> jax.Array:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def add_adapters(config: LoraConfig, params: Params, key: jax.Array) -> Params:
    """The model with an adapter at each parameter that ``config.target`` matches. Adapters start without an effect:
    ``a`` is uniform in +-1 / sqrt(in), as in PEFT, ``b`` is zero, and magnitudes (DoRA) are those of the base. Works on
    shapes under ``jax.eval_shape``.

    Raises:
        UserError: when the target matches no parameter, or one that is no matrix.
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
    """The model without its adapters."""
    return map_params(lambda _, leaf: leaf.base if isinstance(leaf, LoRA) else leaf, params)
