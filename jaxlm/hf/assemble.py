"""Arrays of a device made of pieces on the host, such as the layers of a stack, which are put where they belong."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.core.host_memory import fresh_pages

__all__ = ["Fill", "assemble", "copy"]

Fill = Callable[[np.ndarray, tuple[slice, ...]], None]  # writes what the index gives of a piece into an array
_STRIP = 16  # rows: a line of the cache in float32
_LARGE = 1 << 18  # numbers, for which threads are worth it


def assemble(
    shape: tuple[int, ...], dtype: np.dtype, pieces: Mapping[tuple[int, ...], Fill], target: NamedSharding | None
) -> jax.Array:
    """The array of this shape whose part at each index (of the leading dimensions, () being the whole) is a piece.

    Without a target it is not bound to a device. The host holds what its devices keep, and one piece beyond that.
    """
    depth = len(next(iter(pieces)))
    if not depth or _on_host(target):
        return _made(shape, target, partial(_part, shape, dtype, pieces))
    buffer = jnp.zeros(shape, dtype, device=target)
    inner = None if target is None else NamedSharding(target.mesh, PartitionSpec(*target.spec[depth:]))
    for at, fill in pieces.items():  # the device holds what is put together, the host one piece at a time
        piece = _made(shape[depth:], inner, partial(_part, shape[depth:], dtype, {(): fill}))
        buffer = _put(buffer, jax.block_until_ready(piece), tuple(map(np.int32, at)), out=target)
    return buffer


def _on_host(target: NamedSharding | None) -> bool:
    """Whether the arrays of its devices lie in this process's memory, where they need not be put together twice."""
    platform = jax.default_backend() if target is None else target.mesh.devices.flat[0].platform
    return platform == "cpu"


def _made(shape: tuple[int, ...], target: NamedSharding | None, part: Callable[..., np.ndarray]) -> jax.Array:
    if target is None:
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, target, part)


def _part(
    shape: tuple[int, ...], dtype: np.dtype, pieces: Mapping[tuple[int, ...], Fill], index: tuple[slice, ...]
) -> np.ndarray:
    """What the index gives of an array of this shape."""
    ranges = [range(size)[each] for size, each in zip(shape, index, strict=True)]
    out = fresh_pages(tuple(map(len, ranges)), dtype)
    for at, fill in pieces.items():
        if all(i in each for i, each in zip(at, ranges, strict=False)):
            fill(out[(*(each.index(i) for i, each in zip(at, ranges, strict=False)), ...)], index[len(at) :])
    return out


@partial(jax.jit, static_argnames="out", donate_argnames="buffer")
def _put(buffer: jax.Array, piece: jax.Array, at: tuple[np.int32, ...], *, out: NamedSharding | None) -> jax.Array:
    """The piece written into a buffer, which is given up."""
    piece = piece.reshape((1,) * len(at) + piece.shape)
    buffer = jax.lax.dynamic_update_slice(buffer, piece, (*at, *[np.int32(0)] * (buffer.ndim - len(at))))
    return buffer if out is None else jax.lax.with_sharding_constraint(buffer, out)


def copy(out: np.ndarray, array: np.ndarray) -> None:
    """``out[...] = array``: a large matrix by a few cores, and a transposed one in strips that stay in the cache, which
    is eight times as fast."""
    if array.ndim != 2 or array.size < _LARGE:
        out[...] = array
        return
    if array.strides[0] < array.strides[1]:
        out, array = out.T, array.T  # as it lies in the file, which is the faster way to convert it
    workers = min(4, os.cpu_count() or 1)
    ends = [len(array) * i // workers for i in range(workers + 1)]

    def rows(start: int, end: int) -> None:
        for i in range(start, end, _STRIP):
            strip = slice(i, min(i + _STRIP, end))
            out[strip] = array[strip].astype(out.dtype, copy=False)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(rows, ends[:-1], ends[1:]))
