"""Compression-aware training (``qat`` and ``prune``): the optimizer, the transform of the step, the exported model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.compression.names import load_recipe
from jaxlm.compression.platforms import lower_for_platform
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.schedule import fake_compress, pruning_of
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params, Transform, flatten, unflatten
from jaxlm.training.config import Experiment
from jaxlm.training.optimizers.sparsity import prunable_matrices, sr_ste_decay, with_sparsity

__all__ = ["CompressionAwareTraining"]


class CompressionAwareTraining:
    """The ``qat`` and ``prune`` sections of an experiment, applied to a model.

    Attributes:
        recipe: that of ``qat``, or None.
        transform: what the step applies to the parameters (``step.make_step``), or None.
        complete_at: the first step at which the model is compressed as much as the experiment asks for.

    Raises:
        UserError: when a field is out of range, or the recipe does not fit the model.
    """

    def __init__(self, config: Experiment, like: Params):
        qat, prune, steps = config.qat, config.prune, config.train.steps
        self._config, self._like = config, like
        self._apply = jax.jit(lambda recipe, flat: flatten(recipe.apply(unflatten(like, flat))), static_argnums=0)
        self.recipe: Recipe | None = load_recipe(qat.recipe) if qat.recipe else None
        self.transform: Callable[[jax.Array], Transform] | None = None
        self.complete_at = 0
        self._pruning = pruning_of(self.recipe) if self.recipe else Recipe(())
        if self.recipe:
            if not 0 <= qat.begin < steps:
                raise UserError(f"qat.begin={qat.begin} leaves no steps of train.steps={steps}; begin earlier")
            self.complete_at = qat.begin
            self.transform = fake_compress(self.recipe, qat.begin)
            jax.eval_shape(self.recipe.apply, like)  # does it fit the model?
        if prune.sparsity:
            self._end = prune.end or steps * 3 // 4
            if self._end >= steps:
                raise UserError(f"prune.end={self._end} is not before train.steps={steps}; train longer or end earlier")
            self._pruned = prunable_matrices(prune.target, flatten(like))
            self.complete_at = max(self.complete_at, self._end + 1)

    def optimizer(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """``tx`` with pruned weights kept at zero (``prune``), and with the decay of SR-STE (``qat.decay``).

        Raises:
            UserError: when the optimizer cannot keep zeros.
        """
        qat, prune, name = self._config.qat, self._config.prune, self._config.optim.name
        if prune.sparsity and name not in ("adamw", "lion"):
            raise UserError(f"prune.sparsity keeps zeros in the moments of adamw and lion; use one of them, not {name}")
        if qat.decay and self._pruning.steps:
            tx = optax.chain(sr_ste_decay(self.pruned, qat.decay, qat.begin), tx)
        return with_sparsity(tx, prune, self._end) if prune.sparsity else tx

    def pruned(self, params: dict[str, Any]) -> dict[str, Any]:
        """Flat parameters, dense, with the zeros of the recipe. They compress to the same model as ``params``."""
        return self._apply(self._pruning, params) if self._pruning.steps else params

    @property
    def quantizes(self) -> bool:
        """Whether ``compressed`` gives another model than ``pruned``."""
        return self.recipe is not None and (self.recipe.steps, self.recipe.storage) != (self._pruning.steps, "plain")

    def compressed(self, params: dict[str, Any]) -> dict[str, Any]:
        """Flat parameters as the recipe compresses them."""
        return self._apply(self.recipe, params) if self.recipe else params

    def for_platform(self, params: dict[str, Any]) -> dict[str, Any]:
        """``compressed`` parameters as this platform computes with them, as when a model is loaded."""
        if not self.recipe:
            return params
        return flatten(lower_for_platform(unflatten(self._like, self.compressed(params)), jax.default_backend())[0])

    def report(self, params: dict[str, Any]) -> dict[str, float]:
        """``sparsity``, the share of zeros among the pruned matrices, where the experiment prunes; else nothing."""
        if not self._config.prune.sparsity:
            return {}
        zeros = sum(jnp.count_nonzero(params[path] == 0) for path in self._pruned)
        return {"sparsity": float(zeros) / sum(params[path].size for path in self._pruned)}
