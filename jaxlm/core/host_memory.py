"""The process that runs on the host: where its memory comes from, and arrays in it."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14
_LARGE = 1 << 22  # bytes, for which threads are worth it
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


@functools.cache
def keep_freed_memory() -> None:
    """Where computation is on the CPU, tells glibc to keep freed memory for the next step instead of giving it back.

    By default every array above a threshold is mapped afresh and unmapped again: the kernel then zeroes hundreds of
    megabytes a step, page by page. Measured on two cores: a training step of configs/shakespeare.py went from 50 to 35
    ms, and a quarter of the time of configs/books.py was the kernel's. Elsewhere than in glibc it does nothing.
    """
    if jax.default_backend() != "cpu":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)  # never
    mallopt(_TOP_PAD, 64 << 20)  # bytes to ask for beyond what is needed


def fresh_pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array on pages of its own, zeros: aligned, so JAX on CPU takes it over without a copy.

    Where Linux can, a few cores ask it for all pages at once: one by one as they are written takes twice the work, and
    most of the time that it takes to read a large model. Huge pages, which numpy asks for, take five times as long
    where a kernel's memory is scattered.
    """
    memory = mmap.mmap(-1, max(math.prod(shape) * dtype.itemsize, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if array.nbytes < _LARGE or madvise is None:
        return array
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # what an older kernel refuses, it gives later
        for start in range(0, array.nbytes, _LARGE):  # in parts, for no thread can start while one asks
            size = min(_LARGE, array.nbytes - start)
            pool.submit(madvise, ctypes.c_void_p(array.ctypes.data + start), ctypes.c_size_t(size), _POPULATE_WRITE)
    return array


def on_host(array: jax.Array) -> np.ndarray:
    """An array in host memory, whole, wherever its parts are; where several processes hold them, all must call."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
