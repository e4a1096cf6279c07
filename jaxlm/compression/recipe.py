"""Recipes: what to do to which weights, as data. A recipe is made from a name, a Python file or JSON.

Names compose with ``+``, applied from left to right: ``sparse50-magnitude+w4a16-rtn-g64+huffman``.
"""

from __future__ import annotations

import dataclasses
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxlm.compression.prune import magnitude, n_of_m
from jaxlm.compression.rtn import quantize
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import is_leaf
from jaxlm.core.tree import Leaf, Params, flatten, map_params

# The linear maps of the blocks: embeddings, head and norms stay dense unless a step's target says otherwise.
BLOCKS = r"(.*/)?layers/\d+/((attn|cross|mlp)/[a-z]+|input|recurrent)/kernel"

FORMS = "w8a8-dynamic, w4a16-rtn[-g64|-channel][-sym], sparse50-magnitude, 2:4-magnitude, huffman"


@dataclass(frozen=True)
class Quantize:
    """Rounds weights to ``bits`` on a grid a group of inputs (0: an output channel); see ``core.leaves.QArray``."""

    kind: ClassVar[str] = "quantize"
    bits: int
    group: int = 0
    symmetric: bool = False
    act_bits: int = 0
    target: str = BLOCKS

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise UserError(f"cannot quantize to {self.bits} bits; use 2 to 8")
        if self.group < 0:
            raise UserError(f"a group of {self.group} inputs is impossible; use 0 for one group an output channel")
        if self.act_bits not in (0, 8) or (self.act_bits and self.group):
            raise UserError("activations are quantized to 8 bits with one weight group a channel, or not at all")

    def __call__(self, leaf: Leaf, axis: int) -> Leaf:
        return quantize(
            leaf, bits=self.bits, group=self.group, symmetric=self.symmetric, act_bits=self.act_bits, axis=axis
        )


@dataclass(frozen=True)
class Magnitude:
    """Zeroes the ``sparsity`` share of smallest magnitude, a matrix at a time."""

    kind: ClassVar[str] = "magnitude"
    sparsity: float
    target: str = BLOCKS

    def __post_init__(self):
        if not 0 < self.sparsity < 1:
            raise UserError(f"a sparsity of {self.sparsity:.0%} is impossible; use more than 0% and less than 100%")

    def __call__(self, leaf: Leaf, axis: int) -> Leaf:
        return magnitude(leaf, sparsity=self.sparsity)


@dataclass(frozen=True)
class NofM:
    """Keeps the ``n`` largest of every ``m`` consecutive inputs of an output channel."""

    kind: ClassVar[str] = "n_of_m"
    n: int
    m: int
    target: str = BLOCKS

    def __post_init__(self):
        if not 0 < self.n < self.m <= 32:
            raise UserError(f"{self.n}:{self.m} sparsity is impossible; N:M keeps 0 < N < M weights of every M <= 32")

    def __call__(self, leaf: Leaf, axis: int) -> Leaf:
        return n_of_m(leaf, n=self.n, m=self.m, axis=axis)


Step = Quantize | Magnitude | NofM
_STEPS: dict[str, type[Step]] = {step.kind: step for step in (Quantize, Magnitude, NofM)}


@dataclass(frozen=True)
class Recipe:
    """Steps from left to right, and how the result is stored: ``plain`` or, losslessly smaller, ``huffman``."""

    steps: tuple[Step, ...]
    storage: str = "plain"
    name: str = "custom"

    def __post_init__(self):
        if self.storage not in ("plain", "huffman"):
            raise UserError(f"unknown storage {self.storage!r}; use 'plain' or 'huffman'")

    def apply(self, params: Params) -> Params:
        """The compressed parameters: a pure function of the dense ones, in or out of ``jit``.

        Raises UserError where a step's target matches nothing, or something that is not a dense kernel or table.
        """
        for step in self.steps:
            params = apply_step(step, params, step)
        return params

    def to_json(self) -> dict[str, Any]:
        steps = [{"kind": step.kind, **dataclasses.asdict(step)} for step in self.steps]
        return {"name": self.name, "steps": steps, "storage": self.storage}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Recipe:
        """The inverse of ``to_json``; raises UserError for steps or fields it does not know."""
        try:
            steps = []
            for fields in data["steps"]:
                fields = dict(fields)
                steps.append(_STEPS[fields.pop("kind")](**fields))
            return Recipe(tuple(steps), data["storage"], data["name"])
        except (KeyError, TypeError) as error:
            raise UserError(f"not a compression recipe of this version: {error}") from None


def apply_step(step: Step, params: Params, fn: Callable[[Leaf, int], Leaf]) -> Params:
    """``fn(leaf, axis)`` over the leaves that are the target of a step, ``axis`` being that of contraction."""
    matches = re.compile(step.target).fullmatch
    targets = {path: leaf for path, leaf in flatten(params).items() if matches(path)}
    if not targets:
        raise UserError(f"the target {step.target!r} of a {step.kind} step matches no parameter; see `jaxlm inspect`")
    for path, leaf in targets.items():
        if not path.endswith(("/kernel", "/table")):
            raise UserError(f"the target of a {step.kind} step matches {path}; only kernels and tables are compressed")
        if is_leaf(leaf):
            raise UserError(f"{path} is already quantized; put the {step.kind} step first or start from a dense model")

    def compress(path: str, leaf: Leaf) -> Leaf:
        return fn(leaf, -1 if path.endswith("/table") else -2) if path in targets else leaf

    return map_params(compress, params)


_NAMES: tuple[tuple[str, Callable[[re.Match], Step]], ...] = (
    (r"w(\d)a8-dynamic", lambda m: Quantize(int(m[1]), symmetric=True, act_bits=8)),
    (r"w(\d)a16-rtn(-sym)?", lambda m: Quantize(int(m[1]), 128, symmetric=bool(m[2]))),
    (r"w(\d)a16-rtn-g(\d+)(-sym)?", lambda m: Quantize(int(m[1]), int(m[2]), symmetric=bool(m[3]))),
    (r"w(\d)a16-rtn-channel(-sym)?", lambda m: Quantize(int(m[1]), 0, symmetric=bool(m[2]))),
    (r"sparse(\d+(?:\.\d+)?)-magnitude", lambda m: Magnitude(float(m[1]) / 100)),
    (r"(\d+):(\d+)-magnitude", lambda m: NofM(int(m[1]), int(m[2]))),
)


def parse(name: str) -> Recipe:
    """The recipe of a name such as ``2:4-magnitude+w8a8-dynamic+huffman``.

    - ``wBa8-dynamic``: B-bit weights, one symmetric grid an output channel; int8 activations, a grid a token.
    - ``wBa16-rtn``: B-bit weights in groups of 128 inputs (``-g64``: of 64; ``-channel``: one group an output channel)
      with integer zero points (``-sym``: without).
    - ``sparseP-magnitude``: P percent of each matrix; ``N:M-magnitude``: N kept of every M inputs.
    - ``huffman``, last: entropy-coded storage.
    """
    parts = name.split("+")
    storage = "huffman" if parts[-1] == "huffman" else "plain"
    parts = parts[:-1] if storage == "huffman" else parts
    return Recipe(tuple(_step(part, name) for part in parts), storage, name)


def _step(part: str, name: str) -> Step:
    for pattern, make in _NAMES:
        if match := re.fullmatch(pattern, part):
            return make(match)
    raise UserError(f"unknown recipe {part!r} in {name!r}; compose with '+' from: {FORMS} (last), or give a FILE.py")


def load_recipe(spec: str) -> Recipe:
    """The recipe that ``--recipe`` means: a name, or a Python file that defines ``recipe``."""
    if not spec.endswith(".py"):
        return parse(spec)
    if not Path(spec).is_file():
        raise UserError(f"{spec} is not there; give a recipe's name or a Python file that defines `recipe`")
    recipe = runpy.run_path(spec).get("recipe")
    if not isinstance(recipe, Recipe):
        raise UserError(f"{spec} does not define `recipe`, a jaxlm.compression.recipe.Recipe")
    return recipe
