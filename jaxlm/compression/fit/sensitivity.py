"""What every kernel of a model costs in every way to do it: its size, and how much the loss is to rise.

Each is solved for with the inputs it has in the dense model; ``sensitivity`` tells what its errors cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxlm.compression.calibration import CalibratedLayer, Calibration, LayerParams, solve_layers
from jaxlm.compression.fit.fisher import loss_increase, output_fisher
from jaxlm.compression.fit.mixed_precision import KernelChoice, MixedPrecision, Solver, kernel_name
from jaxlm.compression.input_statistics import observe_inputs, second_moment
from jaxlm.compression.observers import gram
from jaxlm.compression.steps import targets
from jaxlm.core.leaves import dequantize
from jaxlm.core.tree import Leaf, Params

__all__ = ["CANDIDATES", "SPARSITY_CANDIDATES", "Candidate", "Sensitivity", "measure_sensitivity"]

# What is tried of each kernel; groups as wide as it is are the same as group 0. Smaller groups never pay, as scales are
# stored in 32 bits; 2:4 takes the bytes of half the weights chosen freely, and loses more.
CANDIDATES: tuple[dict[str, Any], ...] = (
    *({"bits": bits, "group": group} for bits in (2, 3, 4) for group in (64, 128, 0)),
    *({"bits": bits, "group": group} for bits in (5, 6, 8) for group in (128, 0)),
    {"bits": 4, "group": 128, "sparsity": 0.5},
)
SPARSITY_CANDIDATES: tuple[dict[str, Any], ...] = tuple(
    {"sparsity": share} for share in (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
)
SOLVER = Solver()


@dataclass(frozen=True)
class Candidate:
    """One way to do a kernel: ``choice`` None leaves it dense. ``loss`` is what it is to cost, in nats a token."""

    choice: KernelChoice | None
    size: int
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """All candidates to do each kernel by name, how many weights they have, and how the loss minds errors of theirs."""

    options: dict[str, tuple[Candidate, ...]]
    weights: dict[str, int]
    sensitivity: dict[str, jax.Array]
    solver: Solver


def measure_sensitivity(
    config: Any,
    params: Params,
    calibration: Calibration,
    size: Callable[[Leaf], int],
    solver: Solver = SOLVER,
    candidates: Sequence[Mapping[str, Any]] = CANDIDATES,
) -> Sensitivity:
    """Tries the ``candidates``, fields of a ``KernelChoice``, on each kernel of the blocks; ``size`` is what the budget counts of a
    leaf, such as its bytes when stored."""
    chosen = set(targets(MixedPrecision(()), params))
    minds = iter(output_fisher(config, params, calibration, chosen.__contains__))
    options: dict[str, tuple[Candidate, ...]] = {}
    weights: dict[str, int] = {}
    sensitivity: dict[str, jax.Array] = {}

    def look(block: CalibratedLayer) -> LayerParams:
        readings, mind = observe_inputs(block, gram), next(minds)
        for name in block.targets:
            kernel, called = block.params[name], kernel_name(block.model, block.position, name)
            h = second_moment(block, name, readings[name], "looked at")
            found = [Candidate(None, size(kernel), 0.0)]
            zeros = bool((kernel == 0).any())
            for each in _choices(called, kernel.shape[-2], candidates):
                if each.sparse and zeros:
                    continue
                leaf, _ = solver(kernel, h, each)
                loss = float(loss_increase(dequantize(leaf) - kernel, h, mind[name]))
                found.append(Candidate(each, size(leaf), loss))
            options[called], weights[called], sensitivity[called] = tuple(found), kernel.size, mind[name]
        return block.params

    solve_layers(config, params, calibration, look, chosen.__contains__, [])
    return Sensitivity(options, weights, sensitivity, solver)


def _choices(kernel: str, n_in: int, candidates: Sequence[Mapping[str, Any]]) -> list[KernelChoice]:
    every = (KernelChoice(kernel, **each) for each in candidates)
    return list(dict.fromkeys(dataclasses.replace(each, group=0) if each.group >= n_in else each for each in every))
