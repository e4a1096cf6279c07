"""All pictures of a model, for its page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.core.leaves import is_leaf
from jaxlm.core.sharding import abstract_mesh, describe, shardings
from jaxlm.core.tree import Params, flatten
from jaxlm.evaluation.compare import Comparison
from jaxlm.pictures import layers, mesh
from jaxlm.pictures.curves import size_quality, training_curves
from jaxlm.pictures.page import Picture
from jaxlm.training.metrics import read_metrics

__all__ = ["album"]

_OTHER_SEGMENT = re.compile(r"layers/[1-9]\d*/")


def album(
    lm: Any, source: Path, *, dense: Any = None, compared: Sequence[Comparison] = (), preset: str = "fsdp+tp",
    devices: int = 8,
) -> list[Picture]:
    """What there is to see of a model.

    Args:
        lm: the model (``jaxlm.load(..., expand=False)``).
        source: its directory, for the course of its training and what compression chose.
        dense: the model it was compressed from, if it is at hand.
        compared: it and others, measured (``evaluation.compare``).
        preset, devices: of the mesh for which the sharding is drawn.
    """
    found = []
    rows = read_metrics(source / "metrics.jsonl") if (source / "metrics.jsonl").is_file() else []
    if rows:
        found.append(Picture("Training", "From metrics.jsonl of the run.", [training_curves(rows)]))
    if compared:
        note = "Measured on the same data, one point a model. The line joins those that no smaller one equals."
        found.append(Picture("Size and quality", note, [size_quality(compared)]))
    if lm.config.kind != "lstm":
        found += _layers(lm.params, source, dense)
    found.append(_mesh(lm.params, preset, devices))
    return found


def _layers(params: Params, source: Path, dense: Any) -> list[Picture]:
    maps = []
    share = layers.zeros(params)
    compressed = any(is_leaf(leaf) for leaf in flatten(params).values())
    if compressed:
        maps.append(layers.bits(params))
    if (share.values_KxL > 1).any():
        maps.append(share)
    if dense is not None:
        try:
            maps.append(layers.errors(params, dense.params))
        except ValueError:
            pass  # a smaller architecture: its weights have no counterparts
    if costs := _costs(source):
        maps.append(layers.losses(costs))
    if not maps:
        return []
    note = "A cell for each kernel of each layer."
    if costs:
        note += " How much the loss minds was measured when the model was fitted to its budget."
    return [Picture("Layers", note, [layers.heatmap(each) for each in maps])]


def _costs(source: Path) -> Mapping[str, float]:
    """What each kernel costs, where a model was fitted to a budget."""
    path = source / "compression.json"
    choices = json.loads(path.read_text()).get("choices", []) if path.is_file() else []
    return {row["kernel"]: row["final"] for row in choices}


def _mesh(params: Params, preset: str, devices: int) -> Picture:
    there = abstract_mesh(preset, {}, devices)
    lies = flatten(shardings(params, there))
    drawn = {}
    for path, leaf in flatten(params).items():
        if _OTHER_SEGMENT.search(path) or len(leaf.shape) < 2 or "norm" in path:
            continue  # other segments lie as the first does, and norms everywhere
        part = next((name for name in ("codes", "base", "a") if is_leaf(leaf) and hasattr(leaf, name)), None)
        array, place = (leaf, lies[path]) if part is None else (getattr(leaf, part), getattr(lies[path], part))
        drawn[path.removesuffix("/kernel")] = (tuple(array.shape), place)
    note = (f"Which slice of which weight lies on which of {devices} devices under the preset {preset} "
            f"({describe(there.shape)}). Compressed weights are drawn as their codes: layers, outputs, inputs.")
    return Picture("Sharding", note, [mesh.sharded(drawn)])
