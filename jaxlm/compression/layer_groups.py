"""Puts layers of different shapes or representations together as one model with several layer groups."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core.tree import Leaf, Params, path_str
from jaxlm.nn.config import ModelConfig

__all__ = ["join"]

# The position of a layer (``nn.layerwise.LayerPosition``) and its parameters.
Positioned = tuple[Any, Mapping[str, Leaf]]


def join(config: ModelConfig, params: Params, layers: Sequence[Positioned]) -> tuple[ModelConfig, Params]:
    """The model with other parameters for its layers.

    Neighbouring layers of one group that still have the same structure stay together; the others become layer groups of
    their own, which the configuration then lists.

    Args:
        config, params: the model.
        layers: the position and the new parameters of all its layers, in order; see ``calibration.layer_params``.
    """
    flat = {path_str(path): (path, variable) for path, variable in nnx.to_flat_state(params)}
    other = [each for name, each in flat.items() if not name.startswith(("encoder/layers/", "decoder/layers/"))]
    out, changes = list(other), {}
    for side, of_side in itertools.groupby(layers, lambda each: each[0].side):
        by_structure = itertools.groupby(of_side, lambda each: (_structure(each), each[0].layer_group))
        runs = [list(run) for _, run in by_structure]
        for layer_group, run in enumerate(runs):
            position, first = run[0]
            for name in first:
                path, variable = flat[position.prefix + name]
                at = path.index(position.layer_group)
                stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *[layer[name] for _, layer in run])
                out.append(((*path[:at], layer_group, *path[at + 1 :]), variable.replace(stacked)))
        counts = tuple(len(run) for run in runs)
        if len(runs) != len({run[0][0].layer_group for run in runs}):
            changes["layer_groups" if config.kind == "decoder" else f"{side}_layer_groups"] = counts
    return dataclasses.replace(config, **changes), nnx.from_flat_state(out)


def _structure(layer: Positioned) -> tuple:
    """What layers of one group have in common: names, representations, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(dict(layer[1]))
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
