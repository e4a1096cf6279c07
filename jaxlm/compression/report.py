"""What compression did to each tensor: one row a parameter, for ``compression.json`` and for tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.compression.placement import describe
from jaxlm.core.leaves import dequantize
from jaxlm.core.tree import Leaf, Params, flatten


@dataclass(frozen=True)
class Row:
    """One tensor. ``bits`` counts everything stored, scales and zeros too, a weight of the dense tensor."""

    path: str
    shape: tuple[int, ...]
    representation: str
    storage: str
    bits: float
    sparsity: float
    bytes: int
    relative_error: float

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def report(before: Params, after: Params, stored: Mapping[str, tuple[int, str]]) -> list[Row]:
    """Rows in the tree's order.

    ``stored`` gives each path's bytes in the file and how they are coded (``checkpoint.formats.stored``).
    ``sparsity`` is the share of weights that are exactly zero; ``relative_error`` is ``|W - W'| / |W|`` (Frobenius).
    """
    dense = flatten(before)
    return [_row(path, dense[path], leaf, *stored[path]) for path, leaf in flatten(after).items()]


def _row(path: str, dense: jax.Array, leaf: Leaf, size: int, storage: str) -> Row:
    zeros, error = _compare(dense, leaf)
    bits = 8 * size / math.prod(leaf.shape)
    return Row(path, tuple(leaf.shape), describe(leaf), storage, bits, float(zeros), size, float(error))


@jax.jit
def _compare(dense: jax.Array, leaf: Leaf) -> tuple[jax.Array, jax.Array]:
    dense = dense.astype(jnp.float32)
    now = dequantize(leaf, jnp.float32)
    norm = jnp.linalg.norm(dense)
    return jnp.mean(now == 0), jnp.where(norm > 0, jnp.linalg.norm(dense - now) / norm, 0)


def summary(rows: list[Row]) -> Row:
    """All tensors as one row, weighted by their sizes; its error is not defined and NaN."""
    count = sum(math.prod(row.shape) for row in rows)
    size = sum(row.bytes for row in rows)
    zeros = sum(row.sparsity * math.prod(row.shape) for row in rows)
    kinds = " / ".join(dict.fromkeys(row.representation for row in rows))
    return Row("all", (count,), kinds, "", 8 * size / count, zeros / count, size, math.nan)
