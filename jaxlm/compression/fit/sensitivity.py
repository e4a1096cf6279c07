"""The sensitivity of the loss to each kernel: what every candidate for it takes in size, and adds to the loss.

Each candidate is solved for with the inputs that the kernel has in the dense model; ``fisher`` tells what its errors
cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import (
    CalibratedLayer,
    Calibration,
    LayerParams,
    LayerwiseModel,
    layer_params,
    solve_layers,
)  # fmt: skip
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
    zeros = _with_zeros(calibration.layerwise(config), params, chosen)
    # What was solved for is read when the next solve has begun: the processor packs while the device computes.
    unread: list[Callable[[], None]] = []

    def examine(layer: CalibratedLayer) -> LayerParams:
        for read in _examine(layer, next(waiting), candidates, zeros, size, found):
            unread.append(read)
            if len(unread) > 1:
                unread.pop(0)()
        return layer.params

    if any(each.inputs is None for each in statistics):
        solve_layers(config, params, calibration, examine, chosen.__contains__, [])
    else:
        model = calibration.layerwise(config)
        positions = list(model.layer_positions())
        for done, position in enumerate(positions, 1):
            each = layer_params(params, position)
            names = tuple(name for name in each if position.prefix + name in chosen)
            if names:
                examine(CalibratedLayer(model, params, position, each, names, (), ()))
            if calibration.progress is not None:
                calibration.progress(calibration.task, done, len(positions))
    for read in unread:
        read()
    return found


def _examine(
    layer: CalibratedLayer, statistics: LayerStatistics, candidates: Sequence[Mapping[str, Any]], zeros: Container[str],
    size: Callable[[Leaf], int], found: Sensitivity,
) -> Iterator[Callable[[], None]]:
    """Begins to solve for the candidates of one layer's kernels, those of one input after the other; yields what waits
    for them and adds what they cost to ``found``."""
    inputs = observe_inputs(layer, gram) if statistics.inputs is None else statistics.inputs
    kernel_of = {name: kernel_name(layer.model, layer.position, name) for name in layer.targets}
    for name in layer.targets:  # in their order, whatever the order in which they are solved for
        found.candidates[kernel_of[name]] = ()
        found.weights[kernel_of[name]] = layer.params[name].size
        found.fisher[kernel_of[name]] = statistics.fisher[name]
    for names in group_by_input(layer.targets):
        kernels = {name: layer.params[name] for name in names}
        h_IxI = second_moment(layer, names[0], inputs[names[0]], "measured")
        choices = {
            name: _choices(kernel_of[name], kernel.shape[-2], candidates, kernel_of[name] in zeros)
            for name, kernel in kernels.items()
        }
        leaves = {name: [leaf for leaf, _ in some] for name, some in found.solver(kernels, h_IxI, choices).items()}
        losses = {
            name: _added_losses(leaves[name], kernel, h_IxI, statistics.fisher[name])
            for name, kernel in kernels.items()
        }

        def read(kernels=kernels, choices=choices, leaves=leaves, losses=losses) -> None:
            for name, kernel in kernels.items():
                solved = zip(choices[name], leaves[name], losses[name].tolist(), strict=True)
                found.candidates[kernel_of[name]] = (
                    Candidate(None, size(kernel), 0.0),
                    *(Candidate(choice, size(leaf), loss) for choice, leaf, loss in solved),
                )

        yield read


def _added_losses(
    leaves: Sequence[Leaf], kernel_IxO: jax.Array, h_IxI: jax.Array, fisher_O: jax.Array
) -> jax.Array:
    """What each of a kernel's compressed forms adds to the loss, in nats a token."""
    # The number of bits is no part of the values: one program serves all of them.
    leaves = [dataclasses.replace(leaf, bits=8) if isinstance(leaf, QArray) else leaf for leaf in leaves]
    return _losses_of(leaves, kernel_IxO, h_IxI, fisher_O)


@jax.jit
def _losses_of(leaves: list[Leaf], kernel_IxO: jax.Array, h_IxI: jax.Array, fisher_O: jax.Array) -> jax.Array:
    return jnp.stack([loss_increase(dequantize(leaf) - kernel_IxO, h_IxI, fisher_O) for leaf in leaves])


def _with_zeros(model: LayerwiseModel, params: Params, chosen: Container[str]) -> set[str]:
    """The names of kernels that have zeros already. It is known before the first solve, as to ask later is to wait."""
    flags = {}
    for position in model.layer_positions():
        for name, kernel in layer_params(params, position).items():
            if position.prefix + name in chosen:
                flags[kernel_name(model, position, name)] = (kernel == 0).any()
    return {name for name, flag in jax.device_get(flags).items() if flag}


def _choices(name: str, n_in: int, candidates: Sequence[Mapping[str, Any]], zeros: bool) -> list[KernelChoice]:
    """The candidates that differ for a kernel of ``n_in`` inputs. One that has zeros already is not pruned."""
    every = (KernelChoice(name, **each) for each in candidates)
    every = (dataclasses.replace(each, group=0) if each.group >= n_in else each for each in every)
    return [each for each in dict.fromkeys(every) if not (zeros and each.sparse)]
