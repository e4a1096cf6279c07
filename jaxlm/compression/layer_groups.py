"""Layers of several shapes or representations in one model: as many layer groups as it takes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core.tree import Leaf, Params, path_str

__all__ = ["join"]


def join(config: Any, params: Params, layers: Sequence[tuple[Any, Mapping[str, Leaf]]]) -> tuple[Any, Params]:
    """``params`` with the given layers, in order and all of them, in place of its own; see ``calibrate.layer_of``.

    Neighbours of one layer group that are still of one structure stay together; the others become layer groups of their own,
    which the configuration then says.
    """
    flat = {path_str(path): (path, variable) for path, variable in nnx.to_flat_state(params)}
    around = [each for name, each in flat.items() if not name.startswith(("encoder/layers/", "decoder/layers/"))]
    out, changes = list(around), {}
    for side, of_side in itertools.groupby(layers, lambda each: each[0].side):
        runs = [list(run) for _, run in itertools.groupby(of_side, lambda each: (_kind(each), each[0].layer_group))]
        for layer_group, run in enumerate(runs):
            place, first = run[0]
            for name in first:
                path, variable = flat[place.prefix + name]
                at = path.index(place.layer_group)
                stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *[layer[name] for _, layer in run])
                out.append(((*path[:at], layer_group, *path[at + 1 :]), variable.replace(stacked)))
        counts = tuple(len(run) for run in runs)
        if len(runs) != len({run[0][0].layer_group for run in runs}):
            changes["layer_groups" if config.kind == "decoder" else f"{side}_layer_groups"] = counts
    return dataclasses.replace(config, **changes), nnx.from_flat_state(out)


def _kind(placed: tuple[Any, Mapping[str, Leaf]]) -> tuple:
    """What layers of one layer group have in common: names, representations, shapes and types."""
    leaves, structure = jax.tree.flatten(dict(placed[1]))
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
