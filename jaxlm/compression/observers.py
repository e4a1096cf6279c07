"""Observers: the statistics that calibration takes of the inputs of a layer's kernels.

An observer is a function that ``core.leaves.Observer`` calls with the rows ``[M, in]`` that a kernel multiplies.
Statistics of several batches are added; of the one named "largest" the larger is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Observe", "Statistics", "add_statistics", "bin_values", "gram", "histogram", "moments"]

Statistics = Mapping[str, jax.Array]
# (rows [M, in], weights of the rows [M] or None, numbers of rows of each expert [E] or None) -> statistics
Observe = Callable[[jax.Array, jax.Array | None, jax.Array | None], Statistics]

BINS = 2048  # of a histogram: 64 for each power of two; the last bin ends at 2**16


def gram(x_MxI: jax.Array, weight_M: jax.Array | None, sizes_E: jax.Array | None) -> Statistics:
    """``gram``: the sum of ``x x^T`` over rows, ``[I, I]``; ``count``: the number of rows. ``[E, I, I]`` and ``[E]``
    where the rows are sorted by expert."""
    x_MxI = x_MxI.astype(jnp.float32)
    if sizes_E is not None:
        zeros = jnp.zeros((len(sizes_E), *[x_MxI.shape[-1]] * 2))
        # The gradient of the product of each expert's rows with its matrix is just that sum, in as few operations.
        _, pull = jax.vjp(partial(_ragged_dot, x_MxI, sizes_E), zeros)
        return {"gram": pull(x_MxI)[0], "count": sizes_E.astype(jnp.float32)}
    rows_MxI = x_MxI if weight_M is None else x_MxI * weight_M[:, None]
    product = jnp.matmul(rows_MxI.T, x_MxI, precision=jax.lax.Precision.HIGHEST)
    return {"gram": product, "count": _count(x_MxI, weight_M)}


def moments(x_MxI: jax.Array, weight_M: jax.Array | None, sizes_E: jax.Array | None) -> Statistics:
    """``square`` and ``size``: the sums of ``x**2`` and ``|x|`` over rows, ``[I]``; ``largest``: the largest ``|x|``;
    ``count``: the number of rows. With a leading ``[E]`` where the rows are sorted by expert."""
    size_MxI = jnp.abs(x_MxI.astype(jnp.float32))
    if sizes_E is not None:
        expert_M = jnp.repeat(jnp.arange(len(sizes_E)), sizes_E, total_repeat_length=len(x_MxI))
        sum_by_expert = partial(jax.ops.segment_sum, segment_ids=expert_M, num_segments=len(sizes_E))
        largest = jax.ops.segment_max(size_MxI, expert_M, len(sizes_E))
        return {
            "square": sum_by_expert(size_MxI**2), "size": sum_by_expert(size_MxI), "largest": jnp.maximum(largest, 0),
            "count": sizes_E.astype(jnp.float32),
        }
    size_MxI = size_MxI if weight_M is None else size_MxI * weight_M[:, None]
    return {
        "square": jnp.sum(size_MxI**2, 0), "size": jnp.sum(size_MxI, 0), "largest": jnp.max(size_MxI, 0),
        "count": _count(x_MxI, weight_M),
    }


def histogram(x_MxI: jax.Array, weight_M: jax.Array | None, sizes_E: jax.Array | None) -> Statistics:
    """``counts``: the number of ``|x|`` in each of ``BINS`` bins of equal width on a logarithmic scale
    (``bin_values``); ``largest``: the largest ``|x|``, ``[1]``. All experts share one histogram."""
    size_MxI = jnp.abs(x_MxI.astype(jnp.float32))
    weight_M = jnp.ones(len(x_MxI)) if weight_M is None else weight_M
    size_MxI = size_MxI * weight_M[:, None]
    bins = jnp.floor(64 * (jnp.log2(jnp.maximum(size_MxI, 2.0**-30)) - 16)).astype(jnp.int32) + BINS
    counts = jnp.bincount(jnp.clip(bins, 0, BINS - 1).reshape(-1), length=BINS).astype(jnp.float32)
    return {"counts": counts, "largest": jnp.max(size_MxI).reshape(1)}


def bin_values() -> np.ndarray:
    """The middle of each bin of a histogram, ``[BINS]``."""
    return 2.0 ** (16 + (np.arange(BINS) + 0.5 - BINS) / 64)


@jax.jit
def add_statistics(a: dict[str, Statistics], b: dict[str, Statistics]) -> dict[str, Statistics]:
    """The statistics of two batches as those of one, by kernel."""
    return {name: _add(a[name], b[name]) for name in a}


def _add(a: Statistics, b: Statistics) -> Statistics:
    return {name: (jnp.maximum if name == "largest" else jnp.add)(a[name], b[name]) for name in a}


def _ragged_dot(x_MxI, sizes_E, w_ExIxI):
    return jax.lax.ragged_dot(x_MxI, w_ExIxI, sizes_E)


def _count(x_MxI: jax.Array, weight_M: jax.Array | None) -> jax.Array:
    return jnp.float32(len(x_MxI)) if weight_M is None else jnp.sum(weight_M)
