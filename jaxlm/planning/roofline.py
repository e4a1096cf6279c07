"""``roofline``: from the costs of a program to time, by the roofline model of a chip (Williams et al. 2009) with a
third roof for the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.planning.hlo_costs import Collective, HloCosts
from jaxlm.planning.topology import Topology

__all__ = ["ASSUMPTIONS", "DeviceCoordinates", "Roofline", "group_bandwidth", "roofline"]

ASSUMPTIONS = (
    "compute: only matrix products take time, at the chip's dense bfloat16 peak (int8 products: the int8 peak)",
    "memory: operands and results of everything that is not fused pass through HBM at its full bandwidth",
    "network: ring algorithms at full link bandwidth over every torus dimension that a group spans, in both directions "
    "where the dimension wraps around; no latency; messages along different mesh axes do not overlap",
    "a step takes the longest of the three (perfect overlap); without any overlap it takes their sum",
)


@dataclass(frozen=True)
class DeviceCoordinates:
    """The position of a device: the number of its slice, and its coordinates in the torus of that slice."""

    slice: int
    chip: tuple[int, ...]


@dataclass(frozen=True)
class Roofline:
    """Seconds that one device takes for one run of a program.

    Attributes:
        compute: arithmetic.
        memory: traffic to and from main memory.
        network: messages, by mesh axes.
    """

    compute: float
    memory: float
    network: dict[str, float]

    @property
    def messages(self) -> float:
        return sum(self.network.values())

    @property
    def step(self) -> float:
        """The longest of compute, memory and network."""
        return max(self.compute, self.memory, self.messages)

    @property
    def serial(self) -> float:
        """The sum of compute, memory and network."""
        return self.compute + self.memory + self.messages

    @property
    def bound(self) -> str:
        """What takes longest: "compute", "memory" or "network"."""
        seconds = {"compute": self.compute, "memory": self.memory, "network": self.messages}
        return max(seconds, key=seconds.__getitem__)


def roofline(costs: HloCosts, topology: Topology, coordinates: Sequence[DeviceCoordinates]) -> Roofline | None:
    """The times of a program; None for CPU devices, whose speed is not known.

    Args:
        costs: of one device.
        topology: the devices.
        coordinates: the position of each device of the mesh, in the order of the mesh.
    """
    chip = topology.chip
    if chip is None:
        return None
    peaks = {"float": chip.flops, "int8": chip.int8 or chip.flops}
    network: dict[str, float] = {}
    for each in costs.collectives:
        axes = "+".join(each.axes)
        network[axes] = network.get(axes, 0.0) + each.sent / group_bandwidth(each, topology, coordinates)
    compute = sum(flops / peaks[kind] for kind, flops in costs.flops.items())
    return Roofline(compute, costs.traffic / chip.bandwidth, network)


def group_bandwidth(collective: Collective, topology: Topology, coordinates: Sequence[DeviceCoordinates]) -> float:
    """Bytes a second that each member of the collective's group can send to the others."""
    chip, members = topology.chip, [coordinates[i] for i in collective.group]
    if len({member.slice for member in members}) > 1:
        return chip.dcn
    at = np.array([member.chip[: chip.dimensions] for member in members])  # [members, dimensions]
    if collective.kind == "collective-permute":  # one direction, to one device
        return chip.link / max(_hops(at, topology), 1)
    values = [np.unique(at[:, d]) for d in range(at.shape[1])]
    if math.prod(map(len, values)) != len(members):
        return chip.link  # the group is not a box: count on one link of each member
    total = 0.0
    for dimension, value in enumerate(values):
        if len(value) > 1:
            whole = len(value) == topology.shape[dimension]
            directions = 2 if whole and topology.wraps_around(dimension) else 1
            total += directions * chip.link / np.diff(value).min()  # groups between the members share these links
    return total or chip.link


def _hops(at: np.ndarray, topology: Topology) -> int:
    """Links between two chips on the shortest way through the torus."""
    apart = np.abs(at[0] - at[1])
    hops = [min(gap, extent - gap) if topology.wraps_around(d) else gap
            for d, (gap, extent) in enumerate(zip(apart, topology.shape, strict=True))]
    return int(sum(hops))
