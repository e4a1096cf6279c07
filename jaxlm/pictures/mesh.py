"""Which slice of which weight lies on which device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jax.sharding import NamedSharding
from matplotlib.patches import Rectangle

from jaxlm.core.sharding import describe_mesh
from jaxlm.pictures.style import COLOURS, Figure, new

__all__ = ["sharded"]

_COLUMNS = 4


def sharded(weights: Mapping[str, tuple[tuple[int, ...], NamedSharding]]) -> Figure:
    """Each weight (its shape and sharding, by name) as a rectangle cut into what devices hold, with their numbers.

    Of more than two dimensions the last two are drawn; parts of the others that lie elsewhere are drawn one behind the
    other. All shardings are on one mesh, whose sizes are the title; colours are those of the first device of a slice.
    """
    columns = min(_COLUMNS, len(weights))
    rows = -(-len(weights) // columns)
    figure, axes = new(2.6 * columns + 0.4, 2.3 * rows + 0.5, rows, columns)
    for each, (name, (shape, sharding)) in zip(axes, weights.items(), strict=False):
        _draw(each, name, shape, sharding)
    for each in axes[len(weights) :]:
        each.axis("off")
    mesh = next(iter(weights.values()))[1].mesh
    figure.suptitle(f"{describe_mesh(mesh.shape)} ({mesh.size} devices)", fontsize=11, x=0.01, ha="left")
    return figure


def _draw(axes, name: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    holders = _holders(shape, sharding)
    height, width = (1, *shape)[-2:]
    behind: dict[tuple, list[int]] = {}  # layers or experts that lie elsewhere
    for part, devices in sorted(holders.items()):
        behind.setdefault(part[:-2], []).extend(devices)
    shift = 0.08
    for part, devices in sorted(holders.items(), reverse=True):
        depth = list(behind).index(part[:-2])
        (top, bottom), (left, right) = ((0, 1), *part)[-2:]
        corner = (left / width + shift * depth, 1 - bottom / height + shift * depth)
        size = ((right - left) / width, (bottom - top) / height)
        colour = COLOURS[min(devices) % len(COLOURS)]
        axes.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor="white", linewidth=1.2, zorder=-depth))
        if depth == 0:
            axes.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, _ranges(sorted(devices)), ha="center",
                      va="center", color="white", fontsize=8, weight="bold", rotation=90 if size[0] < 0.12 else 0)
    extent = 1 + shift * (len(behind) - 1)
    axes.set(xlim=(-0.02, extent + 0.02), ylim=(-0.02, extent + 0.02), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(f"{name}\n{' x '.join(map(str, shape))}", fontsize=8)
    held = math.prod(right - left for left, right in next(iter(holders)))
    others = [device for devices in list(behind.values())[1:] for device in devices]
    note = f"; other layers or experts: {_ranges(sorted(set(others)))}" if others else ""
    axes.set_xlabel(f"{held / max(math.prod(shape), 1):.3g} of it a device{note}", fontsize=7)


def _holders(shape: tuple[int, ...], sharding: NamedSharding) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """Part (begin and end in each dimension) -> the devices that hold it, numbered along the mesh; the mesh may be one
    without devices."""
    sizes = sharding.mesh.shape
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    holders: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for number, at in enumerate(np.ndindex(*sizes.values())):
        place = dict(zip(sizes, at, strict=True))
        part = []
        for length, entry in zip(shape, entries, strict=True):
            axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
            index = 0
            for axis in axes:
                index = index * sizes[axis] + place[axis]
            share = length // math.prod(sizes[axis] for axis in axes)
            part.append((index * share, (index + 1) * share))
        holders.setdefault(tuple(part), []).append(number)
    return holders


def _ranges(numbers: list[int]) -> str:
    """``0-3, 8-11``; in steps, ``0,2,…,6``."""
    steps = set(np.diff(numbers).tolist())
    if len(numbers) > 2 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]},{numbers[1]},…,{numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(words if len(words) <= 3 else [*words[:2], "…"])
