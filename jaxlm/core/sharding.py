"""Sharding as data: one table from logical axes to mesh axes, and the functions that read it.

Every parameter names its logical axes where it is created. ``shardings`` maps any tree of such parameters (the
parameters themselves, an optimizer's moments, gradients) to ``NamedSharding``s in the same structure.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.core.errors import UserError
from jaxlm.core.leaves import LoRA, LowRank, is_leaf
from jaxlm.core.tree import Params, Transform, dtype_bits, path_str

log = logging.getLogger(__name__)

# Outermost first: stages and replicas communicate least and may be in different slices; devices that share "tensor"
# communicate most and are neighbours.
AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")
MeshAxes = str | tuple[str, ...] | None
LogicalAxis = str | tuple[str, ...] | None  # a name in RULES, or a tuple of mesh axes

# Logical axis -> mesh axis. Megatron-style tensor parallelism (arXiv:1909.08053) splits heads, FFN and vocabulary;
# ZeRO-3 (arXiv:1910.02054) splits another dimension of each parameter along "fsdp". Experts are split over devices that
# hold different rows of the batch (arXiv:2006.16668).
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
    "features": None,  # the width of an activation; "embed" is that of a weight
}

# Preset -> its narrow axes, and the axis that gets the remaining devices; see ``mesh_sizes``.
PRESETS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "ddp": ((), "data"),
    "fsdp": ((), "fsdp"),
    "fsdp+tp": (("tensor",), "fsdp"),
    "3d": (("tensor", "stage"), "data"),
    "moe": (("expert",), "fsdp"),
}
HOST_MEMORY = "pinned_host"  # JAX's name for host memory that devices can read
_HOST = 8  # devices of one host; the axes that communicate most should stay within it


def mesh_sizes(preset: str, explicit: Mapping[str, int], devices: int) -> dict[str, int]:
    """The arguments of ``make_mesh`` for this number of devices.

    Sizes in ``explicit`` that are not 0 count as they are; the preset divides the remaining devices. Each of its narrow
    axes gets the largest power of two, up to 8, that leaves as many devices for every other axis; the last axis gets
    the rest. With 64 devices "3d" is data 4 x stage 4 x tensor 4.
    """
    narrow, rest = PRESETS[preset]
    given = {axis: size for axis, size in explicit.items() if size}
    left = devices // max(math.prod(size for size in given.values() if size > 0), 1)
    narrow = [axis for axis in narrow if axis not in given]
    sizes = {axis: 1 for axis in AXES} | given
    for count, axis in zip(range(len(narrow), 0, -1), narrow, strict=True):
        sizes[axis] = max(p for p in (1, 2, 4, _HOST) if left % p == 0 and p ** (count + 1) <= left or p == 1)
        left //= sizes[axis]
    last = next((axis for axis in (rest, "data") if axis not in given), None)
    if last and -1 not in given.values():
        sizes[last] = -1
    return sizes


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, stage: int = 1, expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of all ``AXES`` over the devices (default: all devices). One size may be -1: the remaining devices.

    Raises:
        UserError: when a size is not positive, or the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(AXES, (stage, data, fsdp, expert, sequence, tensor), strict=True))
    shape = _mesh_shape(sizes, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(preset: str, explicit: Mapping[str, int], devices: int) -> AbstractMesh:
    """A mesh without devices, of the sizes that ``mesh_sizes`` gives. Errors as in ``make_mesh``."""
    shape = _mesh_shape(mesh_sizes(preset, explicit, devices), devices)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """The sizes in the order of ``AXES``, with -1 replaced by the remaining devices."""
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f"a mesh of {describe_mesh(sizes)}: sizes are positive, and at most one is -1 (the rest)")
    known = math.prod(size for size in sizes.values() if size != -1)
    if devices % known or (-1 not in sizes.values() and known != devices):
        raise UserError(
            f"a mesh of {describe_mesh(sizes)} does not fit {devices} devices; make the product of its sizes {devices}"
        )
    return tuple(devices // known if sizes[axis] == -1 else sizes[axis] for axis in AXES)


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """The axes of more than one device: "data 4 x tensor 2"."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "one device"


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many shards the rows of a batch are split: their number must be a multiple of this."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def spec(shape: Sequence[int], axes: Sequence[LogicalAxis], mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES):
    """The PartitionSpec of one array. A dimension that its mesh axes do not divide is replicated.

    Raises:
        KeyError: when a logical axis is not in ``rules``.
    """
    entries: list[MeshAxes] = []
    for size, axis in zip(shape, axes, strict=True):
        if isinstance(axis, str) and axis not in rules:
            raise KeyError(f"no sharding rule for the logical axis {axis!r}; known: {', '.join(rules)}")
        names = _splitting(rules[axis] if isinstance(axis, str) else axis, mesh)
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            log.info("axis %s of %s does not divide by %d: replicated", axis, tuple(shape), parts)
            names = ()
        entries.append(_entry(names))
    return PartitionSpec(*entries)


def _splitting(mesh_axes: MeshAxes, mesh: Mesh) -> tuple[str, ...]:
    """Those of the mesh axes that split arrays: the others are left out, so that equal layouts have equal specs.

    Axes that are manual (inside ``shard_map``) have split them already. A mesh from elsewhere may lack an axis.
    """
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(name for name in names if mesh.shape.get(name, 1) > 1 and types[name] != AxisType.Manual)


def _entry(names: tuple[str, ...]) -> MeshAxes:
    return names if len(names) > 1 else names[0] if names else None


def override_sharding(overrides: Sequence[str]) -> Transform:
    """A Transform that changes the sharding of parameters, by path: ``"embed/table=tensor+fsdp -"``.

    An override is a regular expression for whole paths, "=", and for every dimension of the parameter the mesh axes
    that split it, joined by "+", or "-" for none. (The first dimension of a parameter in a layer is that of the
    layers.) A later override wins.

    Raises:
        UserError: when an override is not of this form, names an unknown axis, or matches no parameter.
    """
    parsed = [_parse_override(override) for override in overrides]

    def transform(params: Params) -> Params:
        flat = nnx.to_flat_state(params)
        found = {path: variable.get_metadata("axes") for path, variable in flat}
        for override, matches, axes in parsed:
            matching = [path for path in found if matches(path_str(path))]
            if not matching:
                raise UserError(f"mesh.rules: {override!r} matches no parameter; see `jaxlm inspect` for their paths")
            for path in matching:
                if len(found[path]) != len(axes):
                    raise UserError(f"mesh.rules: {override!r} is for {len(axes)} dimensions, and {path_str(path)} has "
                                    f"{len(found[path])}; write axes or - for each dimension")
                found[path] = axes
        moved = [(path, variable.copy()) for path, variable in flat]
        for path, variable in moved:
            variable.set_metadata("axes", found[path])
        return nnx.from_flat_state(moved)

    return transform if parsed else lambda params: params


def _parse_override(override: str) -> tuple[str, Callable, tuple[tuple[str, ...], ...]]:
    pattern, equals, right = override.rpartition("=")
    try:
        matches = re.compile(pattern.strip()).fullmatch
    except re.error as error:
        raise UserError(f"mesh.rules: {pattern!r} is not a regular expression: {error}") from None
    axes = tuple(() if part == "-" else tuple(part.split("+")) for part in right.split())
    names = [name for part in axes for name in part]
    for name in names if equals else ():
        if name not in AXES:
            near = difflib.get_close_matches(name, AXES, 1, 0.0)[0]
            raise UserError(f"mesh.rules: {override!r}: there is no mesh axis {name!r}; the nearest is {near!r}")
    if not equals or not axes or len(set(names)) < len(names):
        raise UserError(
            f"mesh.rules: {override!r} is not PATTERN=AXES, with an axis or - for each dimension and no axis twice"
        )
    return override, matches, axes


def fit_to_shape(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The same sharding for an array of another shape; dimensions that do not divide are replicated."""
    mesh = sharding.mesh
    entries = []
    for size, entry in zip(shape, [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))], strict=True):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        entries.append(entry if size % math.prod(mesh.shape[name] for name in names) == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*entries))


def shard_over(sharding: NamedSharding, shape: Sequence[int], axis: str = "data") -> NamedSharding:
    """The sharding of an array split over one more mesh axis: along the divisible dimension that is longest on one.

    The sharding stays as it is if no dimension divides, or the axis is in use.
    """
    mesh, parts = sharding.mesh, sharding.mesh.shape[axis]
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in sharding.spec]
    entries += [()] * (len(shape) - len(entries))
    local = [size // math.prod(mesh.shape[name] for name in names) for size, names in zip(shape, entries, strict=True)]
    divisible = [i for i, size in enumerate(local) if size % parts == 0 and size]
    if parts == 1 or not divisible or any(axis in names for names in entries):
        return sharding
    best = max(divisible, key=lambda i: (local[i], not entries[i]))
    entries[best] = (*entries[best], axis)
    return NamedSharding(mesh, PartitionSpec(*map(_entry, entries)))


def require_host_memory(mesh: Mesh | AbstractMesh) -> None:
    """Checks that devices can offload to host memory. A mesh without devices passes.

    Raises:
        UserError: when the devices have no such memory.
    """
    if isinstance(mesh, AbstractMesh):
        return
    device = mesh.devices.flat[0]
    if HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(f"{device.device_kind} has no {HOST_MEMORY} memory to offload to; switch offloading off")


def shardings(tree: Any, mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES) -> Any:
    """A tree of the same structure with a NamedSharding for each array. Arrays without logical axes are replicated."""

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
                if value.magnitude is not None:
                    parts["magnitude"] = of_array(value.magnitude, (*layers, None, n_out))
            return dataclasses.replace(value, **parts)
        # The other parts of a coded leaf are [..., out, in or groups of in]; one value a matrix is replicated.
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


def batch_sharding(mesh: Mesh, length: int | None = None) -> NamedSharding:
    """The sharding of a batch: rows over data, fsdp and expert; tokens over sequence, if it divides ``length``."""
    entries = [_entry(_splitting(RULES["batch"], mesh))]
    if length is not None:
        entries.append(_entry(_splitting(RULES["length"], mesh)) if length % mesh.shape["sequence"] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*entries))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Fixes the sharding of an activation if a mesh is in use (``jax.set_mesh``); otherwise does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh))


def bytes_per_device(tree: Any) -> float:
    """Bytes of device memory that one device holds of arrays with shardings (abstract or not).

    Arrays that are offloaded to the host do not count; int4 counts half a byte.
    """
    def of_array(x) -> float:
        if x.sharding is not None and x.sharding.memory_kind == HOST_MEMORY:
            return 0.0
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        return math.prod(shape) * dtype_bits(x.dtype) / 8

    return float(sum(of_array(x) for x in jax.tree.leaves(tree)))


def on_device(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array with this sharding; if it is offloaded to the host, a copy on its devices. In ``jit`` or out."""
    return jax.device_put(x, sharding.with_memory_kind(None)) if sharding.memory_kind == HOST_MEMORY else x


def num_shards(axis: str) -> int:
    """Into how many shards GSPMD splits a dimension with this logical axis on the mesh in use; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in _splitting(RULES[axis], mesh))


def num_parts(axis: LogicalAxis, rows: int) -> int:
    """Into how many parts GSPMD splits the sums of a product: those over a kernel's axis with this logical axis (or
    these mesh axes).

    Where the axes that split the kernel split the ``rows`` of the input already, it gathers the kernel instead.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or axis is None:
        return 1
    names = _splitting(RULES[axis] if isinstance(axis, str) else axis, mesh)
    taken = RULES["batch"] if rows % num_shards("batch") == 0 else ()
    return math.prod(mesh.shape[name] for name in names if name not in taken)
