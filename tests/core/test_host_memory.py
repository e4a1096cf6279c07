"""Memory that the process asks for."""

from __future__ import annotations

import mmap
import resource

import numpy as np
import pytest

from jaxlm.core.host_memory import fresh_pages


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1025, 1027)])
def test_fresh_pages_are_zeros_and_aligned(shape):
    array = fresh_pages(shape, np.dtype(np.float32))
    assert array.shape == shape and array.dtype == np.float32 and not array.any()
    assert array.ctypes.data % 64 == 0
    array += 1
    assert array.sum() == array.size


def gives_at_once() -> bool:
    """Whether this kernel knows MADV_POPULATE_WRITE (Linux 5.14)."""
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(23)
    except (OSError, AttributeError):
        return False
    return True


@pytest.mark.skipif(not gives_at_once(), reason="this kernel gives pages only as they are written (Linux before 5.14)")
def test_large_ones_are_there_before_they_are_written():
    array = fresh_pages((1 << 24,), np.dtype(np.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array[:: resource.getpagesize()] = 1
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults <= 1000
    assert array.sum() == (1 << 24) // resource.getpagesize()
