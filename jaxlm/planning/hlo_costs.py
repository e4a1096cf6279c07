"""What one device does in one run of a compiled program, counted in its HLO: arithmetic, memory traffic, messages.

XLA's own cost analysis counts the body of a loop once, so it cannot be used for scanned layers; here everything in a
loop counts as often as the loop goes round.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxlm.planning.hlo import Computation, Instruction, Module, groups

__all__ = ["Collective", "Counts", "count"]

# What a device sends, as a multiple of its operands' bytes, where n take part; the optimal algorithms on a ring
# (Thakur et al. 2005, section 4).
_SENT = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1,
    "collective-permute": lambda n: 1,
}
_FREE = frozenset([  # no data moves
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "domain", "add-dependency", "async-update", "async-start",
])  # fmt: skip

_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # done in place: which operand is what is new


@dataclass(frozen=True)
class Collective:
    """All messages of one kind along the same axes.

    Attributes:
        kind: as HLO names it.
        axes: of the mesh, that tell the members of a group apart.
        group: positions in the mesh of the members of the first group; of permutations, of a pair that is as far apart
            as most.
        sent: bytes that a device sends.
        times: how often.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    sent: float
    times: int


@dataclass
class Counts:
    """Of one device.

    Attributes:
        flops: of matrix products and convolutions, two a multiply-add, by "int8" and "float".
        traffic: bytes read from and written to main memory: operands and results of everything that is not fused, of
            what a fusion slices or updates only that part, and nothing of messages that it carries on.
        collectives: sums by kind, axes and place.
    """

    flops: Counter[str] = field(default_factory=Counter)
    traffic: float = 0.0
    collectives: list[Collective] = field(default_factory=list)

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    def sent(self, *kinds: str) -> dict[tuple[str, ...], float]:
        """Bytes sent by axes; of all kinds, or of these."""
        found: dict[tuple[str, ...], float] = {}
        for each in self.collectives:
            if not kinds or each.kind in kinds:
                found[each.axes] = found.get(each.axes, 0.0) + each.sent
        return found


def count(module: Module, mesh: Mapping[str, int]) -> Counts:
    """Counts a program that runs on every device of a mesh, given as the sizes of its axes in order."""
    walk = _Walk(module, mesh)
    walk.computation(module.entry, 1)
    summed: dict[tuple, list[float]] = {}
    for kind, axes, group, sent, times in walk.messages:
        total = summed.setdefault((kind, axes, group), [0.0, 0])
        total[0] += sent * times
        total[1] += times
    collectives = [Collective(*key, sent, int(times)) for key, (sent, times) in summed.items()]
    return Counts(walk.flops, walk.traffic, sorted(collectives, key=lambda each: -each.sent))


class _Walk:
    def __init__(self, module: Module, mesh: Mapping[str, int]):
        self._module, self._mesh = module, mesh
        self._devices = math.prod(mesh.values())
        self._channels: set[int] = set()  # of messages in fusions
        self.flops: Counter[str] = Counter()
        self.traffic = 0.0
        self.messages: list[tuple[str, tuple[str, ...], tuple[int, ...], float, int]] = []

    def computation(self, computation: Computation, times: int, *, fused: bool = False) -> None:
        for each in computation.instructions.values():
            self._instruction(computation, each, times, fused)

    def _instruction(self, inside: Computation, each: Instruction, times: int, fused: bool) -> None:
        opcode = each.opcode
        if opcode == "while":
            rounds = times * trip_count(self._module, inside, each)
            for name in each.called("body"):
                self.computation(self._module.computations[name], rounds)
            return
        if opcode == "conditional":
            names = each.called("branch_computations", "true_computation", "false_computation")
            self.computation(max((self._module.computations[name] for name in names), key=self._work), times)
            return
        if opcode in ("call", "async-start"):
            for name in each.called("to_apply", "calls"):
                self.computation(self._module.computations[name], times, fused=fused)
            return
        kind = opcode.removesuffix("-start")
        if kind in _SENT:
            # XLA on TPU spreads a message over fusions: one that starts it, others that go on with it while they
            # compute, one that ends it. All of them show it, by the same channel.
            channel = each.number("channel_id", 0) if fused else 0
            if channel not in self._channels:
                self._message(inside, each, kind, times)
            self._channels |= {channel} - {0}
        elif opcode == "fusion":
            for name in each.called("calls"):
                self.computation(self._module.computations[name], times, fused=True)
        elif flops := _flops(inside, each):
            operands = list(inside.operands(each))[:2]
            integer = all(re.fullmatch(r"[su]\d+", operand.shape.dtype) for operand in operands)
            self.flops["int8" if integer else "float"] += times * flops
        if not fused:
            self.traffic += times * self._traffic(inside, each)

    def _work(self, computation: Computation) -> float:
        walk = _Walk(self._module, self._mesh)
        walk.computation(computation, 1)
        return walk.flops.total() + walk.traffic

    def _message(self, inside: Computation, each: Instruction, kind: str, times: int) -> None:
        members = groups(each, self._devices)
        axes = self._axes(members, kind)
        size = 2 if kind == "collective-permute" else members.shape[1]
        if size < 2 or not axes:
            return
        # XLA on TPU fuses a sum with the slice of it that a device keeps: what is sent is that of a reduce-scatter.
        users = inside.users.get(each.name, ())
        if kind == "all-reduce" and users and all(user.opcode == "dynamic-slice" for user in users):
            kind = "reduce-scatter"
        operand_bytes = sum(shape.bytes for operand in inside.operands(each) for shape in operand.shapes)
        group = tuple(members[_typical(members) if size == 2 else 0].tolist())
        self.messages.append((kind, axes, group, _SENT[kind](size) * operand_bytes, times))

    def _axes(self, members: np.ndarray, kind: str) -> tuple[str, ...]:
        coordinates = np.stack(np.unravel_index(members, tuple(self._mesh.values())), -1)  # [groups, members, axes]
        differ = (coordinates != coordinates[:, :1]).any((0, 1))
        return tuple(name for name, differs in zip(self._mesh, differ, strict=True) if differs)

    def _traffic(self, inside: Computation, each: Instruction) -> float:
        """Bytes to and from main memory."""
        opcode = each.opcode
        if opcode in _FREE or opcode.endswith("-done") or "ConcatBitcast" in each.attributes:
            return 0.0
        operands = list(inside.operands(each))
        if opcode in ("slice", "dynamic-slice", "gather"):
            return 2 * each.bytes
        if opcode in ("slice-start", "dynamic-slice-start"):  # its results are the operands, the slice and a flag
            part = each.shapes[len(operands)]
            return part.bytes * (2 - part.near)
        if opcode in _UPDATES:
            return 2 * operands[_UPDATES[opcode]].bytes
        if opcode == "fusion":
            called = self._module.computations[each.called("calls")[0]]
            read = sum(self._read(called, i, operand.bytes) for i, operand in enumerate(operands))
            return read + self._written(called, each)
        if opcode == "copy-start":  # its result repeats the operand
            return each.shapes[0].bytes * (not each.shapes[0].near) + operands[0].bytes
        return sum(operand.bytes for operand in operands) + each.bytes

    def _read(self, called: Computation, index: int, full: float) -> float:
        """What a fusion reads of an operand: slices, where it only slices it; nothing, where it updates it in place."""
        if not full or index not in called.parameters:
            return full
        sliced, whole = self._sliced(called, called.parameters[index])
        return full if whole else min(sliced, full)

    def _sliced(self, called: Computation, parameter: Instruction) -> tuple[float, bool]:
        """Bytes of the slices that a computation takes of a parameter, and whether anything else there, or what gets
        the computation's result, sees the whole."""
        total, pending = 0.0, [parameter]
        while pending:
            value = pending.pop()
            if value.root:
                return total, True
            for user in called.users.get(value.name, ()):
                first = user.operands[0] == value.name
                if user.opcode in ("bitcast", "reshape", "transpose", "copy"):
                    pending.append(user)
                elif user.opcode in ("dynamic-slice", "gather") and first:
                    total += sum(shape.bytes for shape in user.shapes)
                elif user.opcode in _UPDATES and first or user.opcode == "tuple":
                    continue  # done in place, or what a message on its way goes into
                elif user.opcode == "fusion":
                    inner = self._module.computations[user.called("calls")[0]]
                    for place in (i for i, operand in enumerate(user.operands) if operand == value.name):
                        part, whole = self._sliced(inner, inner.parameters[place])
                        total += part
                        if whole:  # a fusion that only lays it out anew gives the whole to its own users
                            pending.append(user)
                else:
                    return total, True
        return total, False

    def _written(self, called: Computation, each: Instruction) -> float:
        if each.shapes and all(shape.near for shape in each.shapes):
            return 0.0
        shapes = each.shapes
        if called.root.opcode == "tuple" and len(called.root.operands) == len(shapes):
            passed = [called.instructions[name].opcode for name in called.root.operands]
            shapes = [shape for shape, opcode in zip(shapes, passed, strict=True)
                      if opcode != "parameter" and opcode not in _SENT]
        updates = [user for user in called.instructions.values() if user.opcode in _UPDATES]
        replaced = {}
        for update in updates:
            part = called.instructions.get(update.operands[_UPDATES[update.opcode]])
            if part is not None:
                replaced[update.shape.dims] = sum(shape.bytes for shape in part.shapes)
        return sum(replaced.get(shape.dims, shape.bytes) for shape in shapes if not shape.near)


def _typical(pairs: np.ndarray) -> int:
    """A pair that is as far apart as most: of a shift around a ring not the one that closes it."""
    _, first, times = np.unique(pairs[:, 1] - pairs[:, 0], return_index=True, return_counts=True)
    return int(first[np.argmax(times)])


def trip_count(module: Module, inside: Computation, loop: Instruction) -> int:
    """How often a loop goes round: as XLA found out, else from a condition ``i < constant`` and a start at 0; 1 where
    neither tells."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known.group(1))
    condition = module.computations[loop.called("condition")[0]]
    limits = [int(each.argument) for each in _everything(module, condition)
              if each.opcode == "constant" and each.shape.dtype in ("s32", "u32", "s64") and not each.shape.dims]
    return max(limits, default=1)


def _everything(module: Module, computation: Computation) -> Iterator[Instruction]:
    for each in computation.instructions.values():
        yield each
        for name in each.called("calls", "to_apply"):
            yield from _everything(module, module.computations[name])


def _flops(inside: Computation, each: Instruction) -> float:
    """Of a product; 0 for anything else."""
    if each.opcode not in ("dot", "convolution", "ragged-dot"):
        return 0.0
    left, right = list(inside.operands(each))[:2]
    if each.opcode == "ragged-dot":  # [M, K] by [G, K, N]
        return 2.0 * each.shape.size * left.shape.dims[-1]
    if each.opcode == "dot":
        contracted = math.prod(left.shape.dims[i] for i in each.numbers("lhs_contracting_dims"))
        return 2.0 * each.shape.size * contracted
    return _convolution_flops(each, left, right)


def _convolution_flops(each: Instruction, left: Instruction, right: Instruction) -> float:
    """Two for each product that is not with padding. TPUs do matrix products as convolutions, batches of them with
    windows and dilations that make most products ones with padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    lhs, rhs, out = labels.groups()
    spatial = sum(label.isdigit() for label in lhs)
    window = _window(each.attributes, spatial)
    products = 1.0
    for i in range(spatial):
        size, stride, low, base, dilation = (window[name][i] for name in ("size", "stride", "pad", "lhs", "rhs"))
        n_in, n_out = left.shape.dims[lhs.index(str(i))], each.shape.dims[out.index(str(i))]
        at = np.arange(n_out)[:, None] * stride - low + np.arange(size)[None] * dilation
        products *= int(((at >= 0) & (at < (n_in - 1) * base + 1) & (at % base == 0)).sum())
    batch = each.shape.dims[out.index("b")] * each.shape.dims[out.index("f")]
    return 2.0 * products * batch * right.shape.dims[rhs.index("i")]


def _window(attributes: str, spatial: int) -> dict[str, list[int]]:
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in text.group(1).split()) if text else {}

    def read(name: str, default: int) -> list[int]:
        return [int(part.split("_")[0]) for part in fields[name].split("x")] if name in fields else [default] * spatial

    return {"size": read("size", 1), "stride": read("stride", 1), "pad": read("pad", 0),
            "lhs": read("lhs_dilate", 1), "rhs": read("rhs_dilate", 1)}
