"""What weights are multiplied with, measured layer by layer, and the walk on which solvers replace them.

The inputs of a layer come from the layers before it as they already are, compressed; so each solver corrects for what
was lost before it (GPTQ, arXiv:2210.17323, section 4). The hidden states of one layer are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.leaves import Observer
from jaxlm.core.progress import Progress
from jaxlm.core.tree import Leaf, Params, flatten

__all__ = ["Block", "Calibration", "gram", "histogram", "moments", "solve_blocks"]

Batch = tuple[jax.Array, ...]
Layer = dict[str, Leaf]  # path within a layer -> its leaf, without the layer dimension
Reading = Mapping[str, jax.Array]
Measure = Callable[[jax.Array, jax.Array | None, jax.Array | None], Reading]  # see ``core.leaves.Observer``

BINS = 2048  # of a histogram: 64 for each power of two, the last one ending at 2**16
_ON_DEVICE = 4 << 30  # bytes of hidden states beyond which they wait in host memory


class LayerwiseModel(Protocol):
    """A model one layer at a time; ``jaxlm.nn.layerwise.LayerwiseModel``."""

    config: Any

    def layer_positions(self) -> Iterable[Any]: ...
    def embed(self, params: Params, batch: Batch) -> Any: ...
    def enter_decoder(self, params: Params, batch: Batch, state: Any) -> Any: ...
    def run_layer(self, params: Params, place: Any, layer: Layer, batch: Batch, state: Any) -> Any: ...
    def logits(self, params: Params, state: Any) -> jax.Array: ...
    def row_weights(self, place: Any, name: str, batch: Batch) -> jax.Array | None: ...


@dataclass(frozen=True)
class Calibration:
    """Data to calibrate with: ``batches`` of tokens ``[B, T]``, or of sources and decoder inputs; and how to walk
    through a model of some configuration."""

    batches: Sequence[Batch]
    walk: Callable[[Any], LayerwiseModel]
    seed: int = 0
    progress: Progress | None = None
    task: str = "solving layers"  # what ``progress`` is told


# What a tap measures. Readings of several batches are added, but that of "largest" is the larger one.


def gram(x_MxI: jax.Array, weight_M: jax.Array | None, sizes_E: jax.Array | None) -> Reading:
    """``gram``: the sum of ``x x^T`` over rows, ``[I, I]``; ``count``: how many rows. ``[E, I, I]`` and ``[E]`` where
    rows are sorted by expert."""
    x_MxI = x_MxI.astype(jnp.float32)
    if sizes_E is not None:
        zeros = jnp.zeros((len(sizes_E), *[x_MxI.shape[-1]] * 2))
        # The gradient of a product of each expert's rows with its matrix is just that sum, in as few operations.
        _, pull = jax.vjp(partial(_ragged, x_MxI, sizes_E), zeros)
        return {"gram": pull(x_MxI)[0], "count": sizes_E.astype(jnp.float32)}
    rows_MxI = x_MxI if weight_M is None else x_MxI * weight_M[:, None]
    product = jnp.matmul(rows_MxI.T, x_MxI, precision=jax.lax.Precision.HIGHEST)
    return {"gram": product, "count": _count(x_MxI, weight_M)}


def moments(x_MxI: jax.Array, weight_M: jax.Array | None, sizes_E: jax.Array | None) -> Reading:
    """``square`` and ``size``: the sums of ``x**2`` and ``|x|`` over rows, ``[I]``; ``largest``: the largest ``|x|``;
    ``count``. A leading ``[E]`` where rows are sorted by expert."""
    size_MxI = jnp.abs(x_MxI.astype(jnp.float32))
    if sizes_E is not None:
        expert_M = jnp.repeat(jnp.arange(len(sizes_E)), sizes_E, total_repeat_length=len(x_MxI))
        of_experts = partial(jax.ops.segment_sum, segment_ids=expert_M, num_segments=len(sizes_E))
        largest = jax.ops.segment_max(size_MxI, expert_M, len(sizes_E))
        return {
            "square": of_experts(size_MxI**2), "size": of_experts(size_MxI), "largest": jnp.maximum(largest, 0),
            "count": sizes_E.astype(jnp.float32),
        }
    size_MxI = size_MxI if weight_M is None else size_MxI * weight_M[:, None]
    return {
        "square": jnp.sum(size_MxI**2, 0), "size": jnp.sum(size_MxI, 0), "largest": jnp.max(size_MxI, 0),
        "count": _count(x_MxI, weight_M),
    }


def histogram(x_MxI: jax.Array, weight_M: jax.Array | None, sizes_E: jax.Array | None) -> Reading:
    """``counts``: how many ``|x|`` lie in each of ``BINS`` bins of equal width on a logarithmic scale (``bin_values``);
    ``largest``: the largest one, ``[1]``. Of all experts together where there are several."""
    size_MxI = jnp.abs(x_MxI.astype(jnp.float32))
    weight_M = jnp.ones(len(x_MxI)) if weight_M is None else weight_M
    size_MxI = size_MxI * weight_M[:, None]
    bins = jnp.floor(64 * (jnp.log2(jnp.maximum(size_MxI, 2.0**-30)) - 16)).astype(jnp.int32) + BINS
    counts = jnp.bincount(jnp.clip(bins, 0, BINS - 1).reshape(-1), length=BINS).astype(jnp.float32)
    return {"counts": counts, "largest": jnp.max(size_MxI).reshape(1)}


def bin_values() -> np.ndarray:
    """The middle of each bin of a histogram, ``[BINS]``."""
    return 2.0 ** (16 + (np.arange(BINS) + 0.5 - BINS) / 64)


def _ragged(x_MxI, sizes_E, w_ExIxI):
    return jax.lax.ragged_dot(x_MxI, w_ExIxI, sizes_E)


def _count(x_MxI: jax.Array, weight_M: jax.Array | None) -> jax.Array:
    return jnp.float32(len(x_MxI)) if weight_M is None else jnp.sum(weight_M)


def _add(a: Reading, b: Reading) -> Reading:
    return {name: (jnp.maximum if name == "largest" else jnp.add)(a[name], b[name]) for name in a}


_add_all = jax.jit(lambda a, b: {name: _add(a[name], b[name]) for name in a})


@dataclass(frozen=True)
class Block:
    """One layer in the hands of a solver: its parameters, and what goes through it.

    ``targets`` are the names of the kernels that the solver is to replace, ``[in, out]`` or ``[experts, in, out]``.
    """

    walk: LayerwiseModel
    params: Params
    place: Any
    layer: Layer
    targets: tuple[str, ...]
    batches: Sequence[Batch]
    states: Sequence[Any]  # what the layer is given, for each batch
    originals: Sequence[Any] = ()  # what it gave before any layer was replaced, for each batch, if that was asked for
    seed: int = 0
    notes: list[str] = field(default_factory=list)  # lines for the user, from any layer

    @property
    def config(self) -> Any:
        return self.walk.config

    def path(self, name: str) -> str:
        return self.place.prefix + name

    def measure(
        self, how: Measure, names: Iterable[str] | None = None, layer: Layer | None = None
    ) -> dict[str, Reading]:
        """What ``how`` measures of the inputs of kernels (default: the targets) over all batches, in the layer as it is
        or as it is given."""
        names, layer = tuple(self.targets if names is None else names), self.layer if layer is None else layer
        total = None
        for batch, state in zip(self.batches, self.states, strict=True):
            new = _read(self.walk, how, names, self.params, self.place, layer, batch, state)
            total = new if total is None else _add_all(total, new)
        return total

    def outputs(self, layer: Layer) -> list[Any]:
        """What the layer gives, with other parameters, for each batch."""
        return _through(self.walk, self.params, self.place, layer, self.batches, self.states)


def _through(walk: LayerwiseModel, params: Params, place: Any, layer: Layer, batches: Sequence[Batch], states: Sequence[Any]):
    return [_advance(walk, params, place, layer, *each) for each in zip(batches, states, strict=True)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _read(walk: LayerwiseModel, how: Measure, names: tuple[str, ...], params, place, layer: Layer, batch, state):
    def total(readings):
        tapped = {
            name: Observer(leaf, readings[name], walk.row_weights(place, name, batch), how) if name in names else leaf
            for name, leaf in layer.items()
        }
        return jnp.sum(walk.run_layer(params, place, tapped, batch, state)[0].astype(jnp.float32))

    def zeros(leaf):
        *experts, n_in, _ = leaf.shape
        sizes = jnp.zeros(experts[0], jnp.int32) if experts else None
        like = jax.eval_shape(partial(how, weight_M=None), jnp.zeros((1, n_in)), sizes_E=sizes)
        return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), like)

    return jax.grad(total)({name: zeros(layer[name]) for name in names})


_enter = jax.jit(lambda walk, *args: walk.embed(*args), static_argnums=0)
_turn = jax.jit(lambda walk, *args: walk.enter_decoder(*args), static_argnums=0)
_advance = jax.jit(lambda walk, *args: walk.run_layer(*args), static_argnums=0)


def layer_of(params: Params, place: Any) -> Layer:
    """The parameters of one layer."""
    return {
        path.removeprefix(place.prefix): jax.tree.map(lambda part: part[place.row], leaf)
        for path, leaf in flatten(params).items()
        if path.startswith(place.prefix)
    }


def solve_blocks(
    config: Any,
    params: Params,
    calibration: Calibration,
    solve: Callable[[Block], Layer],
    targets: Callable[[str], bool],
    notes: list[str],
    originals: bool = False,
) -> list[tuple[Any, Layer]]:
    """Walks through the model and lets ``solve`` replace the parameters of each layer in turn.

    ``targets`` says which paths are to be solved for; a layer that has none is passed through as it is. With
    ``originals`` blocks have them, and twice as many hidden states are in memory. Returns every layer's place and
    parameters (see ``layer_groups.join``), and adds to ``notes``.
    """
    walk = calibration.walk(config)
    places = list(walk.layer_positions())
    batches = calibration.batches
    states = [_enter(walk, params, batch) for batch in batches]
    dense = states if originals else ()
    keep = np.asarray if sum(x.nbytes for x in jax.tree.leaves((states, dense))) > _ON_DEVICE else lambda x: x
    solved, side = [], places[0].side
    for done, place in enumerate(places):
        if place.side != side:
            states, dense = (
                [_turn(walk, params, *each) for each in zip(batches, some, strict=True)] if some else some
                for some in (states, dense)
            )
            side = place.side
        layer = layer_of(params, place)
        if originals:
            dense = _through(walk, params, place, layer, batches, dense)
        states, dense = jax.tree.map(keep, (states, dense))
        names = tuple(name for name in layer if targets(place.prefix + name))
        block = Block(walk, params, place, layer, names, batches, states, dense, calibration.seed + done, notes)
        if names:
            layer = solve(block)
        solved.append((place, layer))
        if done + 1 < len(places):
            states = block.outputs(layer)
        if calibration.progress is not None:
            calibration.progress(calibration.task, done + 1, len(places))
    return solved
