"""The report of a compression: size, representation and error of each tensor, for ``compression.json`` and tables."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxlm.compression.platforms import describe_leaf
from jaxlm.core.leaves import dequantize
from jaxlm.core.tree import Leaf, Params, flatten

_LAYER_GROUP = re.compile(r"layers/\d+/")


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a compressed model.

    Attributes:
        path, shape: of the tensor; the shape is the dense one.
        representation: in words, as ``int4 g128``.
        storage: how its bytes are coded in the file.
        bits: all that is stored, scales and zero points too, for each weight of the dense tensor.
        sparsity: the share of weights that are exactly zero.
        bytes: its size in the file.
        relative_error: ``|W - W'| / |W|`` (Frobenius); None where weights cannot be compared.
    """

    path: str
    shape: tuple[int, ...]
    representation: str
    storage: str
    bits: float
    sparsity: float
    bytes: int
    relative_error: float | None

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def report(before: Params | None, after: Params, stored: Mapping[str, tuple[int, str]]) -> list[TensorReport]:
    """A report of each tensor, in the order of the tree. Layers may be in other layer groups than before.

    Args:
        before: the dense parameters; None: no errors are computed.
        after: the compressed parameters. A tensor whose shape changed has no error.
        stored: the bytes of each path in the file and how they are coded (``checkpoint.storage.stored``).
    """
    dense = {} if before is None else _by_layer(before)
    rows, begin = [], Counter()
    for path, leaf in flatten(after).items():
        name = _LAYER_GROUP.sub("layers/*/", path)
        old = dense.get(name)
        if name != path and old is not None:
            old = old[begin[name] : begin[name] + leaf.shape[0]]
            begin[name] += leaf.shape[0]
        zeros, error = _compare(old if old is not None and old.shape == leaf.shape else None, leaf)
        size, storage = stored[path]
        bits, error = 8 * size / math.prod(leaf.shape), None if error is None else float(error)
        kind = describe_leaf(leaf)
        rows.append(TensorReport(path, tuple(leaf.shape), kind, storage, bits, float(zeros), size, error))
    return rows


def _by_layer(params: Params) -> dict[str, jax.Array]:
    """The leaves by path, those of all layer groups of a stack concatenated."""
    joined: dict[str, list] = {}
    for path, leaf in flatten(params).items():
        joined.setdefault(_LAYER_GROUP.sub("layers/*/", path), []).append(leaf)
    return {name: parts[0] if len(parts) == 1 else _join(parts) for name, parts in joined.items()}


def _join(parts: list[jax.Array]) -> jax.Array | None:
    return jnp.concatenate(parts) if len({part.shape[1:] for part in parts}) == 1 else None


@jax.jit
def _compare(dense: jax.Array | None, leaf: Leaf) -> tuple[jax.Array, jax.Array | None]:
    now = dequantize(leaf, jnp.float32)
    if dense is None:
        return jnp.mean(now == 0), None
    dense = dense.astype(jnp.float32)
    norm = jnp.linalg.norm(dense)
    return jnp.mean(now == 0), jnp.where(norm > 0, jnp.linalg.norm(dense - now) / norm, 0)


def summary(rows: list[TensorReport]) -> TensorReport:
    """One report of all tensors together, weighted by their sizes; it has no error."""
    count = sum(math.prod(row.shape) for row in rows)
    size = sum(row.bytes for row in rows)
    zeros = sum(row.sparsity * math.prod(row.shape) for row in rows)
    kinds = " / ".join(dict.fromkeys(row.representation for row in rows))
    return TensorReport("all", (count,), kinds, "", 8 * size / count, zeros / count, size, None)
