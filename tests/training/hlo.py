"""Reads compiled programs: their collectives, the sizes of the results, and whether a loop runs them."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d+|pred)\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    dtype: str  # that of the program: XLA on CPU sums bfloat16 in float32, and calls that sum "promoted"
    elements: int  # of one result
    in_loop: bool  # it is not in the entry computation


def collectives(text: str) -> list[Collective]:
    """The collectives of ``compiled.as_text()``; a collective with several results is listed once for each."""
    found, entry = [], False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        if match := _COLLECTIVE.search(line):
            for dtype, shape in _ARRAY.findall(match[1]):
                dtype = "bf16" if "_promoted" in line else dtype
                elements = math.prod(int(size) for size in shape.split(",") if size)
                found.append(Collective(match[2], dtype, elements, not entry))
    return found
