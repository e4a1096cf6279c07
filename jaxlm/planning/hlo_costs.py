"""``count_costs``: the arithmetic, memory traffic and messages of one device in one run of a compiled program.

They are counted in the program's HLO. XLA's own cost analysis counts the body of a loop once, whatever its trip count,
so it is wrong for scanned layers; here the body of a loop counts once per iteration.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxlm.planning.hlo import Computation, Instruction, Module, replica_groups

__all__ = ["Collective", "HloCosts", "count_costs"]

# Bytes that each of n devices sends, as a multiple of its operands' bytes, by the optimal algorithms on a ring (Thakur
# et al. 2005, section 4).
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

_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place: the index of the operand with the new values


@dataclass(frozen=True)
class Collective:
    """The sum of all messages of one kind along the same mesh axes.

    Attributes:
        kind: the HLO opcode.
        axes: the mesh axes along which the members of a group differ.
        group: positions in the mesh of the members of the first group; for permutations, of a pair (source, target)
            whose distance is the most frequent one.
        sent: bytes that a device sends.
        times: the number of messages.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    sent: float
    times: int


@dataclass
class HloCosts:
    """The costs of one device.

    Attributes:
        flops: FLOPs of matrix products and convolutions (two a multiply-add), by "int8" and "float".
        traffic: bytes read from and written to main memory: operands and results of everything that is not fused; of an
            operand that a fusion only slices or updates, that part; nothing for messages that a fusion continues.
        collectives: messages summed by kind, axes and group.
    """

    flops: Counter[str] = field(default_factory=Counter)
    traffic: float = 0.0
    collectives: list[Collective] = field(default_factory=list)

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    def sent(self, *kinds: str) -> dict[tuple[str, ...], float]:
        """Bytes sent, by axes; of these kinds of collectives, or of all."""
        found: dict[tuple[str, ...], float] = {}
        for each in self.collectives:
            if not kinds or each.kind in kinds:
                found[each.axes] = found.get(each.axes, 0.0) + each.sent
        return found


def count_costs(module: Module, mesh: Mapping[str, int]) -> HloCosts:
    """The costs of a program that runs on every device of a mesh with axes of these sizes, in order."""
    counter = _CostCounter(module, mesh)
    counter.computation(module.entry, 1)
    summed: dict[tuple, list[float]] = {}
    for kind, axes, group, sent, times in counter.messages:
        total = summed.setdefault((kind, axes, group), [0.0, 0])
        total[0] += sent * times
        total[1] += times
    collectives = [Collective(*key, sent, int(times)) for key, (sent, times) in summed.items()]
    return HloCosts(counter.flops, counter.traffic, sorted(collectives, key=lambda each: -each.sent))


class _CostCounter:
    """Adds up costs while it walks through a module."""

    def __init__(self, module: Module, mesh: Mapping[str, int]):
        self._module, self._mesh = module, mesh
        self._devices = math.prod(mesh.values())
        self._channels: set[int] = set()  # channel ids of messages that were found in fusions
        self.flops: Counter[str] = Counter()
        self.traffic = 0.0
        self.messages: list[tuple[str, tuple[str, ...], tuple[int, ...], float, int]] = []

    def computation(self, computation: Computation, times: int, *, fused: bool = False) -> None:
        """Adds the costs of ``times`` runs of a computation."""
        for each in computation.instructions.values():
            self._instruction(computation, each, times, fused)

    def _instruction(self, inside: Computation, each: Instruction, times: int, fused: bool) -> None:
        opcode = each.opcode
        if opcode == "while":
            iterations = times * trip_count(self._module, inside, each)
            for name in each.called("body"):
                self.computation(self._module.computations[name], iterations)
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
            # XLA on TPU spreads a message over several fusions: one starts it, others continue it while they compute,
            # one ends it. The message appears in each of them, with the same channel id.
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
        counter = _CostCounter(self._module, self._mesh)
        counter.computation(computation, 1)
        return counter.flops.total() + counter.traffic

    def _message(self, inside: Computation, each: Instruction, kind: str, times: int) -> None:
        members = replica_groups(each, self._devices)
        axes = self._axes(members, kind)
        size = 2 if kind == "collective-permute" else members.shape[1]
        if size < 2 or not axes:
            return
        # XLA on TPU fuses an all-reduce with the slice of the sum that a device keeps: this sends what a reduce-scatter
        # does.
        users = inside.users.get(each.name, ())
        if kind == "all-reduce" and users and all(user.opcode == "dynamic-slice" for user in users):
            kind = "reduce-scatter"
        operand_bytes = sum(shape.bytes for operand in inside.operands(each) for shape in operand.shapes)
        group = tuple(members[_most_frequent_shift(members) if size == 2 else 0].tolist())
        self.messages.append((kind, axes, group, _SENT[kind](size) * operand_bytes, times))

    def _axes(self, members: np.ndarray, kind: str) -> tuple[str, ...]:
        coordinates = np.stack(np.unravel_index(members, tuple(self._mesh.values())), -1)  # [groups, members, axes]
        differ = (coordinates != coordinates[:, :1]).any((0, 1))
        return tuple(name for name, differs in zip(self._mesh, differ, strict=True) if differs)

    def _traffic(self, inside: Computation, each: Instruction) -> float:
        """Bytes that an instruction reads from and writes to main memory."""
        opcode = each.opcode
        if opcode in _FREE or opcode.endswith("-done") or "ConcatBitcast" in each.attributes:
            return 0.0
        operands = list(inside.operands(each))
        if opcode in ("slice", "dynamic-slice", "gather"):
            return 2 * each.bytes
        if opcode in ("slice-start", "dynamic-slice-start"):  # the results are the operands, the slice and a flag
            part = each.shapes[len(operands)]
            return part.bytes * (2 - part.on_chip)
        if opcode in _UPDATES:
            return 2 * operands[_UPDATES[opcode]].bytes
        if opcode == "fusion":
            called = self._module.computations[each.called("calls")[0]]
            read = sum(self._read(called, i, operand.bytes) for i, operand in enumerate(operands))
            return read + self._written(called, each)
        if opcode == "copy-start":  # the result repeats the operand
            return each.shapes[0].bytes * (not each.shapes[0].on_chip) + operands[0].bytes
        return sum(operand.bytes for operand in operands) + each.bytes

    def _read(self, called: Computation, index: int, full: float) -> float:
        """Bytes that a fusion reads of an operand: only the slices, if it only slices it; none, if it updates it in
        place."""
        if not full or index not in called.parameters:
            return full
        sliced, whole = self._sliced(called, called.parameters[index])
        return full if whole else min(sliced, full)

    def _sliced(self, called: Computation, parameter: Instruction) -> tuple[float, bool]:
        """Bytes of the slices that a computation takes of a parameter, and whether another instruction, or a user of
        the computation's result, reads the whole parameter."""
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
                    continue  # an update in place, or the state of a message under way
                elif user.opcode == "fusion":
                    inner = self._module.computations[user.called("calls")[0]]
                    for index in (i for i, operand in enumerate(user.operands) if operand == value.name):
                        part, whole = self._sliced(inner, inner.parameters[index])
                        total += part
                        if whole:  # a fusion that only changes the layout passes the whole on to its users
                            pending.append(user)
                else:
                    return total, True
        return total, False

    def _written(self, called: Computation, each: Instruction) -> float:
        """Bytes that a fusion writes: only the new values, of a result that is updated in place."""
        if each.shapes and all(shape.on_chip for shape in each.shapes):
            return 0.0
        shapes = each.shapes
        if called.root.opcode == "tuple" and len(called.root.operands) == len(shapes):
            sources = [called.instructions[name].opcode for name in called.root.operands]
            shapes = [shape for shape, opcode in zip(shapes, sources, strict=True)
                      if opcode != "parameter" and opcode not in _SENT]
        updates = [user for user in called.instructions.values() if user.opcode in _UPDATES]
        replaced = {}
        for update in updates:
            part = called.instructions.get(update.operands[_UPDATES[update.opcode]])
            if part is not None:
                replaced[update.shape.dims] = sum(shape.bytes for shape in part.shapes)
        return sum(replaced.get(shape.dims, shape.bytes) for shape in shapes if not shape.on_chip)


def _most_frequent_shift(pairs: np.ndarray) -> int:
    """The index of a pair with the most frequent distance: in a shift around a ring, not the pair that wraps around."""
    _, first, times = np.unique(pairs[:, 1] - pairs[:, 0], return_index=True, return_counts=True)
    return int(first[np.argmax(times)])


def trip_count(module: Module, inside: Computation, loop: Instruction) -> int:
    """The number of iterations of a loop: what XLA notes, or else the constant of a condition ``i < constant`` for a
    loop that starts at 0; 1 if there is neither."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known.group(1))
    condition = module.computations[loop.called("condition")[0]]
    limits = [int(each.argument) for each in _all_instructions(module, condition)
              if each.opcode == "constant" and each.shape.dtype in ("s32", "u32", "s64") and not each.shape.dims]
    return max(limits, default=1)


def _all_instructions(module: Module, computation: Computation) -> Iterator[Instruction]:
    for each in computation.instructions.values():
        yield each
        for name in each.called("calls", "to_apply"):
            yield from _all_instructions(module, module.computations[name])


def _flops(inside: Computation, each: Instruction) -> float:
    """FLOPs of a matrix product or convolution; 0 for any other instruction."""
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
    """Two FLOPs for each product whose factors are not padding. TPUs run matrix products as convolutions, and batched
    ones with windows and dilations that make most factors padding."""
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
