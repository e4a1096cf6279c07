"""Recipes by name. Names compose with ``+``, applied from left to right: ``2:4-sparsegpt+w4a16-gptq+huffman``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from jaxlm.compression.autoround import AutoRound
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.solvers import Gptq, SparseGpt, Wanda
from jaxlm.compression.steps import Float8, Magnitude, NofM, Quantize, Step, needs_data
from jaxlm.core.errors import UserError

__all__ = ["NAMES", "Name", "parse"]


@dataclass(frozen=True)
class Name:
    """A form of names: how it is written, what it means, and the steps it stands for.

    In ``pattern``, ``{group}`` and the like stand for what several forms have in common (``_PARTS``).
    """

    example: str
    meaning: str
    pattern: str
    make: Callable[[dict[str, str]], tuple[Step, ...]]

    @property
    def calibrated(self) -> bool:
        """Whether it needs data."""
        return needs_data(parse(self.example).steps) is not None


_PARTS = {
    "bits": r"w(?P<bits>\d)",
    "group": r"(-g(?P<group>\d+)|-(?P<channel>channel))?(-(?P<sym>sym))?",
    "sparse": r"(sparse(?P<percent>\d+(\.\d+)?)|(?P<n>\d+):(?P<m>\d+))",
}


def _grid(found: dict[str, str]) -> dict:
    group = 0 if found["channel"] else int(found["group"] or 128)
    return {"bits": int(found["bits"]), "group": group, "symmetric": bool(found["sym"])}


def _sparsity(found: dict[str, str]) -> dict:
    if found["m"]:
        return {"n": int(found["n"]), "m": int(found["m"])}
    return {"sparsity": float(found["percent"]) / 100}


NAMES: tuple[Name, ...] = (
    Name("w8a8-dynamic", "int8 weights, a scale an output channel; activations rounded to int8 a token, on the fly",
         "{bits}a8-dynamic", lambda f: (Quantize(int(f["bits"]), symmetric=True, act_bits=8),)),
    Name("fp8", "float8 e4m3 weights and activations, scaled as in w8a8-dynamic", "fp8", lambda f: (Float8(),)),
    Name("w4a16-rtn", "2 to 8-bit weights in groups of 128 inputs with zero points, rounded to nearest "
         "(-g32, -g64, -channel; -sym: no zero points)", "{bits}a16-rtn{group}", lambda f: (Quantize(**_grid(f)),)),
    Name("w4a16-gptq", "the same grids, with GPTQ: act-order, static groups", "{bits}a16-gptq{group}",
         lambda f: (Gptq(**_grid(f)),)),
    Name("w2a16-autoround", "the same grids, with rounding and clipping learned from the layers' outputs, as AutoRound "
         "does; for 2 and 3 bits", "{bits}a16-autoround{group}", lambda f: (AutoRound(**_grid(f)),)),
    Name("sparse50-magnitude", "the smallest half of each matrix is zero; 2:4-magnitude: two of every four inputs",
         "{sparse}-magnitude", lambda f: (NofM(**_sparsity(f)) if f["m"] else Magnitude(**_sparsity(f)),)),
    Name("sparse50-wanda", "pruned by magnitude times input norm, also 2:4-wanda", "{sparse}-wanda",
         lambda f: (Wanda(**_sparsity(f)),)),
    Name("sparse50-sparsegpt", "pruned with error feedback, also 2:4-sparsegpt", "{sparse}-sparsegpt",
         lambda f: (SparseGpt(**_sparsity(f)),)),
    Name("sparse50-sparsegpt-w4", "pruned and rounded to 4 bits in one pass, a grid an output channel (-g128: a group)",
         r"{sparse}-sparsegpt-{bits}(-g(?P<group>\d+))?",
         lambda f: (SparseGpt(**_sparsity(f), bits=int(f["bits"]), group=int(f["group"] or 0)),)),
)  # fmt: skip
_COMPILED = [(re.compile(name.pattern.format(**_PARTS)), name.make) for name in NAMES]
STORAGE = Name("huffman", "entropy-coded storage, without loss; last", "huffman", lambda f: ())


def parse(name: str) -> Recipe:
    """The recipe of a name such as ``2:4-magnitude+w8a8-dynamic+huffman``. UserError where a part is not in NAMES."""
    parts = name.split("+")
    storage = "huffman" if parts[-1] == "huffman" else "plain"
    parts = parts[:-1] if storage == "huffman" else parts
    return Recipe(tuple(step for part in parts for step in _steps(part, name)), storage, name)


def _steps(part: str, name: str) -> tuple[Step, ...]:
    for pattern, make in _COMPILED:
        if match := pattern.fullmatch(part):
            return make(match.groupdict())
    forms = ", ".join(each.example for each in NAMES)
    raise UserError(
        f"unknown recipe {part!r} in {name!r}; compose with '+' from: {forms}, huffman (last), or give a FILE.py"
    )
