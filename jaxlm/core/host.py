"""The process that runs on the host: its memory allocator."""

from __future__ import annotations

import ctypes
import functools

import jax

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
