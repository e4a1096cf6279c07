"""Reading compiled programs: which collectives there are, how large their results, and whether a loop runs them."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d+|pred)\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    dtype: str
    elements: int  # of one result
    in_loop: bool  # anywhere but in the entry computation


def collectives(text: str) -> list[Collective]:
    """Those of ``compiled.as_text()``; one with several results is as many."""
    found, entry = [], False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        if match := _COLLECTIVE.search(line):
            for dtype, shape in _ARRAY.findall(match[1]):
                elements = math.prod(int(size) for size in shape.split(",") if size)
                found.append(Collective(match[2], dtype, elements, not entry))
    return found
