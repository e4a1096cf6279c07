"""Parameters as a tree: paths, maps, and transforms of the tree.

``Params`` is an ``nnx.State`` whose leaves are ``nnx.Param`` variables. A variable holds an array or another
representation of it (``jaxlm.core.leaves``) and, as metadata, the logical ``axes`` with which it was created. A
``Transform`` is any function from Params to Params: a compression, or what training does to weights in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm.core.errors import UserError
from jaxlm.core.untrusted import Pattern

Params = nnx.State
Transform = Callable[[Params], Params]
Leaf = Any  # an array, its abstract shape, or one of ``jaxlm.core.leaves``


def path_str(path: tuple) -> str:
    """``("layers", 0, "attn", "q", "kernel")`` as ``"layers/0/attn/q/kernel"``."""
    return "/".join(str(part) for part in path)


def flatten(params: Params) -> dict[str, Leaf]:
    """Path -> leaf, in the order of the tree."""
    return {path_str(path): variable.get_value() for path, variable in nnx.to_flat_state(params)}


def unflatten(like: Params, leaves: dict[str, Leaf]) -> Params:
    """``like`` with other leaves.

    Raises:
        ValueError: when the paths of ``leaves`` are not those of ``like``.
    """
    flat = nnx.to_flat_state(like)
    paths = [path_str(path) for path, _ in flat]
    if differing := set(paths).symmetric_difference(leaves):
        raise ValueError(f"unflatten: paths differ: {', '.join(sorted(differing)[:5])}")
    return nnx.from_flat_state(
        (path, variable.replace(leaves[name])) for name, (path, variable) in zip(paths, flat, strict=True)
    )


def map_params(fn: Callable[[str, Leaf], Leaf], params: Params) -> Params:
    """``fn(path, leaf)`` in place of every leaf."""
    return nnx.from_flat_state(
        (path, variable.replace(fn(path_str(path), variable.get_value())))
        for path, variable in nnx.to_flat_state(params)
    )


def rule(pattern: str, fn: Callable[[Leaf], Leaf]) -> Transform:
    """A Transform that applies ``fn`` to the leaves whose whole path matches the regular expression.

    Raises:
        UserError: by the Transform, when no path matches.
    """
    matches = Pattern(pattern, "a rule").fullmatch

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
    """The number of weights of the dense model."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())


def count_bytes(params: Params) -> int:
    """Bytes of the arrays of the tree; types of less than a byte (int4) count by their bits."""
    return sum(dtype_bits(array.dtype) * int(np.prod(array.shape)) // 8 for array in jax.tree.leaves(params))


def dtype_bits(dtype) -> int:
    """The bits of one number. (``dtype.itemsize`` of int4 is one byte.)"""
    dtype = jax.numpy.dtype(dtype)
    if jax.numpy.issubdtype(dtype, jax.numpy.integer):
        return jax.numpy.iinfo(dtype).bits
    if jax.numpy.issubdtype(dtype, jax.numpy.floating):
        return jax.numpy.finfo(dtype).bits
    return dtype.itemsize * 8
