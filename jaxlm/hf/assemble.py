"""Assembling arrays on devices from parts on the host, such as the layers of a stack."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.core.host_memory import fresh_pages, host_threads

__all__ = ["FillPart", "assemble_array", "copy_into"]

FillPart = Callable[[np.ndarray, tuple[slice, ...]], None]  # (out, index): writes part[index] into out
_STRIP_ROWS = 16  # a cache line of float32
_MIN_THREADED_SIZE = 1 << 18  # elements; smaller arrays are copied faster by one thread


def assemble_array(
    shape: tuple[int, ...], dtype: np.dtype, parts: Mapping[tuple[int, ...], FillPart], target: NamedSharding | None
) -> jax.Array:
    """An array of this shape from its parts.

    The host holds at most one part beyond the memory of its own devices.

    Args:
        parts: index into the leading dimensions (() for the whole array) -> what fills that part.
        target: how the array is sharded; None leaves it uncommitted on the default device.
    """
    depth = len(next(iter(parts)))
    if not depth or _on_host(target):
        return _make(shape, target, partial(_fill_slice, shape, dtype, parts))
    buffer = jnp.zeros(shape, dtype, device=target)
    inner = None if target is None else NamedSharding(target.mesh, PartitionSpec(*target.spec[depth:]))
    for index, fill in parts.items():  # the device holds the array, the host one part at a time
        part = _make(shape[depth:], inner, partial(_fill_slice, shape[depth:], dtype, {(): fill}))
        buffer = _write_part(buffer, jax.block_until_ready(part), tuple(map(np.int32, index)), out=target)
    return buffer


def _on_host(target: NamedSharding | None) -> bool:
    """Whether the devices keep their arrays in this process's memory: then the array is assembled there directly."""
    platform = jax.default_backend() if target is None else target.mesh.devices.flat[0].platform
    return platform == "cpu"


def _make(shape: tuple[int, ...], target: NamedSharding | None, get: Callable[..., np.ndarray]) -> jax.Array:
    if target is None:
        return jax.device_put(get((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, target, get)


def _fill_slice(
    shape: tuple[int, ...], dtype: np.dtype, parts: Mapping[tuple[int, ...], FillPart], index: tuple[slice, ...]
) -> np.ndarray:
    """``array[index]`` of the array of this shape that has these parts."""
    ranges = [range(size)[each] for size, each in zip(shape, index, strict=True)]
    out = fresh_pages(tuple(map(len, ranges)), dtype)
    for at, fill in parts.items():
        if all(i in each for i, each in zip(at, ranges, strict=False)):
            fill(out[(*(each.index(i) for i, each in zip(at, ranges, strict=False)), ...)], index[len(at) :])
    return out


@partial(jax.jit, static_argnames="out", donate_argnames="buffer")
def _write_part(
    buffer: jax.Array, part: jax.Array, index: tuple[np.int32, ...], *, out: NamedSharding | None
) -> jax.Array:
    """The buffer, which is donated, with ``part`` at ``index`` of its leading dimensions."""
    part = part.reshape((1,) * len(index) + part.shape)
    buffer = jax.lax.dynamic_update_slice(buffer, part, (*index, *[np.int32(0)] * (buffer.ndim - len(index))))
    return buffer if out is None else jax.lax.with_sharding_constraint(buffer, out)


def copy_into(out: np.ndarray, array: np.ndarray) -> None:
    """``out[...] = array``. A few threads copy a large matrix, a transposed one in strips that fit the cache, which is
    eight times as fast."""
    if array.ndim != 2 or array.size < _MIN_THREADED_SIZE:
        out[...] = array
        return
    if array.strides[0] < array.strides[1]:
        out, array = out.T, array.T  # in the order of the file, which is converted faster
    workers = min(4, os.cpu_count() or 1)
    ends = [len(array) * i // workers for i in range(workers + 1)]

    def rows(start: int, end: int) -> None:
        for i in range(start, end, _STRIP_ROWS):
            strip = slice(i, min(i + _STRIP_ROWS, end))
            out[strip] = array[strip].astype(out.dtype, copy=False)

    list(host_threads().map(rows, ends[:-1], ends[1:]))
