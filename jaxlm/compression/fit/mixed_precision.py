"""A step that does something else to every kernel: what fits a model to a budget (``compression.fit.budget``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import CalibratedLayer, Calibration, LayerParams, LayerwiseModel, solve_layers
from jaxlm.compression.input_statistics import observe_inputs, second_moment
from jaxlm.compression.layer_groups import join
from jaxlm.compression.observers import gram
from jaxlm.compression.prune.sparsegpt import sparsegpt
from jaxlm.compression.quantize.column_solver import SolverInfo, note_failures
from jaxlm.compression.quantize.gptq import gptq
from jaxlm.compression.quantize.rtn import IntegerGrid
from jaxlm.compression.steps import LAYER_KERNELS, LayerStep, Step, check_grid, check_sparsity, targets
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray
from jaxlm.core.tree import Leaf, Params
from jaxlm.nn.config import ModelConfig

__all__ = ["KernelChoice", "MixedPrecision", "Solver", "kernel_name"]

Found = Callable[[str, jax.Array, jax.Array, Leaf], None]


@dataclass(frozen=True)
class KernelChoice:
    """What to do to one kernel: prune the share ``sparsity``, or all but ``n`` of every ``m`` inputs, if any; and round
    it to ``bits``, if any, with zero points, a grid for each ``group`` of inputs (0: an output channel).

    ``kernel`` is its name, ``decoder/3/mlp/up``: the layers of a side are numbered, whatever layer groups they are in.
    """

    kernel: str
    bits: int = 0
    group: int = 0
    sparsity: float = 0.0
    n: int = 0
    m: int = 0

    def __post_init__(self):
        if self.bits or not self.sparse:
            check_grid(self.bits, self.group)
        if self.sparse:
            check_sparsity(self.sparsity, self.n, self.m)

    @property
    def sparse(self) -> bool:
        return bool(self.sparsity or self.m)

    def __str__(self) -> str:
        return f"rounded to {self.bits} bits" if self.bits else "pruned"


def kernel_name(walk: LayerwiseModel, place: Any, name: str) -> str:
    """What ``KernelChoice`` calls the kernel ``name`` of the layer at ``place``."""
    of_side = [each for each in walk.layer_positions() if each.side == place.side]
    number = [(each.layer_group, each.row) for each in of_side].index((place.layer_group, int(place.row)))
    return f"{place.side}/{number}/{name.removesuffix('/kernel')}"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Grid(IntegerGrid):
    """IntegerGrid whose number of bits is an array, so that one program solves for them all."""

    bits: jax.Array
    symmetric: bool = field(default=False, metadata={"static": True})
    min_clip: float = field(default=1.0, metadata={"static": True})


@dataclass(frozen=True)
class Solver:
    """How kernels are solved for; see ``gptq.gptq`` and ``sparsegpt.sparsegpt``. ``clip`` is ``min_clip`` of the grid."""

    clip: float = 0.6
    sweeps: int = 3
    search: int = 30
    damping: float = 0.01

    def __call__(self, kernel_IxO: jax.Array, h_IxI: jax.Array, choice: KernelChoice) -> tuple[Leaf, SolverInfo]:
        w_OxI = kernel_IxO.swapaxes(-1, -2).astype(jnp.float32)
        group = 0 if choice.group >= w_OxI.shape[-1] else choice.group
        grid = _Grid(jnp.full(w_OxI.shape[:-2], choice.bits), min_clip=self.clip) if choice.bits else None
        options = {"grid": grid, "group": group, "damping": self.damping, "sweeps": self.sweeps}
        if choice.sparse:
            sparsity = (choice.n, choice.m) if choice.m else choice.sparsity
            act_order = self.search > 0
            found = sparsegpt(w_OxI, h_IxI, sparsity=sparsity, search=self.search, act_order=act_order, **options)
        else:
            found = gptq(w_OxI, h_IxI, w_OxI != 0 if bool(jnp.any(w_OxI == 0)) else None, **options)
        if grid is None:
            return found.weights_OxI.swapaxes(-1, -2).astype(kernel_IxO.dtype), found.info
        return QArray(found.codes_OxI, *found.params, choice.bits, group), found.info


@dataclass(frozen=True)
class MixedPrecision(LayerStep):
    """Each kernel by its own ``KernelChoice``, GPTQ or SparseGPT, in one walk; a kernel without one stays as it is."""

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
        self, config: Any, params: Params, calibration: Calibration, notes: list[str], found: Found | None = None
    ) -> tuple[Any, Params]:
        """As every ``LayerStep``; ``found`` is told of each kernel its name, the second moments of its inputs, and what
        it was and is."""
        walk, paths = calibration.layerwise(config), set(targets(self, params))
        names = {
            kernel_name(walk, place, path.removeprefix(place.prefix))
            for place in walk.layer_positions() for path in paths if path.startswith(place.prefix)
        }  # fmt: skip
        if strange := [choice.kernel for choice in self.choices if choice.kernel not in names]:
            raise UserError(f"a mixed step names {strange[0]}, and the model has no such kernel")
        layers = solve_layers(config, params, calibration, partial(self.solve, found=found), paths.__contains__, notes)
        return join(config, params, layers)

    def solve(self, block: CalibratedLayer, found: Found | None = None) -> LayerParams:
        choices = {choice.kernel: choice for choice in self.choices}
        solver = Solver(self.clip, self.sweeps, self.search, self.damping)
        readings = observe_inputs(block, gram)
        layer = dict(block.params)
        for name in block.targets:
            called = kernel_name(block.model, block.position, name)
            if choice := choices.get(called):
                h = second_moment(block, name, readings[name], str(choice))
                layer[name], info = solver(block.params[name], h, choice)
                note_failures(block, [name], info, "rounded")
                if found:
                    found(called, h, block.params[name], layer[name])
        return layer
