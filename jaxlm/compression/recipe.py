"""Recipes: what to do to which weights, as data. A recipe is made from a name (``names``), a Python file or JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxlm.compression import reshape, solvers, steps
from jaxlm.compression.calibration import Calibration
from jaxlm.compression.fit import mixed_precision as mixed
from jaxlm.compression.quantize import activations, autoround, awq
from jaxlm.compression.steps import Step, WeightStep, needs_data
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params

__all__ = ["Compressed", "Recipe"]

_STEPS: dict[str, type[Step]] = {
    step.kind: step
    for module in (steps, solvers, awq, autoround, activations, reshape, mixed)
    for step in vars(module).values()
    if isinstance(step, type) and dataclasses.is_dataclass(step) and issubclass(step, Step)
}


@dataclass(frozen=True)
class Compressed:
    """A model as a recipe left it, and lines about what the user should know."""

    config: Any
    params: Params
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Steps from left to right, and how the result is stored: ``plain`` or, losslessly smaller, ``huffman``."""

    steps: tuple[Step, ...]
    storage: str = "plain"
    name: str = "custom"

    def __post_init__(self):
        if self.storage not in ("plain", "huffman"):
            raise UserError(f"unknown storage {self.storage!r}; use 'plain' or 'huffman'")

    def apply(self, params: Params) -> Params:
        """The compressed parameters: a pure function of the dense ones, in or out of ``jit``.

        Raises UserError where a step needs more than weights (see ``run``), or its target matches nothing, or something
        that is not a dense kernel or table.
        """
        for step in self.steps:
            if not isinstance(step, WeightStep):
                raise UserError(f"a {step.kind} step needs the whole model, not its weights alone: use jaxlm.compress")
            params = step(params)
        return params

    def run(self, config: Any, params: Params, calibration: Calibration | None = None) -> Compressed:
        """The compressed model. Parameters may come out in other layer groups, which the configuration then says.

        Raises UserError as ``apply``, and where a step needs calibration and there is none.
        """
        step, notes = needs_data(self.steps), []
        if step is not None and calibration is None:
            raise UserError(f"recipe {self.name}: {step.kind} is calibrated with data; give some (--calibrate SPEC)")
        for step in self.steps:
            if isinstance(step, WeightStep):
                params = step(params)
            else:
                config, params = step(config, params, calibration, notes)
        return Compressed(config, params, tuple(notes))

    def to_json(self) -> dict[str, Any]:
        steps = [{"kind": step.kind, **dataclasses.asdict(step)} for step in self.steps]
        return {"name": self.name, "steps": steps, "storage": self.storage}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Recipe:
        """The inverse of ``to_json``; raises UserError for steps or fields it does not know."""
        try:
            steps = []
            for fields in data["steps"]:
                fields = dict(fields)
                steps.append(_STEPS[fields.pop("kind")](**fields))
            return Recipe(tuple(steps), data["storage"], data["name"])
        except (KeyError, TypeError) as error:
            raise UserError(f"not a compression recipe of this version: {error}") from None
