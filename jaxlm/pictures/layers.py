"""What compression did to each kernel of each layer: bits, zeros, errors, and what they cost, as maps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize

from jaxlm.core.leaves import Codebook, QArray, dequantize
from jaxlm.core.tree import Leaf, Params, dtype_bits, flatten
from jaxlm.pictures.style import MAP, Figure, label_cells, new

__all__ = ["LayerGrid", "bits", "errors", "heatmap", "losses", "zeros"]

_KERNEL = re.compile(r"(?:(.*)/)?layers/(\d+)/(.*)/kernel")


@dataclass(frozen=True)
class LayerGrid:
    """A number for each kernel of each layer.

    Attributes:
        title: what the numbers are, with their unit.
        kernels: names of the rows, such as ``mlp/up``; with the side before it where a model has two.
        values_KxL: float64; NaN where a layer has no such kernel.
        form: how a number is written, as in ``"{:.1f}"``.
        log: whether colours follow magnitudes.
    """

    title: str
    kernels: tuple[str, ...]
    values_KxL: np.ndarray
    form: str = "{:.2g}"
    log: bool = False


def bits(params: Params) -> LayerGrid:
    """Bits a weight, scales and zero points included: codes count as what they are packed to in a file."""

    def of(leaf: Leaf) -> np.ndarray:
        held = sum(array.size * dtype_bits(array.dtype) for array in jax.tree.leaves(leaf))
        if isinstance(leaf, QArray | Codebook):
            held += leaf.codes.size * (leaf.bits - dtype_bits(leaf.codes.dtype))
        return np.full(leaf.shape[0], held / np.prod(leaf.shape))

    return LayerGrid("bits a weight", *_grid(params, of), "{:.1f}")


def zeros(params: Params) -> LayerGrid:
    """The share of weights that are zero, in percent."""
    return LayerGrid("zeros, %", *_grid(params, lambda leaf: 100 * np.asarray(_zeros(leaf))), "{:.0f}")


def errors(params: Params, dense: Params) -> LayerGrid:
    """``|W - W'| / |W|`` (Frobenius) of a compressed model's kernels beside the dense model's, in percent.

    Raises ValueError where layers have other shapes than they had.
    """
    ours, theirs = ({name: _joined(parts) for name, parts in _parts(tree).items()} for tree in (params, dense))
    if {name: each.shape for name, each in ours.items()} != {name: each.shape for name, each in theirs.items()}:
        raise ValueError("errors: the models are not of the same shape")
    found = {name: 100 * np.asarray(_error(ours[name], theirs[name])) for name in ours}
    return LayerGrid("error of weights, %", tuple(found), _stack(list(found.values())), "{:.1f}")


def losses(costs: Mapping[str, float]) -> LayerGrid:
    """What each kernel costs in thousandths of a nat a token, by the names of ``compression.json``'s choices
    (``decoder/3/mlp/up``): how much the loss minds."""
    found: dict[str, dict[int, float]] = {}
    sides = {kernel.split("/")[0] for kernel in costs}
    for kernel, cost in costs.items():
        side, number, name = kernel.split("/", 2)
        found.setdefault(f"{side} {name}" if len(sides) > 1 else name, {})[int(number)] = 1e3 * cost
    rows = [np.array([row.get(i, np.nan) for i in range(max(row) + 1)]) for row in found.values()]
    return LayerGrid("loss, millinats a token", tuple(found), _stack(rows), log=True)


def heatmap(grid: LayerGrid) -> Figure:
    """A cell for each kernel (rows) of each layer (columns), its number written in it where there is room."""
    count, layers = grid.values_KxL.shape
    figure, (axes,) = new(max(3.2, min(12, 2.2 + 0.42 * layers)), 1.0 + 0.3 * count)
    known = grid.values_KxL[np.isfinite(grid.values_KxL) & ((grid.values_KxL > 0) | (not grid.log))]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    if grid.log and 0 < low < high:
        norm = LogNorm(low, high)
    else:
        norm = Normalize(low if low < high else low - 1, high if low < high else high + 1)
    shown = np.clip(grid.values_KxL, low, None) if grid.log else grid.values_KxL
    colours = colormaps[MAP]
    axes.pcolormesh(np.arange(layers + 1) - 0.5, np.arange(count + 1) - 0.5, shown, cmap=colours, norm=norm,
                    edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    if layers <= 24:
        texts = {(i, j): grid.form.format(grid.values_KxL[i, j]) for i in range(count) for j in range(layers)
                 if np.isfinite(grid.values_KxL[i, j])}
        label_cells(axes, shown, texts, colours, norm)
    axes.set_yticks(range(count), grid.kernels)
    step = max(1, layers // 24)
    axes.set_xticks(range(0, layers, step))
    axes.set_xlabel("layer")
    axes.set_title(grid.title, fontsize=10, loc="left")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def _parts(params: Params) -> dict[str, list[Leaf]]:
    """Kernel -> its stacks of layers, layer group after layer_group."""
    found: dict[str, dict[int, Leaf]] = {}
    matched = [(match, leaf) for path, leaf in flatten(params).items() if (match := _KERNEL.fullmatch(path))]
    sides = {match[1] for match, _ in matched}
    for match, leaf in matched:
        name = f"{match[1]} {match[3]}" if len(sides) > 1 else match[3]
        found.setdefault(name, {})[int(match[2])] = leaf
    return {name: [parts[i] for i in sorted(parts)] for name, parts in found.items()}


def _grid(params: Params, of: Callable[[Leaf], np.ndarray]) -> tuple[tuple[str, ...], np.ndarray]:
    found = {name: np.concatenate([of(part) for part in parts]) for name, parts in _parts(params).items()}
    return tuple(found), _stack(list(found.values()))


def _stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one array, NaN where there is nothing."""
    out = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _joined(parts: Sequence[Leaf]) -> jax.Array:
    return jnp.concatenate([dequantize(part, jnp.float32) for part in parts])


@jax.jit
def _zeros(leaf: Leaf) -> jax.Array:
    dense = dequantize(leaf, jnp.float32)
    return jnp.mean(dense == 0, axis=tuple(range(1, dense.ndim)))


@jax.jit
def _error(now: jax.Array, before: jax.Array) -> jax.Array:
    over = tuple(range(1, now.ndim))
    return jnp.sqrt(jnp.sum((now - before) ** 2, over) / jnp.maximum(jnp.sum(before**2, over), 1e-30))
