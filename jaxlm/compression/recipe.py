"""Recipes: the steps that compress a model, as data. ``names`` makes recipes from names, Python files and JSON
files."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

from jaxlm.compression.calibration import Calibration
from jaxlm.compression.steps import LayerStep, ModelStep, Step, WeightStep, needs_data
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params
from jaxlm.nn.config import ModelConfig

__all__ = ["Compressed", "Recipe"]

# The kind of each step, as stored recipes name it, and its class, which is imported when a stored recipe needs it.
STEPS = {
    "autoround": "quantize.autoround.AutoRound",
    "awq": "quantize.awq.Awq",
    "drop_layers": "prune.depth.DropLayers",
    "factor": "low_rank.Factorize",
    "float8": "quantize.float8.Float8",
    "gptq": "quantize.gptq.Gptq",
    "half": "quantize.half_precision.HalfPrecision",
    "kv_cache": "quantize.kv_cache.QuantizeCache",
    "magnitude": "prune.scores.Magnitude",
    "mixed": "fit.mixed_precision.MixedPrecision",
    "n_of_m": "prune.scores.NofM",
    "prune": "prune.structured.StructuredPrune",
    "quantize": "quantize.rtn.Quantize",
    "rotate": "quantize.rotate.Rotate",
    "share": "quantize.codebook.ShareWeights",
    "smooth": "quantize.activations.SmoothQuant",
    "sparsegpt": "prune.sparsegpt.SparseGpt",
    "static": "quantize.activations.StaticActivations",
    "table": "quantize.codebook.TableQuantize",
    "wanda": "prune.scores.Wanda",
}


@dataclass(frozen=True)
class Compressed:
    """A compressed model, and lines about what the user should know."""

    config: ModelConfig
    params: Params
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Steps from first to last, and how the result is stored: ``plain`` or, losslessly smaller, ``huffman``."""

    steps: tuple[WeightStep | LayerStep | ModelStep, ...]
    storage: str = "plain"
    name: str = "custom"

    def __post_init__(self):
        if self.storage not in ("plain", "huffman"):
            raise UserError(f"unknown storage {self.storage!r}; use 'plain' or 'huffman'")

    def apply(self, params: Params) -> Params:
        """The compressed parameters: a pure function of the dense ones, in or out of ``jit``.

        Raises:
            UserError: when a step needs more than weights (see ``run``), when its target matches nothing, or when it
                matches a parameter that is not a dense kernel or table.
        """
        for step in self.steps:
            if not isinstance(step, WeightStep):
                raise UserError(f"a {step.kind} step needs the whole model, not its weights alone: use jaxlm.compress")
            params = step(params)
        return params

    def run(self, config: ModelConfig, params: Params, calibration: Calibration | None = None) -> Compressed:
        """The compressed model. Its layers may be in other layer groups, which its configuration then says.

        Raises:
            UserError: as ``apply``, and when a step needs calibration data and there is none.
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
        """The recipe as ``compression.json`` holds it."""
        steps = [{"kind": step.kind, **dataclasses.asdict(step)} for step in self.steps]
        return {"name": self.name, "steps": steps, "storage": self.storage}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Recipe:
        """The inverse of ``to_json``.

        Raises:
            UserError: when the data names a step or a field that does not exist.
        """
        try:
            steps = []
            for fields in data["steps"]:
                fields = dict(fields)
                steps.append(step_class(fields.pop("kind"))(**fields))
            return Recipe(tuple(steps), data["storage"], data["name"])
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a compression recipe of this version: {error}") from None


def step_class(kind: str) -> type[Step]:
    """The class of the steps of a kind; KeyError where there is none."""
    module, name = STEPS[kind].rsplit(".", 1)
    return getattr(importlib.import_module(f"jaxlm.compression.{module}"), name)
