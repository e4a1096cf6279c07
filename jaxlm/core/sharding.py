"""Sharding as data: one table from logical axes to mesh axes, and the functions that read it.

Every parameter names its logical axes where it is created. ``shardings`` turns any tree that holds such parameters
(the parameters, the optimizer's moments, gradients) into ``NamedSharding``s of the same structure.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.core.errors import UserError
from jaxlm.core.leaves import LoRA, LowRank, is_leaf

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
MeshAxes = str | tuple[str, ...] | None

# Logical axis -> mesh axis. Megatron-style tensor parallelism (arXiv:1909.08053) splits heads, FFN and vocabulary;
# ZeRO-3 (arXiv:1910.02054) splits whatever dimension of a parameter is left along "fsdp".
RULES: Mapping[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "experts": None,
    "norm": None,
    "positions": None,
    "length": None,
    "features": None,  # the width of an activation, as opposed to that of a weight
}


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A ``data x fsdp x tensor`` mesh over the devices (all by default); one size may be -1: whatever is left."""
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh {_describe(sizes)}: sizes are positive, and at most one is -1 (what is left)")
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % known or (-1 not in sizes.values() and known != len(devices)):
        raise UserError(
            f"mesh {_describe(sizes)} does not fit {len(devices)} devices; make the product of the sizes {len(devices)}"
        )
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _describe(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items())


def spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES):
    """The PartitionSpec of one array: a dimension its mesh axes do not divide is replicated."""
    entries: list[MeshAxes] = []
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and axis not in rules:
            raise KeyError(f"no sharding rule for the logical axis {axis!r}; known: {', '.join(rules)}")
        mesh_axes = rules[axis] if axis is not None else None
        names = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())
        ways = math.prod(mesh.shape[name] for name in names)
        if size % ways:
            log.info("axis %s of %s does not divide by %d: replicated", axis, tuple(shape), ways)
            mesh_axes = None
        entries.append(mesh_axes if ways > 1 else None)
    return PartitionSpec(*entries)


def shardings(tree: Any, mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES) -> Any:
    """A tree of the same structure with a NamedSharding for each array; what names no axes is replicated."""

    def of_array(array, axes):
        return NamedSharding(mesh, spec(array.shape, axes, mesh, rules))

    def of_value(value, axes):
        if not is_leaf(value):
            return of_array(value, axes)
        *layers, n_in, n_out = axes
        if isinstance(value, LoRA | LowRank):
            parts = {"base": axes, "a": (*layers, n_in, None), "b": (*layers, None, n_out)}
            parts = {name: of_value(getattr(value, name), parts[name]) for name in parts if hasattr(value, name)}
            if isinstance(value, LoRA):
                parts["scale"] = of_array(value.scale, (*layers, None, None))
            return dataclasses.replace(value, **parts)
        # The other parts of a coded leaf are [..., out, in or groups of in]; what is one a matrix is replicated.
        coded = (*layers, n_out, n_in) if value.axis == -2 else axes
        small = {"table": (*layers, None), "act_scale": (*layers, None, None)}

        def of_part(name):
            part = getattr(value, name)
            return None if part is None else of_array(part, small.get(name, coded))

        parts = [field.name for field in dataclasses.fields(value) if not field.metadata.get("static")]
        return dataclasses.replace(value, **{name: of_part(name) for name in parts})

    def of_leaf(leaf):
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        return leaf.replace(of_value(leaf.get_value(), leaf.get_metadata("axes")))

    return jax.tree.map(of_leaf, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pins an activation's layout where a mesh is in use (``jax.set_mesh``); does nothing elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh))
