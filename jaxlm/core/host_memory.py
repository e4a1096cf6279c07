"""Memory of the host: freed pages that stay with the process, and arrays in host memory."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import jax
import numpy as np
from jax.experimental import multihost_utils

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14
_LARGE = 1 << 22  # bytes of an array for which threads are worth their start
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # of glibc's malloc.h


@functools.cache
def keep_freed_memory() -> None:
    """On the CPU backend, tells glibc to keep freed memory for the next step instead of returning it to the kernel.

    By default every array above a threshold is mapped and unmapped again, and the kernel zeroes hundreds of megabytes a
    step, page by page. Measured on two cores: a training step of configs/shakespeare.py went from 50 to 35 ms, and the
    kernel took a quarter of the time of configs/books.py. Without glibc this does nothing.
    """
    if jax.default_backend() == "cpu" and (mallopt := _mallopt()):
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never
        mallopt(_TOP_PAD, 64 << 20)  # bytes to ask for beyond what is needed


def share_one_heap() -> None:
    """Tells glibc to let all threads that start from now on allocate from one heap.

    By default each has a heap of its own, which keeps what the largest request took. Measured with a server: 1.47 times
    its memory after requests of a mebibyte, and 1.03 times with one heap, at the same speed.
    """
    if mallopt := _mallopt():
        mallopt(_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Has glibc return to the system what was freed; with another C library this does nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, TypeError, AttributeError):
        return


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's ``mallopt``; None where there is another C library."""
    try:
        return ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return None


def fresh_pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of zeros on pages of its own: aligned, so that JAX on CPU uses it without a copy.

    If Linux supports it, several threads request all pages at once. Pages that are mapped one by one when they are
    written take twice the work, and most of the time of reading a large model. Huge pages, which numpy requests, take
    five times as long where the kernel's memory is fragmented.
    """
    memory = mmap.mmap(-1, max(math.prod(shape) * dtype.itemsize, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if array.nbytes < _LARGE or madvise is None:
        return array
    parts = [  # an older kernel refuses, and maps pages later
        host_threads().submit(
            madvise, ctypes.c_void_p(array.ctypes.data + start), ctypes.c_size_t(min(_LARGE, array.nbytes - start)),
            _POPULATE_WRITE,
        )
        for start in range(0, array.nbytes, _LARGE)
    ]
    wait(parts)
    return array


@functools.cache
def host_threads() -> ThreadPoolExecutor:
    """A few threads that go over memory. They are started once: a model has hundreds of tensors to read."""
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1), "jaxlm-memory")


def on_host(array: jax.Array) -> np.ndarray:
    """The whole array in host memory. If several processes hold parts of it, all of them must call."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
