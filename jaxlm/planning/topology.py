"""Names of device topologies to compile for: ``v5e:16x16``, ``v5p:8x8x4*2`` (two slices), ``cpu:8``.

The devices need not exist: libtpu compiles for every TPU it knows on any machine, and JAX simulates CPU devices.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from dataclasses import dataclass

import jax

from jaxlm.core.errors import UserError
from jaxlm.core.hardware import CHIPS, Chip

__all__ = ["Topology", "parse_topology", "topology_devices"]

_TPUS = {chip.name: chip for chip in CHIPS if chip.name}
_HOST = (2, 2, 1)  # chips of one host along each dimension, as libtpu assumes; a smaller slice has a smaller host


@dataclass(frozen=True)
class Topology:
    """``slices`` tori of one shape, connected by the data centre network.

    Attributes:
        name: what the user wrote.
        chip: figures of the chip; None for CPU devices.
        shape: chips of one slice along each dimension of the torus.
        slices: the number of slices.
    """

    name: str
    chip: Chip | None
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.shape) * self.slices

    def wraps_around(self, dimension: int) -> bool:
        """Whether the links along a dimension of the torus form a ring."""
        extent = self.shape[dimension]
        return self.chip is not None and extent >= self.chip.wraps and extent % self.chip.wraps == 0


def parse_topology(name: str) -> Topology:
    """The topology that a name such as ``v5e:16x16`` means.

    Raises:
        UserError: when the name is unknown; the message has the nearest known one.
    """
    kind, _, rest = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", rest):
        return Topology(name, None, (int(rest),))
    found = re.fullmatch(r"([1-9]\d*(?:x[1-9]\d*)*)(?:\*([1-9]\d*))?", rest)
    shape = tuple(map(int, found.group(1).split("x"))) if found else ()
    if kind not in _TPUS or not found:
        alike = [chip.name for chip in _TPUS.values() if chip.dimensions == len(shape)]
        near = difflib.get_close_matches(kind, [*(alike or _TPUS), "cpu"], 1, 0.0)[0]
        example = "cpu:8" if near == "cpu" else f"{near}:{rest}" if near in alike else _example(_TPUS[near])
        raise UserError(f"unknown topology {name!r}; the nearest is {example!r} (chips: {', '.join(_TPUS)}, cpu)")
    chip = _TPUS[kind]
    if len(shape) != chip.dimensions:
        raise UserError(
            f"topology {name!r}: {kind} chips form a torus of {chip.dimensions} dimensions; write {_example(chip)}"
        )
    return Topology(name, chip, shape, int(found.group(2) or 1))


def _example(chip: Chip) -> str:
    return f"{chip.name}:{'x'.join(['4'] * chip.dimensions)}"


def topology_devices(topology: Topology) -> list[jax.Device]:
    """The devices to compile for. JAX simulates CPU devices only if XLA_FLAGS asks for them before JAX starts, as
    ``planning.subprocess_runner`` does.

    Raises:
        UserError: when libtpu is not installed or does not know the topology.
    """
    if topology.chip is None:
        return jax.devices("cpu")[: topology.size]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("a forecast for TPUs is compiled by libtpu, which is not installed: pip install jaxlm[plan]")
    from jax.experimental import topologies

    shape = "x".join(map(str, topology.shape))
    host = tuple(min(size, extent) for size, extent in zip(_HOST, (*topology.shape, 1), strict=False))
    options: dict = {"chips_per_host_bounds": host}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        return topologies.get_topology_desc(f"{topology.chip.name}:{shape}", "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu has no topology {topology.name!r}: {error}") from None
