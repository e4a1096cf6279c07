"""Checksums of arrays, computed on the devices that hold them; the sharding does not change them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.sharding import on_device

__all__ = ["array_checksums", "first_mismatch"]

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def array_checksums(arrays: Mapping[str, Any]) -> dict[str, list[Any]]:
    """For each path the type and shape of its array and a sum that any flipped bit changes. JSON-safe.

    All processes must call this with the same arrays.
    """
    # Fetched one at a time: many programs with collectives in flight at once can lock up XLA on CPU.
    return {
        path: [str(array.dtype), list(array.shape), int(_sum(on_device(array, array.sharding)))]
        for path, array in arrays.items() if isinstance(array, jax.Array)
    }


def first_mismatch(arrays: Mapping[str, jax.Array], expected: Mapping[str, list[Any]]) -> str | None:
    """The path of an array whose checksum is missing or not the expected one; None if there is none. In older files
    checksums are without shapes."""
    for path, found in array_checksums(arrays).items():
        if path not in expected or expected[path] not in (found, [found[0], found[2]]):
            return path
    return None


@jax.jit
def _sum(array: jax.Array) -> jax.Array:
    """The sum of (2 i + 1) w_i modulo 2**32 over the words w_i of the array. The factors are odd, so no bit is lost,
    and differ from word to word; the order of the additions does not matter."""
    words = array.astype(jnp.int8) if array.dtype.name in ("bool", "int4", "uint4") else array
    if not jnp.issubdtype(words.dtype, jnp.unsignedinteger):
        words = jax.lax.bitcast_convert_type(words, _WORDS[words.dtype.itemsize])
    at = jnp.zeros((1,) * words.ndim, jnp.uint32)
    for axis, size in enumerate(words.shape):
        at = at * jnp.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, tuple(size if each == axis else 1 for each in range(words.ndim)), axis
        )
    return jnp.sum(words.astype(jnp.uint32) * (2 * at + 1), dtype=jnp.uint32)
