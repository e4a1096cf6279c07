"""Checksums on devices: every bit counts, sharding does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoint.checksums import array_checksums, first_mismatch
from jaxlm.core.sharding import make_mesh

DTYPES = ("float32", "bfloat16", "float16", "int8", "uint8", "int32", "uint32", "bool", "float8_e4m3fn")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_sum_is_what_it_says(rng):
    words = rng.integers(0, 2**32, (3, 5), np.uint32)
    expected = sum((2 * i + 1) * int(word) for i, word in enumerate(words.flat)) % 2**32
    assert array_checksums({"x": jnp.asarray(words)}) == {"x": ["uint32", [3, 5], expected]}
    assert array_checksums({"x": jnp.asarray(words.view(np.float32))}) == {"x": ["float32", [3, 5], expected]}
    assert array_checksums({"x": jnp.arange(-2, 3, dtype=jnp.int4)}) == {"x": ["int4", [5], 254 + 3 * 255 + 7 + 18]}
    found = array_checksums({"x": jnp.zeros((0, 3)), "y": jnp.int32(7)})
    assert found == {"x": ["float32", [0, 3], 0], "y": ["int32", [], 7]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(rng, dtype):
    dtype = jnp.dtype(dtype)
    array = rng.integers(0, 2, 12).astype(bool) if dtype.kind == "b" else rng.normal(0, 9, 12).astype(dtype)
    expected = array_checksums({"x": jnp.asarray(array)})
    for byte in range(array.nbytes):
        for bit in range(1 if dtype.kind == "b" else 8):
            data = bytearray(array.tobytes())
            data[byte] ^= 1 << bit
            flipped = jnp.asarray(np.frombuffer(bytes(data), dtype))
            assert first_mismatch({"x": flipped}, expected) == "x"
    swapped = jnp.asarray(array[[1, 0, *range(2, 12)]])
    assert first_mismatch({"x": swapped}, expected) == ("x" if array[0] != array[1] else None)


def test_types_and_shapes_count(rng):
    array = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    expected = array_checksums({"x": array})
    for other in (array.reshape(6, 4), array.view(jnp.int32), array.astype(jnp.bfloat16)):
        assert first_mismatch({"x": other}, expected) == "x"
    assert first_mismatch({"x": array}, {}) == "x"
    older = {"x": [expected["x"][0], expected["x"][2]]}  # without shapes
    assert first_mismatch({"x": array}, older) is None and first_mismatch({"x": array + 1}, older) == "x"


def test_sharding_does_not(rng):
    array = jnp.asarray(rng.normal(size=(16, 8)).astype(ml_dtypes.bfloat16))
    expected = array_checksums({"x": array})
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for spec in (PartitionSpec("fsdp", "tensor"), PartitionSpec(None, ("data", "fsdp")), PartitionSpec()):
        for memory in ("device", "pinned_host"):
            placed = jax.device_put(array, NamedSharding(mesh, spec, memory_kind=memory))
            assert first_mismatch({"x": placed}, expected) is None
