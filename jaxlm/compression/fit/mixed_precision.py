"""The step that treats every kernel in its own way, which is how a model is fitted to a budget (``fit.search``)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax

from jaxlm.compression.calibration import CalibratedLayer, Calibration, LayerParams, LayerwiseModel, solve_layers
from jaxlm.compression.fit.kernel_solver import KernelChoice, Solver
from jaxlm.compression.input_statistics import group_by_input, observe_inputs, second_moment
from jaxlm.compression.layer_groups import join
from jaxlm.compression.observers import gram
from jaxlm.compression.quantize.column_solver import note_failures
from jaxlm.compression.steps import LAYER_KERNELS, LayerStep, Step, targets
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Leaf, Params
from jaxlm.nn.config import ModelConfig

__all__ = ["MixedPrecision", "SolvedKernels", "kernel_name"]


def kernel_name(model: LayerwiseModel, position: Any, name: str) -> str:
    """What ``KernelChoice`` calls the kernel ``name`` of the layer at ``position``."""
    return f"{position.side}/{_number(model, position)}/{name.removesuffix('/kernel')}"


def _number(model: LayerwiseModel, position: Any) -> int:
    """The number of a layer among those of its side."""
    of_side = [each for each in model.layer_positions() if each.side == position.side]
    return [(each.layer_group, each.row) for each in of_side].index((position.layer_group, int(position.row)))


@dataclass
class SolvedKernels:
    """The kernels that were solved for so far, so that none is solved for twice with the same inputs and choice.

    Attributes:
        loss: of a kernel by name: given the second moments of its inputs, what it was and what it is.
        final: for each kernel of the last run by name, what it is and that loss.
    """

    loss: Callable[[str, jax.Array, jax.Array, Leaf], float]
    final: dict[str, tuple[Leaf, float]] = field(default_factory=dict)
    _known: dict[Hashable, tuple[Leaf, list[str], float]] = field(default_factory=dict)


@dataclass(frozen=True)
class MixedPrecision(LayerStep):
    """Each kernel by its own ``KernelChoice``, with GPTQ or SparseGPT, layer by layer; other kernels stay dense.

    Attributes:
        choices: at most one for each kernel.
        clip, sweeps, search, damping: see ``kernel_solver.Solver``.
    """

    kind: ClassVar[str] = "mixed"
    choices: tuple[KernelChoice, ...]
    clip: float = Solver.clip
    sweeps: int = Solver.sweeps
    search: int = Solver.search
    damping: float = Solver.damping
    target: str = LAYER_KERNELS

    def __post_init__(self):
        choices = [each if isinstance(each, KernelChoice) else KernelChoice(**each) for each in self.choices]
        object.__setattr__(self, "choices", tuple(choices))

    def without_data(self, config: ModelConfig) -> tuple[Step, ...]:
        raise UserError("a recipe that was fitted to a budget chose for one model; give a recipe by name")

    def __call__(
        self, config: ModelConfig, params: Params, calibration: Calibration, notes: list[str],
        solved: SolvedKernels | None = None,
    ) -> tuple[ModelConfig, Params]:
        """As every ``LayerStep``; kernels that ``solved`` knows are taken from there, and others are added.

        Raises:
            UserError: a choice names a kernel that the model does not have.
        """
        model, paths = calibration.layerwise(config), set(targets(self, params))
        names = {
            kernel_name(model, position, path.removeprefix(position.prefix))
            for position in model.layer_positions() for path in paths if path.startswith(position.prefix)
        }  # fmt: skip
        if strange := [choice.kernel for choice in self.choices if choice.kernel not in names]:
            raise UserError(f"a mixed step names {strange[0]}, and the model has no such kernel")
        solve = partial(self.solve, solved=solved)
        return join(config, params, solve_layers(config, params, calibration, solve, paths.__contains__, notes))

    def solve(self, layer: CalibratedLayer, solved: SolvedKernels | None = None) -> LayerParams:
        known = {} if solved is None else solved._known
        before = self._before(layer)
        chosen = self._of_layer(layer)
        missing = tuple(name for name, choice in chosen.items() if (before, choice) not in known)
        if missing:
            for name, (leaf, notes, loss) in self._solve(layer, chosen, missing, solved).items():
                known[before, chosen[name]] = leaf, notes, loss
        params = dict(layer.params)
        for name, choice in chosen.items():
            params[name], notes, loss = known[before, choice]
            layer.notes.extend(notes)
            if solved is not None:
                solved.final[choice.kernel] = params[name], loss
        return params

    def _of_layer(self, layer: CalibratedLayer) -> dict[str, KernelChoice]:
        """The choices of a layer's kernels, by their names in the layer."""
        choices = {choice.kernel: choice for choice in self.choices}
        names = {name: kernel_name(layer.model, layer.position, name) for name in layer.targets}
        return {name: choices[kernel] for name, kernel in names.items() if kernel in choices}

    def _before(self, layer: CalibratedLayer) -> frozenset[KernelChoice]:
        """The choices of the layers before: what decides, with the data, which inputs a layer has."""
        layers = [f"{each.side}/{_number(layer.model, each)}" for each in layer.model.layer_positions()]
        earlier = set(layers[: layers.index(f"{layer.position.side}/{_number(layer.model, layer.position)}")])
        return frozenset(choice for choice in self.choices if "/".join(choice.kernel.split("/")[:2]) in earlier)

    def _solve(
        self, layer: CalibratedLayer, chosen: dict[str, KernelChoice], missing: tuple[str, ...],
        solved: SolvedKernels | None,
    ) -> dict[str, tuple[Leaf, list[str], float]]:
        """For each kernel that is ``missing`` what it becomes, notes about it, and its loss."""
        solver = Solver(self.clip, self.sweeps, self.search, self.damping)
        readings, found = observe_inputs(layer, gram), {}
        for names in group_by_input(layer.targets):
            kernels = {name: layer.params[name] for name in names}
            wanted = [name for name in names if name in missing]
            if not wanted:
                continue
            h_IxI, done = None, None
            for name in wanted:
                first = len(layer.notes)
                h_IxI = second_moment(layer, name, readings[name], str(chosen[name]))
                if done is None:
                    done = solver(kernels, h_IxI, {each: [chosen[each]] for each in wanted})
                leaf, info = done[name][0]
                note_failures(layer, [name], info, "rounded")
                notes, layer.notes[first:] = layer.notes[first:], []
                loss = solved.loss(chosen[name].kernel, h_IxI, kernels[name], leaf) if solved else 0.0
                found[name] = leaf, notes, loss
        return found
