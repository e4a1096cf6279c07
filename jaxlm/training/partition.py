"""Which arrays of a model are trained, and which are frozen."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.core.leaves import LoRA, is_leaf
from jaxlm.core.tree import Leaf

__all__ = ["Partition"]

_PARTS = ("a", "b", "magnitude")  # the trained arrays of an adapter


class Partition:
    """Splits flat parameters (``core.tree.flatten``) into trained and frozen ones, and joins them again.

    Where the model has adapters, only these are trained: each ``LoRA`` leaf at PATH gives the arrays PATH/a, PATH/b
    and, with DoRA, PATH/magnitude. Otherwise every plain array of floats is trained. Both halves keep the order of the
    model.
    """

    def __init__(self, flat: dict[str, Leaf]):
        """``flat``: the model's parameters; shapes are enough."""
        self.adapted = frozenset(path for path, leaf in flat.items() if isinstance(leaf, LoRA))
        self.whole = frozenset(path for path, leaf in flat.items() if not self.adapted and _is_floats(leaf))

    def split(self, flat: dict[str, Leaf]) -> tuple[dict[str, jax.Array], dict[str, Leaf]]:
        """(trained, frozen) parameters, or anything of the same structure, such as shardings."""
        trained, frozen = {}, {}
        for path, leaf in flat.items():
            if path in self.whole:
                trained[path] = leaf
            elif path in self.adapted:
                parts = {part: getattr(leaf, part) for part in _PARTS if getattr(leaf, part) is not None}
                trained |= {f"{path}/{part}": array for part, array in parts.items()}
                frozen[path] = dataclasses.replace(leaf, **dict.fromkeys(parts))
            else:
                frozen[path] = leaf
        return trained, frozen

    def join(
        self, trained: dict[str, jax.Array], frozen: dict[str, Leaf], key: jax.Array | None = None
    ) -> dict[str, Leaf]:
        """The inverse of ``split``; ``extra`` arrays are left out. With a ``key`` adapters apply their dropout, each
        layer with its own mask."""
        flat = {path: leaf for path, leaf in trained.items() if path in self.whole}
        for index, (path, leaf) in enumerate(frozen.items()):
            if path in self.adapted:
                parts = {part: trained[f"{path}/{part}"] for part in _PARTS if f"{path}/{part}" in trained}
                leaf = dataclasses.replace(leaf, **parts)
                if key is not None and leaf.dropout:
                    keys = jax.random.split(jax.random.fold_in(key, index), leaf.a.shape[:-2])
                    leaf = dataclasses.replace(leaf, key=jax.random.key_data(keys))
            flat[path] = leaf
        return flat

    def extra(self, trained: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The trained arrays that are not part of the model."""
        return {path: leaf for path, leaf in trained.items()
                if path not in self.whole and path.rpartition("/")[0] not in self.adapted}


def _is_floats(leaf: Leaf) -> bool:
    return not is_leaf(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
