"""``forecast``: compiles a program ahead of time and predicts its memory, arithmetic, messages and time."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.planning.hlo import parse_hlo
from jaxlm.planning.hlo_costs import Collective, HloCosts, count_costs
from jaxlm.planning.programs import ForecastProgram
from jaxlm.planning.roofline import DeviceCoordinates, Roofline, roofline
from jaxlm.planning.topology import Topology
from jaxlm.training.config import Experiment

__all__ = ["Forecast", "Memory", "forecast"]


@dataclass(frozen=True)
class Memory:
    """Bytes of memory on one device.

    Attributes:
        held: by kind: "parameters", "optimizer", "gradients", "batch", "cache", ...
        activations: activations and other temporaries: the rest of the peak.
        peak: the most that is in use at once, as the compiler reports it.
        capacity: the memory of the device; None for a CPU.
    """

    held: dict[str, float]
    activations: float
    peak: float
    capacity: float | None

    @property
    def over(self) -> float:
        """Bytes that are missing; 0 if the program fits."""
        return max(0.0, self.peak - self.capacity) if self.capacity else 0.0


@dataclass(frozen=True)
class Forecast:
    """The predicted cost of a program.

    Attributes:
        program: "train step", "prefill" or "decode".
        topology: the name of the topology.
        devices: the number of devices.
        mesh: sizes of the mesh axes.
        parameters: the number of parameters of the dense model.
        memory: of one device.
        costs: of one device; None if the program does not fit, because then it is not compiled.
        time: of one device; None if the program does not fit, and on CPU.
        tokens: tokens that one run processes on all devices together.
        flops: FLOPs that the model needs for these tokens (``training.flops.FLOP_CONVENTION``).
        total_tokens: tokens of the whole training; 0 for serving.
        peak_flops: FLOP/s of all devices together; None on CPU.
        notes: what the user should know about the shapes.
    """

    program: str
    topology: str
    devices: int
    mesh: dict[str, int]
    parameters: int
    memory: Memory
    costs: HloCosts | None
    time: Roofline | None
    tokens: int
    flops: float
    total_tokens: int
    peak_flops: float | None
    notes: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float | None:
        """At most, on all devices together."""
        return self.tokens / self.time.step if self.time else None

    @property
    def mfu(self) -> float | None:
        """The largest possible model FLOPs utilization (arXiv:2204.02311, appendix B)."""
        return self.flops / (self.time.step * self.peak_flops) if self.time else None

    @property
    def days(self) -> float | None:
        """Of the whole training, at least."""
        return self.total_tokens / self.tokens_per_second / 86400 if self.time and self.total_tokens else None

    @property
    def chip_hours(self) -> float | None:
        return None if self.days is None else self.days * 24 * self.devices

    def to_json(self) -> dict[str, Any]:
        """What ``jaxlm plan --json`` writes for a program."""
        data = dataclasses.asdict(self)
        data["counts"] = data.pop("costs")
        if self.costs:
            rows = [{"kind": each.kind, "axes": list(each.axes), "bytes": each.sent, "times": each.times}
                    for each in _by_axes(self.costs)]
            data["counts"] = {"flops": dict(self.costs.flops), "traffic": self.costs.traffic, "collectives": rows}
        if self.time:
            data["time"] |= {"step": self.time.step, "serial": self.time.serial, "bound": self.time.bound}
        derived = ("tokens_per_second", "mfu", "days", "chip_hours")
        return data | {"over": self.memory.over} | {name: getattr(self, name) for name in derived}


def _by_axes(costs: HloCosts) -> list[Collective]:
    """Collectives of the same kind and axes summed over the positions of their groups, the largest first."""
    found: dict[tuple[str, tuple[str, ...]], Collective] = {}
    for each in costs.collectives:
        key = (each.kind, each.axes)
        before = found.get(key)
        found[key] = each if before is None else dataclasses.replace(
            before, sent=before.sent + each.sent, times=before.times + each.times
        )
    return sorted(found.values(), key=lambda each: -each.sent)


def forecast(program: ForecastProgram, config: Experiment, topology: Topology) -> Forecast:
    """Compiles a program and predicts its cost. Takes seconds to minutes."""
    mesh = program.mesh
    total = config.train.steps * program.tokens if program.name == "train step" else 0
    chip = topology.chip
    common = dict(
        program=program.name, topology=topology.name, devices=mesh.size, mesh=dict(mesh.shape),
        parameters=program.parameters, tokens=program.tokens, flops=program.flops, total_tokens=total,
        peak_flops=chip.flops * mesh.size if chip else None, notes=program.notes,
    )
    capacity = float(chip.memory) if chip else None
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = _out_of_memory(str(error))
        if found is None:
            raise
        return Forecast(memory=_memory(program, *found), costs=None, time=None, **common)
    analysis = compiled.memory_analysis()
    if chip:
        peak = analysis.peak_memory_in_bytes
    else:  # on CPU all temporaries are a single allocation
        peak = (
            analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
            + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
        )
    costs = count_costs(parse_hlo(compiled.as_text()), mesh.shape)
    time = roofline(costs, topology, device_coordinates(mesh))
    return Forecast(memory=_memory(program, peak, capacity), costs=costs, time=time, **common)


def _memory(program: ForecastProgram, peak: float, capacity: float | None) -> Memory:
    held = dict(program.held)
    if "gradients" in held:  # some may share memory with the arrays that they replace
        rest = peak - sum(size for name, size in held.items() if name != "gradients")
        held["gradients"] = max(min(held["gradients"], rest), 0.0)
    return Memory(held, max(peak - sum(held.values()), 0.0), float(peak), capacity)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _out_of_memory(message: str) -> tuple[float, float] | None:
    """Bytes needed and bytes available, from the message of an older or newer TPU compiler when a program does not fit.
    None for any other message."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message) or re.search(
        r"total memory required .*\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message
    )
    if not found:
        return None
    return float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]


def device_coordinates(mesh: Mesh) -> list[DeviceCoordinates]:
    """The positions of the mesh's devices, in the order of the mesh; CPU devices form a line."""

    def position(number: int, device: jax.Device) -> DeviceCoordinates:
        chip = tuple(getattr(device, "coords", None) or (number,))
        return DeviceCoordinates(getattr(device, "slice_index", 0) or 0, chip)

    return [position(i, device) for i, device in enumerate(np.asarray(mesh.devices).flat)]
