"""The sensitivity of the loss to each kernel: what every candidate for it takes in size, and adds to the loss.

Each candidate is solved for with the inputs that the kernel has in the dense model; ``fisher`` tells what its errors
cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxlm.compression.calibration import CalibratedLayer, Calibration, LayerParams, layer_params, solve_layers
from jaxlm.compression.fit.fisher import LayerStatistics, layer_statistics, loss_increase
from jaxlm.compression.fit.kernel_solver import KernelChoice, Solver
from jaxlm.compression.fit.mixed_precision import MixedPrecision, kernel_name
from jaxlm.compression.input_statistics import group_by_input, observe_inputs, second_moment
from jaxlm.compression.observers import gram
from jaxlm.compression.steps import targets
from jaxlm.core.leaves import QArray, dequantize
from jaxlm.core.tree import Leaf, Params

__all__ = ["CANDIDATES", "SPARSITY_CANDIDATES", "Candidate", "Sensitivity", "measure_sensitivity"]

# What is tried for each kernel. A group as wide as the kernel is the same as group 0. Smaller groups never pay, as
# scales are stored in 32 bits; 2:4 takes the bytes of half the weights chosen freely, and loses more.
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
    """One way to treat a kernel; the choice None leaves it dense.

    Attributes:
        size: as the budget counts it.
        loss: what it is to add to the loss, in nats a token.
    """

    choice: KernelChoice | None
    size: int
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """What the candidates for each kernel cost.

    Attributes:
        candidates: for each kernel by name.
        weights: the number of each kernel's weights.
        fisher: the Fisher information of each kernel's outputs (``fisher.LayerStatistics``).
        solver: what solved for the candidates.
    """

    candidates: dict[str, tuple[Candidate, ...]]
    weights: dict[str, int]
    fisher: dict[str, jax.Array]
    solver: Solver


def measure_sensitivity(
    config: Any,
    params: Params,
    calibration: Calibration,
    size: Callable[[Leaf], int],
    solver: Solver = SOLVER,
    candidates: Sequence[Mapping[str, Any]] = CANDIDATES,
) -> Sensitivity:
    """Tries candidates on each kernel of the blocks.

    Args:
        config, params, calibration: the dense model, and data.
        size: of a leaf as the budget counts it, such as its bytes when stored.
        candidates: fields of a ``KernelChoice``.
    """
    chosen = set(targets(MixedPrecision(()), params))
    found = Sensitivity({}, {}, {}, solver)
    statistics = layer_statistics(config, params, calibration, chosen.__contains__)
    waiting = iter([each for each in statistics if each.fisher])

    def examine(layer: CalibratedLayer) -> LayerParams:
        _examine(layer, next(waiting), candidates, size, found)
        return layer.params

    if any(each.inputs is None for each in statistics):
        solve_layers(config, params, calibration, examine, chosen.__contains__, [])
        return found
    model = calibration.layerwise(config)
    positions = list(model.layer_positions())
    for done, position in enumerate(positions, 1):
        each = layer_params(params, position)
        names = tuple(name for name in each if position.prefix + name in chosen)
        if names:
            examine(CalibratedLayer(model, params, position, each, names, (), ()))
        if calibration.progress is not None:
            calibration.progress(calibration.task, done, len(positions))
    return found


def _examine(
    layer: CalibratedLayer, statistics: LayerStatistics, candidates: Sequence[Mapping[str, Any]],
    size: Callable[[Leaf], int], found: Sensitivity,
) -> None:
    """Tries the candidates for the kernels of one layer, and adds what they cost to ``found``."""
    inputs = observe_inputs(layer, gram) if statistics.inputs is None else statistics.inputs
    of_layer = {}
    for names in group_by_input(layer.targets):
        kernels = {name: layer.params[name] for name in names}
        h_IxI = second_moment(layer, names[0], inputs[names[0]], "measured")
        choices = {
            name: _choices(kernel_name(layer.model, layer.position, name), kernel, candidates)
            for name, kernel in kernels.items()
        }
        solved = found.solver(kernels, h_IxI, choices)
        for name, kernel in kernels.items():
            losses = [_added_loss(leaf, kernel, h_IxI, statistics.fisher[name]) for leaf, _ in solved[name]]
            of_layer[name] = [Candidate(None, size(kernel), 0.0)] + [
                Candidate(choice, size(leaf), float(loss))
                for choice, (leaf, _), loss in zip(choices[name], solved[name], losses, strict=True)
            ]
    for name in layer.targets:
        kernel = kernel_name(layer.model, layer.position, name)
        found.candidates[kernel] = tuple(of_layer[name])
        found.weights[kernel] = layer.params[name].size
        found.fisher[kernel] = statistics.fisher[name]


def _added_loss(leaf: Leaf, kernel_IxO: jax.Array, h_IxI: jax.Array, fisher_O: jax.Array) -> jax.Array:
    """What a compressed kernel adds to the loss, in nats a token."""
    if isinstance(leaf, QArray):
        leaf = dataclasses.replace(leaf, bits=8)  # no part of the values: one program serves all numbers of bits
    return _loss_of(leaf, kernel_IxO, h_IxI, fisher_O)


@jax.jit
def _loss_of(leaf: Leaf, kernel_IxO: jax.Array, h_IxI: jax.Array, fisher_O: jax.Array) -> jax.Array:
    return loss_increase(dequantize(leaf) - kernel_IxO, h_IxI, fisher_O)


def _choices(name: str, kernel_IxO: jax.Array, candidates: Sequence[Mapping[str, Any]]) -> list[KernelChoice]:
    """The candidates that differ for a kernel. One that has zeros already is not pruned."""
    n_in, zeros = kernel_IxO.shape[-2], bool((kernel_IxO == 0).any())
    every = (KernelChoice(name, **each) for each in candidates)
    every = (dataclasses.replace(each, group=0) if each.group >= n_in else each for each in every)
    return [each for each in dict.fromkeys(every) if not (zeros and each.sparse)]
