"""Recipes by name. Names compose with ``+``, applied from left to right: ``2:4-sparsegpt+w4a16-gptq+huffman``."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxlm.compression.quantize.activations import Smooth, Static
from jaxlm.compression.quantize.autoround import AutoRound
from jaxlm.compression.quantize.awq import Awq
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.reshape import DropLayers, Factor, KeepCache, Prune, Rotate
from jaxlm.compression.solvers import Gptq, SparseGpt, Wanda
from jaxlm.compression.steps import Float8, Half, Magnitude, NofM, Quantize, Share, Step, Table, needs_data
from jaxlm.core.errors import UserError

__all__ = ["NAMES", "Name", "load_recipe", "markdown", "parse"]


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
    def data(self) -> str:
        """Whether it is calibrated with data: "needed", "of use" or ""."""
        steps = self.make(re.fullmatch(self.pattern.format(**_PARTS), self.example).groupdict())
        if needs_data(steps) is not None:
            return "needed"
        return "of use" if any(isinstance(step, DropLayers | Prune) for step in steps) else ""

    @property
    def on_cpu(self) -> str:
        """How a model of large matrices runs on CPU: faster where it is smaller or ``placement.fast_on_cpu``."""
        ways = [_on_cpu(step) for step in parse(self.example).steps]
        return next((way for way in reversed(ways) if way != "as dense"), "as dense")


def _on_cpu(step: Step) -> str:
    match step:
        case Quantize(act_bits=8) | Static(format="int8") | Prune() | DropLayers():
            return "faster"
        case Factor(share=share) if share <= 0.75:
            return "faster"
        case SparseGpt(bits=0):
            return "as dense"
        case Quantize(group=0) | Gptq(group=0) | AutoRound(group=0) | Awq(group=0) | SparseGpt(group=0):
            return "faster with jax 0.12"
    return "as dense"


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
    Name("w8a8-static", "the same, activations on one grid for all tokens, found with data", "w8a8-static",
         lambda f: (Static(),)),
    Name("w8a8-smooth", "w8a8-dynamic after SmoothQuant: ranges of activations moved into the weights",
         "{bits}a8-smooth", lambda f: (Smooth(), Quantize(int(f["bits"]), symmetric=True, act_bits=8))),
    Name("fp8", "float8 e4m3 weights and activations, scaled as in w8a8-dynamic (fp8-static: as in w8a8-static)",
         "fp8(?P<static>-static)?", lambda f: (Static("float8") if f["static"] else Float8(),)),
    Name("w4a16-rtn", "2 to 8-bit weights in groups of 128 inputs with zero points, rounded to nearest "
         "(-g32, -g64, -channel; -sym: no zero points)", "{bits}a16-rtn{group}", lambda f: (Quantize(**_grid(f)),)),
    Name("w4a16-gptq", "the same grids, with GPTQ: act-order, static groups", "{bits}a16-gptq{group}",
         lambda f: (Gptq(**_grid(f)),)),
    Name("w2a16-autoround", "the same grids, with rounding and clipping learned from the layers' outputs, as AutoRound "
         "does; for 2 and 3 bits", "{bits}a16-autoround{group}", lambda f: (AutoRound(**_grid(f)),)),
    Name("w4a16-awq", "the same grids, clipped, after AWQ's scaling of the channels that matter",
         "{bits}a16-awq{group}", lambda f: (Awq(**_grid(f)),)),
    Name("nf4", "4-bit weights at the quantiles of a normal distribution, in groups of 64 (nf4-g128)",
         r"nf4(-g(?P<group>\d+))?", lambda f: (Table("nf4", int(f["group"] or 64)),)),
    Name("mxfp4", "4-bit floats with a power of two for each 32", "mxfp4", lambda f: (Table("mxfp4", 32),)),
    Name("share4", "2 to the power of 4 values a matrix, found by k-means", r"share(?P<bits>\d)",
         lambda f: (Share(int(f["bits"])),)),
    Name("sparse50-magnitude", "the smallest half of each matrix is zero; 2:4-magnitude: two of every four inputs",
         "{sparse}-magnitude", lambda f: (NofM(**_sparsity(f)) if f["m"] else Magnitude(**_sparsity(f)),)),
    Name("sparse50-wanda", "pruned by magnitude times input norm, also 2:4-wanda", "{sparse}-wanda",
         lambda f: (Wanda(**_sparsity(f)),)),
    Name("sparse50-sparsegpt", "pruned with error feedback, also 2:4-sparsegpt", "{sparse}-sparsegpt",
         lambda f: (SparseGpt(**_sparsity(f)),)),
    Name("sparse50-sparsegpt-w4", "pruned and rounded to 4 bits in one pass, a grid an output channel (-g128: a group)",
         r"{sparse}-sparsegpt-{bits}(-g(?P<group>\d+))?",
         lambda f: (SparseGpt(**_sparsity(f), bits=int(f["bits"]), group=int(f["group"] or 0)),)),
    Name("lowrank50", "each weight a product of two narrow ones with half of its entries", r"lowrank(?P<percent>\d+)",
         lambda f: (Factor(int(f["percent"]) / 100),)),
    Name("prune-heads25", "a quarter of the attention heads go; also prune-ffn30, prune-experts50, prune-width20",
         r"prune-(?P<what>heads|ffn|experts|width)(?P<percent>\d+)",
         lambda f: (Prune(f["what"], int(f["percent"]) / 100),)),
    Name("drop-layers2", "two whole layers go (of an encoder-decoder the decoder's; drop-encoder-layers2)",
         r"drop-(?P<encoder>encoder-)?layers(?P<count>\d+)",
         lambda f: (DropLayers(int(f["count"]), "encoder" if f["encoder"] else "decoder"),)),
    Name("rotate", "random Hadamard rotations folded into the weights: put it before rounding", "rotate",
         lambda f: (Rotate(),)),
    Name("kv8", "keys and values kept in int8 while decoding; also kv4, kvfp8", r"kv(?P<kind>8|4|fp8)",
         lambda f: (KeepCache({"8": "int8", "4": "int4", "fp8": "fp8"}[f["kind"]]),)),
    Name("half", "what is left dense in bfloat16, and scales in float16: after the others", "half",
         lambda f: (Half(),)),
    Name("deep-compression", "sparse50-sparsegpt, share4, and entropy-coded storage", "deep-compression",
         lambda f: (SparseGpt(0.5), Share(4))),
)  # fmt: skip
_COMPILED = [(re.compile(name.pattern.format(**_PARTS)), name.make) for name in NAMES]
STORAGE = Name("huffman", "entropy-coded storage, without loss; last", "huffman", lambda f: ())


def markdown() -> str:
    """The table of names in README."""
    rows = [f"| `{name.example}` | {name.data} | {name.on_cpu} | {name.meaning} |" for name in (*NAMES, STORAGE)]
    return "\n".join(["| recipe | data | on CPU | what it does |", "|---|---|---|---|", *rows])


def parse(name: str) -> Recipe:
    """The recipe of a name such as ``2:4-magnitude+w8a8-dynamic+huffman``. UserError where a part is not in NAMES."""
    parts = name.split("+")
    storage = "huffman" if parts[-1] in ("huffman", "deep-compression") else "plain"
    parts = parts[:-1] if parts[-1] == "huffman" else parts
    return Recipe(tuple(step for part in parts for step in _steps(part, name)), storage, name)


def _steps(part: str, name: str) -> tuple[Step, ...]:
    for pattern, make in _COMPILED:
        if match := pattern.fullmatch(part):
            return make(match.groupdict())
    forms = ", ".join(each.example for each in NAMES)
    raise UserError(
        f"unknown recipe {part!r} in {name!r}; compose with '+' from: {forms}, huffman (last), or give a FILE.py"
    )


def load_recipe(spec: str) -> Recipe:
    """The recipe that ``--recipe`` means: a name, a Python file that defines ``recipe``, or the compression.json of a
    model that was made by one."""
    if not spec.endswith((".py", ".json")):
        return parse(spec)
    if not Path(spec).is_file():
        raise UserError(f"{spec} is not there; give a recipe's name, a Python file that defines `recipe`, or its JSON")
    if spec.endswith(".json"):
        try:
            return Recipe.from_json(json.loads(Path(spec).read_text(encoding="utf-8"))["recipe"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{spec} holds no recipe as compression.json does: {error}") from None
    recipe = runpy.run_path(spec).get("recipe")
    if not isinstance(recipe, Recipe):
        raise UserError(f"{spec} does not define `recipe`, a jaxlm.compression.recipe.Recipe")
    return recipe


if __name__ == "__main__":
    print(markdown())
