"""From counts to time: the roofline of a chip (Williams et al. 2009), with a third roof for the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.planning.hlo_costs import Collective, Counts
from jaxlm.planning.topology import Topology

__all__ = ["ASSUMPTIONS", "Place", "Roofline", "group_bandwidth", "roofline"]

ASSUMPTIONS = (
    "compute: matrix products only, at the chip's dense bfloat16 (int8: int8) peak",
    "memory: what is not fused is read from and written to HBM at its full bandwidth",
    "network: ring algorithms at full link bandwidth over every torus dimension that a group spans, both ways where it "
    "closes to a ring; no latency; messages along different axes do not overlap",
    "a step takes the longest of the three (all overlap perfectly); without any overlap it takes their sum",
)


@dataclass(frozen=True)
class Place:
    """Where a device of the mesh is: its slice, and its chip in the torus."""

    slice: int
    chip: tuple[int, ...]


@dataclass(frozen=True)
class Roofline:
    """Seconds of one device in one run of a program. ``network`` is by mesh axes."""

    compute: float
    memory: float
    network: dict[str, float]

    @property
    def messages(self) -> float:
        return sum(self.network.values())

    @property
    def step(self) -> float:
        """The longest of the three."""
        return max(self.compute, self.memory, self.messages)

    @property
    def serial(self) -> float:
        """Their sum."""
        return self.compute + self.memory + self.messages

    @property
    def bound(self) -> str:
        """What takes longest: compute, memory or network."""
        return max(("compute", "memory", "network"), key=dict(
            compute=self.compute, memory=self.memory, network=self.messages
        ).__getitem__)


def roofline(counts: Counts, topology: Topology, places: Sequence[Place]) -> Roofline | None:
    """None for a topology without figures (CPU). ``places`` are those of the mesh's devices, in order."""
    chip = topology.chip
    if chip is None:
        return None
    peaks = {"float": chip.flops, "int8": chip.int8 or chip.flops}
    network: dict[str, float] = {}
    for each in counts.collectives:
        axes = "+".join(each.axes)
        network[axes] = network.get(axes, 0.0) + each.sent / group_bandwidth(each, topology, places)
    compute = sum(flops / peaks[kind] for kind, flops in counts.flops.items())
    return Roofline(compute, counts.traffic / chip.bandwidth, network)


def group_bandwidth(collective: Collective, topology: Topology, places: Sequence[Place]) -> float:
    """Bytes a second that each member of a group can send to the others."""
    chip, members = topology.chip, [places[i] for i in collective.group]
    if len({place.slice for place in members}) > 1:
        return chip.dcn
    at = np.array([place.chip[: chip.dimensions] for place in members])
    if collective.kind == "collective-permute":  # one way to one neighbour
        return chip.link / max(_distance(at, topology), 1)
    values = [np.unique(at[:, d]) for d in range(at.shape[1])]
    if math.prod(map(len, values)) != len(members):
        return chip.link  # no box: one link of each is sure to do
    total = 0.0
    for dimension, value in enumerate(values):
        if len(value) > 1:
            whole = len(value) == topology.shape[dimension]
            ways = 2 if whole and topology.closes(dimension) else 1
            total += ways * chip.link / np.diff(value).min()  # groups between its members use the same links
    return total or chip.link


def _distance(at: np.ndarray, topology: Topology) -> int:
    apart = np.abs(at[0] - at[1])
    rounds = [min(gap, extent - gap) if topology.closes(d) else gap
              for d, (gap, extent) in enumerate(zip(apart, topology.shape, strict=True))]
    return int(sum(rounds))
