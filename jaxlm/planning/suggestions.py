"""``suggest_changes``: options that make a program fit into memory."""

from __future__ import annotations

import dataclasses
import math

from jaxlm.core.errors import UserError
from jaxlm.planning.analytic import estimate, state_bytes
from jaxlm.planning.forecasting import Forecast
from jaxlm.planning.programs import ServingShape
from jaxlm.planning.topology import Topology
from jaxlm.training.config import Experiment, MeshConfig

__all__ = ["suggest_changes"]

_WEIGHT_AXES = ("fsdp", "tensor", "stage", "expert")  # mesh axes that split the weights


def suggest_changes(
    result: Forecast, config: Experiment, topology: Topology, serving: ServingShape | None
) -> list[str]:
    """Options that make a program fit or bring it closer, the most effective first; empty if it fits."""
    over = result.memory.over
    if not over:
        return []
    if serving is not None:
        return _for_serving(result, topology, serving)
    changes: list[tuple[float, str]] = []
    if math.prod(result.mesh[axis] for axis in _WEIGHT_AXES) < topology.size:
        now = sum(result.memory.held.get(name, 0.0) for name in ("parameters", "optimizer", "gradients"))
        saved = now - state_bytes(dataclasses.replace(config, mesh=MeshConfig(preset="fsdp")), topology.size)
        changes.append((saved, f"--mesh.preset fsdp shards all training state over all chips: {_gib(saved)} less"))
    if not config.mesh.offload_optimizer:
        saved = result.memory.held["optimizer"]
        changes.append((saved, f"--mesh.offload_optimizer true keeps the optimizer in host memory: {_gib(saved)} less"))
    changes += _for_activations(config, topology)
    changes = [(saved, text) for saved, text in changes if saved > 0]
    changes.sort(reverse=True)
    return [f"{text}{' (enough)' if saved >= over else ''}" for saved, text in changes] or [
        "no option makes it fit: use more chips, or chips with more memory"
    ]


def _for_activations(config: Experiment, topology: Topology) -> list[tuple[float, str]]:
    now = estimate(config, topology).activations
    options = {}
    if config.model.sides and config.model.remat != "full":
        options["--model.remat full stores only the input of each layer"] = dataclasses.replace(
            config, model=dataclasses.replace(config.model, remat="full")
        )
    if config.model.dtype == "float32":
        options["--model.dtype bfloat16 halves activations"] = dataclasses.replace(
            config, model=dataclasses.replace(config.model, dtype="bfloat16")
        )
    for times in (2, 4, 8, 16):
        accumulate = times * config.train.accumulate
        options[f"--train.accumulate {accumulate} processes fewer rows at a time"] = dataclasses.replace(
            config, train=dataclasses.replace(config.train, accumulate=accumulate)
        )
    changes = []
    for text, each in options.items():
        try:
            saved = now - estimate(each, topology).activations
        except UserError:  # the rows do not divide evenly into these micro-batches
            continue
        changes.append((saved, f"{text}: about {_gib(saved)} less"))
    return changes


def _for_serving(result: Forecast, topology: Topology, serving: ServingShape) -> list[str]:
    over, held = result.memory.over, result.memory.held
    changes = []
    if not serving.recipe:
        for recipe, share in (("w8a8-dynamic", 0.5), ("w4a16-gptq", 0.28)):
            saved = held["parameters"] * (1 - share)
            changes.append((saved, f"--recipe {recipe}: about {_gib(saved)} less"))
    shards = math.prod(result.mesh[axis] for axis in _WEIGHT_AXES)
    if shards < topology.size:
        saved = held["parameters"] * (1 - shards / topology.size)
        changes.append((saved, f"--mesh.tensor {topology.size} splits the weights over all chips: {_gib(saved)} less"))
    if "kv" not in serving.recipe:
        saved = held["cache"] / 2
        changes.append((saved, f"a recipe that ends in +kv8 keeps the cache in int8: about {_gib(saved)} less"))
    changes.sort(reverse=True)
    return [f"{text}{' (enough)' if saved >= over else ''}" for saved, text in changes]


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
