"""Parameters as a tree: paths, maps, rules and their composition.

``Params`` is an ``nnx.State`` whose leaves are ``nnx.Param`` variables; a variable holds an array or a compressed
leaf (``jaxlm.core.leaves``) and, as metadata, the logical ``axes`` it was created with. A ``Transform`` is any
function from Params to Params; every compression and every training-time trick is one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm.core.errors import UserError

Params = nnx.State
Transform = Callable[[Params], Params]
Leaf = Any  # an array, its abstract shape, or a compressed leaf


def path_str(path: tuple) -> str:
    """``("layers", 0, "attn", "q", "kernel")`` as ``"layers/0/attn/q/kernel"``."""
    return "/".join(str(part) for part in path)


def flatten(params: Params) -> dict[str, Leaf]:
    """Path -> leaf, in the tree's order; compressed leaves are kept whole."""
    return {path_str(path): variable.get_value() for path, variable in nnx.to_flat_state(params)}


def unflatten(like: Params, leaves: dict[str, Leaf]) -> Params:
    """``like`` with its leaves replaced by ``leaves``, which must name every path of it and no other."""
    flat = nnx.to_flat_state(like)
    paths = [path_str(path) for path, _ in flat]
    if differing := set(paths).symmetric_difference(leaves):
        raise ValueError(f"unflatten: paths differ: {', '.join(sorted(differing)[:5])}")
    return nnx.from_flat_state(
        (path, variable.replace(leaves[name])) for name, (path, variable) in zip(paths, flat, strict=True)
    )


def map_params(fn: Callable[[str, Leaf], Leaf], params: Params) -> Params:
    """``fn(path, leaf)`` over every leaf; compressed leaves are given whole."""
    return nnx.from_flat_state(
        (path, variable.replace(fn(path_str(path), variable.get_value())))
        for path, variable in nnx.to_flat_state(params)
    )


def rule(pattern: str, fn: Callable[[Leaf], Leaf]) -> Transform:
    """A Transform that applies ``fn`` to the leaves whose whole path matches the regular expression.

    Raises UserError when a tree has no such leaf: a rule that silently does nothing is a mistake.
    """
    matches = re.compile(pattern).fullmatch

    def transform(params: Params) -> Params:
        if not any(matches(path) for path in flatten(params)):
            raise UserError(
                f"no parameter matches {pattern!r}; the paths look like {', '.join(list(flatten(params))[:3])}"
            )
        return map_params(lambda path, leaf: fn(leaf) if matches(path) else leaf, params)

    return transform


def compose(*transforms: Transform) -> Transform:
    """The Transform that applies the given ones from left to right."""

    def transform(params: Params) -> Params:
        for each in transforms:
            params = each(params)
        return params

    return transform


def count_params(params: Params) -> int:
    """Weights of the dense model: a compressed leaf counts as what it stands for."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())


def count_bytes(params: Params) -> int:
    """Bytes that the arrays of the tree hold, with sub-byte types (int4) counted by their bits."""
    return sum(dtype_bits(array.dtype) * int(np.prod(array.shape)) // 8 for array in jax.tree.leaves(params))


def dtype_bits(dtype) -> int:
    """Of one number; ``dtype.itemsize`` says one byte for int4; ``finfo``/``iinfo`` know better."""
    dtype = jax.numpy.dtype(dtype)
    if jax.numpy.issubdtype(dtype, jax.numpy.integer):
        return jax.numpy.iinfo(dtype).bits
    if jax.numpy.issubdtype(dtype, jax.numpy.floating):
        return jax.numpy.finfo(dtype).bits
    return dtype.itemsize * 8
