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

# Outermost first: stages and replicas talk least and may lie in different slices; tensor talks most and is adjacent.
AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")
MeshAxes = str | tuple[str, ...] | None

# Logical axis -> mesh axis. Megatron-style tensor parallelism (arXiv:1909.08053) splits heads, FFN and vocabulary;
# ZeRO-3 (arXiv:1910.02054) splits whatever dimension of a parameter is left along "fsdp". Experts lie on the devices
# that hold different rows (arXiv:2006.16668).
RULES: Mapping[str, MeshAxes] = {
    "batch": ("data", "fsdp", "expert"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": "stage",
    "experts": "expert",
    "length": "sequence",
    "norm": None,
    "positions": None,
    "features": None,  # the width of an activation, as opposed to that of a weight
}


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, stage: int = 1, expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of all ``AXES`` over the devices (all by default); one size may be -1: whatever is left."""
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(AXES, (stage, data, fsdp, expert, sequence, tensor), strict=True))
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f"a mesh of {describe(sizes)}: sizes are positive, and at most one is -1 (what is left)")
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % known or (-1 not in sizes.values() and known != len(devices)):
        raise UserError(
            f"a mesh of {describe(sizes)} does not fit {len(devices)} devices; make the product of its sizes that"
        )
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def describe(sizes: Mapping[str, int]) -> str:
    """The axes that split something: "data 4 x tensor 2"."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "one device"


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES):
    """The PartitionSpec of one array: a dimension its mesh axes do not divide is replicated."""
    entries: list[MeshAxes] = []
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and axis not in rules:
            raise KeyError(f"no sharding rule for the logical axis {axis!r}; known: {', '.join(rules)}")
        names = _splitting(rules[axis] if axis is not None else None, mesh)
        ways = math.prod(mesh.shape[name] for name in names)
        if size % ways:
            log.info("axis %s of %s does not divide by %d: replicated", axis, tuple(shape), ways)
            names = ()
        entries.append(_entry(names))
    return PartitionSpec(*entries)


def _splitting(mesh_axes: MeshAxes, mesh: Mesh) -> tuple[str, ...]:
    """Those of the mesh axes that split anything, so that equal layouts have equal specs; in ``shard_map`` the manual
    ones have done so already."""
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(name for name in names if mesh.shape[name] > 1 and types[name] != AxisType.Manual)


def _entry(names: tuple[str, ...]) -> MeshAxes:
    return names if len(names) > 1 else names[0] if names else None


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
    """Rows of a batch over the data, fsdp and expert axes."""
    return NamedSharding(mesh, PartitionSpec(_entry(_splitting(RULES["batch"], mesh))))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pins an activation's layout where a mesh is in use (``jax.set_mesh``); does nothing elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh))
