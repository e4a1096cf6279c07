"""The slice ``[a:b]`` at the end of a SPEC."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from jaxlm.core.errors import UserError

Slicer = Callable[[int], slice]
"""From the length of something to the slice of it that is meant."""


def parse_slice(spec: str, rest: str) -> tuple[str, Slicer]:
    """Splits ``x.txt[:90%]`` into ``x.txt`` and its slice.

    Args:
        spec: the whole SPEC, for messages.
        rest: the SPEC without its scheme.

    Raises:
        UserError: when the slice cannot be read; the ``Slicer`` raises one when the slice is empty.
    """
    if not rest.endswith("]"):
        return rest, lambda n: slice(0, n)
    body, _, inside = rest[:-1].rpartition("[")
    bound = r"\s*(-?\d+|\d+(?:\.\d+)?%)?\s*"
    match = re.fullmatch(f"{bound}:{bound}", inside)
    if not match:
        raise UserError(f"bad slice [{inside}] in {spec!r}; write [a:b] with integers or percentages, such as [:90%]")

    def resolve(n: int) -> slice:
        def position(bound: str | None) -> int | None:
            if bound is None:
                return None
            return int(n * Fraction(bound[:-1]) / 100) if bound.endswith("%") else int(bound)

        start, stop, _ = slice(position(match[1]), position(match[2])).indices(n)
        if start >= stop:
            raise UserError(f"the slice [{inside}] of {spec!r} is empty: there are {n:,} to choose from")
        return slice(start, stop)

    return body, resolve
