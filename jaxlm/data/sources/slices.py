"""The slice ``[a:b]`` at the end of a SPEC."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from jaxlm.core.errors import UserError

Slicer = Callable[[int], slice]


def parse_slice(spec: str, rest: str) -> tuple[str, Slicer]:
    """Splits ``x.txt[:90%]`` into ``x.txt`` and the function from a length to the slice that is meant."""
    if not rest.endswith("]"):
        return rest, lambda n: slice(0, n)
    body, _, inside = rest[:-1].rpartition("[")
    bound = r"\s*(-?\d+|\d+(?:\.\d+)?%)?\s*"
    match = re.fullmatch(f"{bound}:{bound}", inside)
    if not match:
        raise UserError(f"bad slice [{inside}] in {spec!r}; write [a:b] with integers or percentages, such as [:90%]")

    def resolve(n: int) -> slice:
        def at(written: str | None) -> int | None:
            if written is None:
                return None
            return int(n * Fraction(written[:-1]) / 100) if written.endswith("%") else int(written)

        start, stop, _ = slice(at(match[1]), at(match[2])).indices(n)
        if start >= stop:
            raise UserError(f"the slice [{inside}] of {spec!r} is empty: there are {n:,} to choose from")
        return slice(start, stop)

    return body, resolve
