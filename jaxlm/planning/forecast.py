"""``forecast``: compiles a program ahead of time, and says what it will take: memory, arithmetic, messages, time."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.planning.cost import Place, Roofline, roofline
from jaxlm.planning.hlo import parse
from jaxlm.planning.hlo_costs import Counts, count
from jaxlm.planning.programs import Program
from jaxlm.planning.topology import Topology
from jaxlm.training.config import Experiment

__all__ = ["Forecast", "Memory", "forecast"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        held: by what it is: "parameters", "optimizer", "gradients", "batch", "cache".
        activations: everything else that the program needs while it runs.
        peak: in all; the compiler's own figure.
        capacity: what a device has; None on CPU.
    """

    held: dict[str, float]
    activations: float
    peak: float
    capacity: float | None

    @property
    def over(self) -> float:
        """Bytes by which it does not fit; 0 where it does."""
        return max(0.0, self.peak - self.capacity) if self.capacity else 0.0


@dataclass(frozen=True)
class Forecast:
    """What a program will take, on each device.

    Attributes:
        program: "train step", "prefill" or "decode".
        topology: its name.
        devices: how many.
        mesh: sizes of the axes.
        parameters: of the dense model.
        counts, time: None where it does not fit, for then there is no program; time also on CPU.
        tokens: that one run takes, of all devices.
        flops: that the model needs for them, of all devices (``training.flops.FLOP_CONVENTION``).
        total_tokens: of the whole training; 0 when serving.
        peak_flops: of all devices, a second; None on CPU.
        notes: on shapes.
    """

    program: str
    topology: str
    devices: int
    mesh: dict[str, int]
    parameters: int
    memory: Memory
    counts: Counts | None
    time: Roofline | None
    tokens: int
    flops: float
    total_tokens: int
    peak_flops: float | None
    notes: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.time.step if self.time else None

    @property
    def mfu(self) -> float | None:
        """The most that model FLOPs utilization can be (arXiv:2204.02311, appendix B)."""
        return self.flops / (self.time.step * self.peak_flops) if self.time else None

    @property
    def days(self) -> float | None:
        return self.total_tokens / self.tokens_per_second / 86400 if self.time and self.total_tokens else None

    @property
    def chip_hours(self) -> float | None:
        return None if self.days is None else self.days * 24 * self.devices

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        if self.counts:
            rows = [{"kind": each.kind, "axes": list(each.axes), "bytes": each.sent, "times": each.times}
                    for each in _by_axes(self.counts)]
            data["counts"] = {"flops": dict(self.counts.flops), "traffic": self.counts.traffic, "collectives": rows}
        if self.time:
            data["time"] |= {"step": self.time.step, "serial": self.time.serial, "bound": self.time.bound}
        derived = ("tokens_per_second", "mfu", "days", "chip_hours")
        return data | {"over": self.memory.over} | {name: getattr(self, name) for name in derived}


def _by_axes(counts: Counts):
    """Collectives of one kind along the same axes as one, wherever their groups lie."""
    found: dict[tuple, Any] = {}
    for each in counts.collectives:
        key = (each.kind, each.axes)
        before = found.get(key)
        found[key] = each if before is None else dataclasses.replace(
            before, sent=before.sent + each.sent, times=before.times + each.times
        )
    return sorted(found.values(), key=lambda each: -each.sent)


def forecast(program: Program, config: Experiment, topology: Topology) -> Forecast:
    """Compiles the program; seconds to minutes."""
    mesh = program.mesh
    total = config.train.steps * program.tokens if program.name == "train step" else 0
    chip = topology.chip
    whole = dict(
        program=program.name, topology=topology.name, devices=mesh.size, mesh=dict(mesh.shape),
        parameters=program.parameters, tokens=program.tokens, flops=program.flops, total_tokens=total,
        peak_flops=chip.flops * mesh.size if chip else None, notes=program.notes,
    )
    capacity = float(chip.memory) if chip else None
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = _used(str(error))
        if used is None:
            raise
        peak, limit = used
        memory = _memory(program, peak, limit)
        return Forecast(memory=memory, counts=None, time=None, **whole)
    analysis = compiled.memory_analysis()
    if chip:
        peak = analysis.peak_memory_in_bytes
    else:  # on CPU all temporaries are one allocation
        peak = (
            analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
            + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
        )
    counts = count(parse(compiled.as_text()), mesh.shape)
    time = roofline(counts, topology, places_of(mesh))
    return Forecast(memory=_memory(program, peak, capacity), counts=counts, time=time, **whole)


def _memory(program: Program, peak: float, capacity: float | None) -> Memory:
    held = dict(program.held)
    if "gradients" in held:  # some may share memory with what they replace
        rest = peak - sum(size for name, size in held.items() if name != "gradients")
        held["gradients"] = max(min(held["gradients"], rest), 0.0)
    return Memory(held, max(peak - sum(held.values()), 0.0), float(peak), capacity)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _used(message: str) -> tuple[float, float] | None:
    """What compilers for TPUs, older and newer, say when a program does not fit: bytes used, and bytes there are."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message) or re.search(
        r"total memory required .*\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message
    )
    if not found:
        return None
    return float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]


def places_of(mesh: Mesh) -> list[Place]:
    """Where the mesh's devices are, in order; CPU devices are on a line."""
    def place(number: int, device: jax.Device) -> Place:
        coordinates = getattr(device, "coords", None)
        return Place(getattr(device, "slice_index", 0) or 0, tuple(coordinates) if coordinates else (number,))

    return [place(i, device) for i, device in enumerate(np.asarray(mesh.devices).flat)]
