"""Fits a model to a budget: for each kernel the bits, group and sparsity that together cost the least loss.

What each candidate for each kernel costs is measured once for a model (``sensitivity``). Losses and sizes add up, so
``frontier`` finds the best choices for all sizes at once. Those for the budget are then solved for anew, layer by layer
in the model as it is being compressed, by an ordinary step (``mixed_precision``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint.storage import PackedWeights
from jaxlm.compression.calibration import Calibration, layer_params
from jaxlm.compression.fit.budget import Budget, LossTarget
from jaxlm.compression.fit.fisher import loss_increase
from jaxlm.compression.fit.frontier import ParetoFrontier, pareto_frontier
from jaxlm.compression.fit.kernel_solver import KernelChoice
from jaxlm.compression.fit.mixed_precision import MixedPrecision, SolvedKernels, kernel_name
from jaxlm.compression.fit.sensitivity import Candidate, Sensitivity
from jaxlm.compression.layer_groups import join
from jaxlm.compression.prune.scores import magnitude, n_of_m
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.compression.recipe import Compressed, Recipe
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import dequantize, dequantize_tree
from jaxlm.core.tree import Leaf, Params

__all__ = ["BudgetSearch", "FittedKernel", "FittedModel"]

MeasureSize = Callable[[Any, Params, PackedWeights], int]  # (config, params, the same packed) -> size

_ATTEMPTS = 4  # to meet a budget, as the size is known only of a finished model
_MODELS = 8  # to try for a loss
_CLOSE = 0.002  # models whose kernels differ by less in size need not be told apart


@dataclass(frozen=True)
class FittedKernel:
    """What was chosen for a kernel; None leaves it dense.

    Attributes:
        size: as the budget counts it.
        predicted: the loss that it adds in the dense model, in nats a token.
        final: the same with the inputs that it has in the compressed model.
    """

    choice: KernelChoice | None
    kernel: str
    size: int
    predicted: float
    final: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class FittedModel:
    """A model that fits, as it is stored, the recipe that made it and will make it again, and what each kernel got."""

    recipe: Recipe
    model: Compressed
    packed: PackedWeights
    kernels: tuple[FittedKernel, ...]


@dataclass(frozen=True)
class BudgetSearch:
    """Finds the best model for a budget.

    Attributes:
        config, params, calibration: the dense model, and the data that kernels are solved for with.
        sensitivity: what the candidates for each kernel cost.
        size: of a leaf: its bytes when stored as ``storage`` says, or its weights that are not zero.
        name: of the recipes.
    """

    config: Any
    params: Params
    calibration: Calibration
    sensitivity: Sensitivity
    size: Callable[[Leaf], int]
    storage: str = "plain"
    name: str = "fit"

    @functools.cached_property
    def frontier(self) -> ParetoFrontier:
        every = self.sensitivity.candidates.values()
        return pareto_frontier(
            [[each.size for each in some] for some in every], [[each.loss for each in some] for some in every]
        )

    @functools.cached_property
    def _solved(self) -> SolvedKernels:
        def loss(kernel: str, h_IxI: jax.Array, dense: jax.Array, leaf: Leaf) -> float:
            return float(loss_increase(dequantize(leaf) - dense, h_IxI, self.sensitivity.fisher[kernel]))

        return SolvedKernels(loss)

    def picked(self, point: int) -> dict[str, Candidate]:
        """What a point of the frontier consists of, by kernel."""
        picks = zip(self.sensitivity.candidates.items(), self.frontier.picks[point], strict=True)
        return {name: candidates[pick] for (name, candidates), pick in picks}

    def within(self, budget: Budget, measure: MeasureSize) -> FittedModel:
        """The model of the least loss whose size, as ``measure`` tells it, is within the budget.

        Raises:
            UserError: there is none; the message says what is the least possible.
        """
        weights = sum(self.sensitivity.weights.values())
        limit = budget.limit(weights)
        overhead = self._overhead(0, measure)
        if (point := self.frontier.within(limit - overhead)) is None:
            least = budget.describe(overhead + int(self.frontier.size[0]), weights)
            raise UserError(f"nothing fits into {budget.describe(limit, weights)}; the least possible is {least}")
        for _ in range(_ATTEMPTS):  # headers and layer groups depend on the choice
            closer = self.frontier.within(limit - self._overhead(point, measure))
            if closer in (point, None):
                break
            point = closer
        for _ in range(_ATTEMPTS):
            fitted = self.run(point)
            size = measure(fitted.model.config, fitted.model.params, fitted.packed)
            if size <= limit:
                return fitted
            closer = self.frontier.within(int(self.frontier.size[point]) - (size - limit))
            if closer is None:
                break
            point = closer
        raise UserError(
            f"nothing tried fits into {budget.describe(limit, weights)}; try {budget.describe(size, weights)}"
        )

    def within_loss(self, target: LossTarget, loss: Callable[[Params], float]) -> FittedModel:
        """The smallest model found whose ``loss`` is on target.

        The frontier predicts which one that is. The losses measured correct the prediction, and the largest point that
        is too bad and the smallest that is good enough close in on each other.

        Args:
            loss: in nats a token, of parameters as dense as those given.
        """
        dense = loss(self.params)
        most = target.limit(dense)
        points, low, high, best, ratio = self.frontier, -1, len(self.frontier.size) - 1, None, 1.0
        for _ in range(_MODELS):
            point = int(np.searchsorted(-points.loss, -(most - dense) / ratio))
            point = point if low < point < high else (low + high) // 2
            if not low < point < high:
                break
            fitted = self.run(point)
            rise = loss(self.expand(fitted.model)) - dense
            if rise <= most - dense:
                high, best = point, fitted
            else:
                low = point
            ratio = max(rise, 1e-9) / float(points.loss[point])
            if low >= 0 and points.size[high] - points.size[low] <= _CLOSE * points.size[high]:
                break
        return self.run(high) if best is None else best

    def run(self, point: int) -> FittedModel:
        """The model at a point of the frontier."""
        picked, notes = self.picked(point), []
        choices = tuple(each.choice for each in picked.values() if each.choice)
        step = MixedPrecision(choices, **dataclasses.asdict(self.sensitivity.solver))
        config, params = self.config, self.params
        if choices:
            config, params = step(config, params, self.calibration, notes, self._solved)
        kernels = []
        for name, each in picked.items():
            size, final = each.size, 0.0
            if each.choice:
                leaf, final = self._solved.final[name]
                size = self.size(leaf)
            kernels.append(FittedKernel(each.choice, name, size, each.loss if each.choice else 0.0, final))
        recipe = Recipe((step,) if choices else (), self.storage, self.name)
        packed = PackedWeights(params, self.storage)
        return FittedModel(recipe, Compressed(config, params, tuple(notes)), packed, tuple(kernels))

    def _overhead(self, point: int, measure: MeasureSize) -> int:
        """The size beside the sizes of the single kernels, told from kernels that are merely rounded alike."""
        layerwise, picked, layers, kernels = self.calibration.layerwise(self.config), self.picked(point), [], 0
        for position in layerwise.layer_positions():
            layer = layer_params(self.params, position)
            for name in layer:
                if candidate := picked.get(kernel_name(layerwise, position, name)):
                    layer[name] = _rounded(layer[name], candidate.choice)
                    kernels += self.size(layer[name])
            layers.append((position, layer))
        config, params = join(self.config, self.params, layers)
        return measure(config, params, PackedWeights(params, self.storage)) - kernels

    def expand(self, model: Compressed) -> Params:
        """The parameters of a model dense, in the layer groups of the dense model: one program serves all models."""
        before = self.calibration.layerwise(self.config).layer_positions()
        after, params = self.calibration.layerwise(model.config).layer_positions(), dequantize_tree(model.params)
        layers = [(old, layer_params(params, new)) for old, new in zip(before, after, strict=True)]
        return join(self.config, self.params, layers)[1]


def _rounded(kernel_IxO: jax.Array, choice: KernelChoice | None) -> Leaf:
    """A kernel as a choice represents it, without solving for it."""
    if choice is None:
        return kernel_IxO
    if choice.m:
        kernel_IxO = n_of_m(kernel_IxO, n=choice.n, m=choice.m)
    elif choice.sparsity:
        kernel_IxO = magnitude(kernel_IxO, sparsity=choice.sparsity)
    return quantize(kernel_IxO, bits=choice.bits, group=choice.group, symmetric=False) if choice.bits else kernel_IxO
