"""``parse_hlo``: compiled HLO as data, read from the text that XLA prints: a module of computations of instructions.

Only what ``planning.hlo_costs`` counts is parsed; all other attributes are kept as text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = ["Computation", "Instruction", "Module", "Shape", "parse_hlo", "replica_groups"]

_BITS = {"pred": 8, "token": 0, "opaque": 0, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?|token\[\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclass(frozen=True)
class Shape:
    """The dtype and dimensions of an array. ``on_chip`` arrays lie in the processor's own memory (VMEM on a TPU),
    others in main memory."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        bits = _BITS.get(self.dtype) or int(re.search(r"\d+", self.dtype).group()) if self.dtype != "token" else 0
        return self.size * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One line of HLO, ``name = shapes opcode(operands), attributes``.

    Attributes:
        name, opcode, operands: without "%".
        shapes: of the result; for a tuple, of its leaves in order.
        attributes: the text after the parentheses.
        argument: the text between the parentheses.
        root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    argument: str
    root: bool

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def bytes(self) -> float:
        """Bytes of the result that lie in main memory."""
        return sum(shape.bytes for shape in self.shapes if not shape.on_chip)

    def called(self, *keys: str) -> list[str]:
        """The names of the computations under these attribute keys."""
        found = []
        for key in keys:
            for one, many in re.findall(rf"\b{key}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.attributes):
                found += [one] if one else [name.strip().lstrip("%") for name in many.split(",")]
        return found

    def numbers(self, key: str) -> tuple[int, ...]:
        """The attribute ``key={1,2}`` as numbers; () if it is absent."""
        found = re.search(rf"\b{key}=\{{([0-9,]*)\}}", self.attributes)
        return tuple(map(int, found.group(1).split(","))) if found and found.group(1) else ()

    def number(self, key: str, default: int) -> int:
        """The attribute ``key=3`` as a number; ``default`` if it is absent."""
        found = re.search(rf"\b{key}=(\d+)", self.attributes)
        return int(found.group(1)) if found else default


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose value is the result."""
        return next(each for each in self.instructions.values() if each.root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter instructions by number."""
        return {int(each.argument): each for each in self.instructions.values() if each.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """For each name the instructions that have it as an operand."""
        found: dict[str, list[Instruction]] = {}
        for each in self.instructions.values():
            for operand in dict.fromkeys(each.operands):
                found.setdefault(operand, []).append(each)
        return found

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions that compute the operands."""
        return (self.instructions[name] for name in instruction.operands if name in self.instructions)


@dataclass(frozen=True)
class Module:
    """All computations of a program by name, and the one that it starts with."""

    computations: dict[str, Computation]
    entry: Computation


def parse_hlo(text: str) -> Module:
    """The module in ``compiled.as_text()``.

    Raises:
        ValueError: when the text is not HLO.
    """
    computations: dict[str, Computation] = {}
    entry, lines, name, is_entry = None, None, "", False
    for line in text.splitlines():
        line = line.strip()
        if lines is None:
            if head := _HEAD.match(line):
                is_entry, name, lines = bool(head.group(1)), head.group(2), {}
        elif line.startswith("}"):  # attributes may follow: }, execution_thread="sparsecore"
            computations[name] = Computation(name, lines)
            entry = computations[name] if is_entry else entry
            lines = None
        elif match := _INSTRUCTION.match(_COMMENT.sub("", line)):
            instruction = _instruction(*match.groups())
            lines[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it is not HLO as XLA prints it")
    return Module(computations, entry)


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    shapes = tuple(_shapes(rest[:end]))
    opcode, _, rest = rest[end:].strip().partition("(")
    close = _closing("(" + rest, 0) - 1
    argument, attributes = rest[:close], rest[close + 1 :]
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(argument)) if opcode != "constant" else ()
    return Instruction(name, opcode, shapes, operands, attributes, argument, root is not None)


def _closing(text: str, at: int) -> int:
    """The index of the parenthesis that closes the one at ``at``."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _split(text: str) -> Iterator[str]:
    """The parts between the commas that are outside brackets."""
    depth, start = 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    if text[start:].strip():
        yield text[start:].strip()


def _shapes(text: str) -> Iterator[Shape]:
    for match in _SHAPE.finditer(text):
        dtype, dims, layout = match.groups()
        if dtype is None:
            continue
        sizes = tuple(int(dim.lstrip("<=")) for dim in dims.split(",")) if dims else ()
        space = re.search(r"S\((\d+)\)", layout or "")
        yield Shape(dtype, sizes, space is not None and space.group(1) == "1")


def replica_groups(instruction: Instruction, devices: int) -> np.ndarray:
    """The devices of a collective, one row per group: int array [groups, members] of positions in the mesh. For a
    permutation, one row per pair (source, target).

    Raises:
        ValueError: when the groups are in an unknown notation.
    """
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return np.array([_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))])
    if named := _MESH_GROUPS.search(text):
        return _mesh_groups(*named.groups())
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<=({_IOTA})", text):
        return _iota(iota.group(2)).reshape(_numbers(iota.group(1)))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return np.array([_numbers(row) for row in re.findall(r"\{([\d,]+)\}", listed.group(1))])
    if "replica_groups=" in text and "replica_groups={}" not in text:
        raise ValueError(f"{instruction.name}: unknown notation of replica groups: {text[:200]}")
    return np.arange(devices)[None]


_IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"
_MESH_GROUPS = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(({_IOTA}|[\d,]+)\))? \{{([^}}]*)\}}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _iota(text: str) -> np.ndarray:
    """The device ids of ``[2,4]T(1,0)``: 0, 1, 2, ... in that shape, transposed."""
    shape, _, order = text.rstrip(")").partition("]T(")
    shape = _numbers(shape.strip("[]"))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order)) if order else ids


def _mesh_groups(axes: str, ids: str | None, along: str) -> np.ndarray:
    """The groups along some axes of a mesh, ``mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}``. ``'b':(2)2`` is a
    part of axis ``b``: of size 2, after parts whose sizes multiply to 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    total = math.prod(sizes.values())
    order = np.arange(total) if ids is None else _iota(ids) if ids.startswith("[") else np.array(_numbers(ids))
    chosen: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along):
        chosen.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
    shape, selected = [], []  # the sizes of the parts of every axis, and which parts the groups span
    for name, extent in sizes.items():
        cuts = sorted({1, extent, *(cut for before, size in chosen.get(name, ()) for cut in (before, before * size))})
        for low, high in zip(cuts, cuts[1:], strict=False):
            if any(before <= low and high <= before * size for before, size in chosen.get(name, ())):
                selected.append(len(shape))
            shape.append(high // low)
    grid = order.reshape(shape)
    rest = [i for i in range(grid.ndim) if i not in selected]
    members = math.prod(shape[i] for i in selected)
    return grid.transpose(rest + selected).reshape(-1, members)
