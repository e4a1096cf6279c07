"""Fits a model to a budget: for each kernel the bits, groups and sparsity that together cost the least loss.

What each way to do each kernel costs is measured once for a model (``measure_sensitivity``). Costs add up, so what is best for a
size is a multiple-choice knapsack, solved for all sizes at once: the ``pareto_frontier``. What was chosen
is then solved for anew, in one walk through the model as it is being compressed, by an ordinary step (``mixed``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.compression.calibration import Calibration, layer_params
from jaxlm.compression.fit.fisher import loss_increase
from jaxlm.compression.fit.mixed_precision import KernelChoice, MixedPrecision, kernel_name
from jaxlm.compression.fit.sensitivity import Candidate, Sensitivity
from jaxlm.compression.layer_groups import join
from jaxlm.compression.prune.scores import magnitude, n_of_m
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.compression.recipe import Compressed, Recipe
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import dequantize, dequantize_tree
from jaxlm.core.tree import Leaf, Params

__all__ = ["Budget", "Fit", "Fitted", "FittedKernel", "LossTarget", "ParetoFrontier", "pareto_frontier"]

Weigh = Callable[[Any, Params], int]  # (config, params) -> size

_POINTS = 1 << 13  # of a pareto_frontier
_ATTEMPTS = 4  # to meet a budget that is known only when all is done
_MODELS = 8  # to try for a loss
_CLOSE = 0.002  # models whose kernels differ by less in size need not be told apart


@dataclass(frozen=True)
class Budget:
    """So many ``bits`` for each weight of the kernels, scales and zero points included; or ``bytes`` of all weights on
    disk, embeddings and head too; or the share of the kernels' weights that are ``zeros``."""

    bits: float = 0.0
    bytes: int = 0
    zeros: float = 0.0

    @staticmethod
    def parse(text: str) -> Budget:
        """``3.2bits``, ``900MiB`` (B, kB, MB, GB, KiB, MiB, GiB), or ``70%zeros``."""
        powers = {"": 0, "k": 1, "m": 2, "g": 3}
        if found := re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(bits?|([kmg]?)(i?)b)", text.strip(), re.IGNORECASE):
            number, unit, power, binary = found.groups()
            if float(number) > 0 and unit.lower().startswith("bit"):
                return Budget(bits=float(number))
            if float(number) > 0 and not (binary and not power):
                return Budget(bytes=int(float(number) * (1024 if binary else 1000) ** powers[power.lower()]))
        found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*%\s*zeros?", text.strip(), re.IGNORECASE)
        if found and 0 < float(found[1]) < 100:
            return Budget(zeros=float(found[1]) / 100)
        raise UserError(
            f"cannot fit to {text!r}; give bits a weight as 3.2bits, the size of the weights as 900MiB, or 70%zeros"
        )

    def limit(self, weights: int) -> int:
        """Bytes, or weights that are not zero, given how many weights there are."""
        if self.zeros:
            return round((1 - self.zeros) * weights)
        return int(self.bits * weights / 8) if self.bits else self.bytes

    def tell(self, size: int, weights: int) -> str:
        """A size in the terms of this budget."""
        if self.zeros:
            return f"{1 - size / weights:.2%} zeros"
        return f"{8 * size / weights:.4g} bits a weight" if self.bits else f"{size:,} bytes"


@dataclass(frozen=True)
class LossTarget:
    """A perplexity to keep: so much, or by the share ``more`` above that of the dense model."""

    perplexity: float = 0.0
    more: float = 0.0

    @staticmethod
    def parse(text: str) -> LossTarget:
        """``46.5`` or ``+1%``."""
        if found := re.fullmatch(r"(\+?)(\d+(?:\.\d+)?|\.\d+)(%?)", text.strip()):
            sign, number, percent = found.groups()
            if sign and percent and float(number) > 0:
                return LossTarget(more=float(number) / 100)
            if not sign and not percent and float(number) > 1:
                return LossTarget(perplexity=float(number))
        raise UserError(f"cannot keep to a perplexity of {text!r}; give one as 46.5, or above the dense model's as +1%")

    def limit(self, dense: float) -> float:
        """The loss, given that of the dense model; UserError where that is not enough."""
        most = math.log(self.perplexity) if self.perplexity else dense + math.log1p(self.more)
        if most < dense:
            raise UserError(
                f"a perplexity of {self.perplexity:g} is less than the {math.exp(dense):.4f} of the dense model on the "
                "part of the calibration data that is kept to judge by"
            )
        return most


@dataclass(frozen=True)
class ParetoFrontier:
    """The least loss for every size, of several things with options each: points of rising ``size`` and falling
    ``loss``, ``[points]``. ``picks`` are the options they consist of, ``[points, things]``."""

    size: np.ndarray
    loss: np.ndarray
    picks: np.ndarray

    def within(self, most: float) -> int | None:
        """The number of the best point of at most this size; None where there is none."""
        at = int(np.searchsorted(self.size, most, side="right")) - 1
        return at if at >= 0 else None


def pareto_frontier(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], points: int = _POINTS) -> ParetoFrontier:
    """Of things whose options have these sizes and losses, the best choices for all budgets.

    Exact while there are no more than ``points`` of them. Beyond, of those whose sizes are within one part in
    ``points`` of the whole range, on a logarithmic scale, only the best one is kept, and the smallest of all.
    """
    total, loss, picks = np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int16)
    for size, cost in zip(sizes, losses, strict=True):
        size, cost = np.asarray(size, np.int64), np.asarray(cost, np.float64)
        useful = _useful(size, cost)
        sums = np.add.outer(total, size[useful]).ravel()
        costs = np.add.outer(loss, cost[useful]).ravel()
        order = _useful(sums, costs)
        if len(order) > points:
            scale = np.log(sums[order] / sums[order[0]])
            slot = np.ceil(scale * ((points - 1) / scale[-1])).astype(np.int64)
            order = order[np.concatenate([slot[1:] != slot[:-1], [True]])]
        total, loss = sums[order], costs[order]
        picks = np.column_stack([picks[order // len(useful)], useful[order % len(useful)].astype(np.int16)])
    return ParetoFrontier(total, loss, picks)


def _useful(size: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """The numbers of those that are better than all smaller ones, by size."""
    order = np.lexsort((cost, size))
    least = np.minimum.accumulate(cost[order])
    return order[np.concatenate([[True], least[1:] < least[:-1]])]


@dataclass(frozen=True)
class FittedKernel:
    """What was chosen for a kernel, None: to leave it dense. Its costs are in nats a token: ``predicted`` in the dense
    model, ``final`` with the inputs it has in the compressed one."""

    choice: KernelChoice | None
    kernel: str
    size: int
    predicted: float
    final: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Fitted:
    """A model that fits, the recipe that made it and will make it again, and a row for each kernel."""

    recipe: Recipe
    model: Compressed
    rows: tuple[FittedKernel, ...]


@dataclass(frozen=True)
class Fit:
    """The best models of all sizes, of which to make one.

    Attributes:
        config, params, calibration: the dense model, and the data that kernels are solved with.
        seen: its measure_sensitivity.
        size: of a leaf: its bytes when stored as ``storage`` says, or its weights that are not zero.
        name: of the recipes.
    """

    config: Any
    params: Params
    calibration: Calibration
    seen: Sensitivity
    size: Callable[[Leaf], int]
    storage: str = "plain"
    name: str = "fit"

    @functools.cached_property
    def frontier(self) -> ParetoFrontier:
        every = self.seen.options.values()
        return pareto_frontier(
            [[each.size for each in some] for some in every], [[each.loss for each in some] for some in every]
        )

    def options(self, at: int) -> dict[str, Candidate]:
        """What the point ``at`` of the pareto_frontier consists of, by kernel."""
        picks = zip(self.seen.options.items(), self.frontier.picks[at], strict=True)
        return {name: options[pick] for (name, options), pick in picks}

    def within(self, budget: Budget, weigh: Weigh) -> Fitted:
        """The model of least loss that ``weigh`` says is within the budget.

        UserError where there is none, which says what is the least possible.
        """
        weights = sum(self.seen.weights.values())
        limit = budget.limit(weights)
        beside = self._beside(0, weigh)
        if (at := self.frontier.within(limit - beside)) is None:
            least = budget.tell(beside + int(self.frontier.size[0]), weights)
            raise UserError(f"nothing fits into {budget.tell(limit, weights)}; the least possible is {least}")
        for _ in range(_ATTEMPTS):  # headers and layer groups depend on the choice
            closer = self.frontier.within(limit - self._beside(at, weigh))
            if closer in (at, None):
                break
            at = closer
        for _ in range(_ATTEMPTS):
            done = self.run(at)
            weight = weigh(done.model.config, done.model.params)
            if weight <= limit:
                return done
            closer = self.frontier.within(int(self.frontier.size[at]) - (weight - limit))
            if closer is None:
                break
            at = closer
        raise UserError(f"nothing tried fits into {budget.tell(limit, weights)}; try {budget.tell(weight, weights)}")

    def within_loss(self, target: LossTarget, loss: Callable[[Params], float]) -> Fitted:
        """The smallest model found whose ``loss`` (of parameters as dense as those given, nats a token) is on target.

        The pareto_frontier predicts which one that is; the losses measured correct the prediction, and what is too bad and what
        is good enough close in on each other.
        """
        dense = loss(self.params)
        most = target.limit(dense)
        points, low, high, best, ratio = self.frontier, -1, len(self.frontier.size) - 1, None, 1.0
        for _ in range(_MODELS):
            at = int(np.searchsorted(-points.loss, -(most - dense) / ratio))
            at = at if low < at < high else (low + high) // 2
            if not low < at < high:
                break
            done = self.run(at)
            rise = loss(self.expand(done.model)) - dense
            if rise <= most - dense:
                high, best = at, done
            else:
                low = at
            ratio = max(rise, 1e-9) / float(points.loss[at])
            if low >= 0 and points.size[high] - points.size[low] <= _CLOSE * points.size[high]:
                break
        return self.run(high) if best is None else best

    def run(self, at: int) -> Fitted:
        """The model at the point ``at`` of the pareto_frontier."""
        options, rows, notes = self.options(at), {}, []
        choices = tuple(each.choice for each in options.values() if each.choice)
        step = MixedPrecision(choices, **dataclasses.asdict(self.seen.solver))

        def found(kernel: str, h_IxI: jax.Array, dense: jax.Array, leaf: Leaf) -> None:
            loss = loss_increase(dequantize(leaf) - dense, h_IxI, self.seen.sensitivity[kernel])
            rows[kernel] = FittedKernel(options[kernel].choice, kernel, self.size(leaf), options[kernel].loss, float(loss))

        config, params = self.config, self.params
        if choices:
            config, params = step(config, params, self.calibration, notes, found)
        rows = [rows.get(name, FittedKernel(None, name, each.size, 0.0, 0.0)) for name, each in options.items()]
        recipe = Recipe((step,) if choices else (), self.storage, self.name)
        return Fitted(recipe, Compressed(config, params, tuple(notes)), tuple(rows))

    def _beside(self, at: int, weigh: Weigh) -> int:
        """The size beside that of the kernels each by itself, told from kernels of the same kinds, merely rounded."""
        walk, options, layers, alone = self.calibration.layerwise(self.config), self.options(at), [], 0
        for place in walk.layer_positions():
            layer = layer_params(self.params, place)
            for name in layer:
                if option := options.get(kernel_name(walk, place, name)):
                    layer[name] = _rounded(layer[name], option.choice)
                    alone += self.size(layer[name])
            layers.append((place, layer))
        return weigh(*join(self.config, self.params, layers)) - alone

    def expand(self, model: Compressed) -> Params:
        """A model's parameters dense, and in the layer groups of the model at first: one compiled program does for all."""
        places = self.calibration.layerwise(self.config).layer_positions()
        walk, params = self.calibration.layerwise(model.config), dequantize_tree(model.params)
        layers = [(old, layer_params(params, new)) for old, new in zip(places, walk.layer_positions(), strict=True)]
        return join(self.config, self.params, layers)[1]


def _rounded(kernel_IxO: jax.Array, choice: KernelChoice | None) -> Leaf:
    if choice is None:
        return kernel_IxO
    if choice.m:
        kernel_IxO = n_of_m(kernel_IxO, n=choice.n, m=choice.m)
    elif choice.sparsity:
        kernel_IxO = magnitude(kernel_IxO, sparsity=choice.sparsity)
    return quantize(kernel_IxO, bits=choice.bits, group=choice.group, symmetric=False) if choice.bits else kernel_IxO
