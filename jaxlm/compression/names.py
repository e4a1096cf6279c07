"""Recipes by name. Names are joined with ``+`` and applied from left to right: ``2:4-sparsegpt+w4a16-gptq+huffman``."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxlm.compression.low_rank import Factorize
from jaxlm.compression.prune.depth import DropLayers
from jaxlm.compression.prune.scores import Magnitude, NofM, Wanda
from jaxlm.compression.prune.sparsegpt import SparseGpt
from jaxlm.compression.prune.structured import StructuredPrune
from jaxlm.compression.quantize.activations import SmoothQuant, StaticActivations
from jaxlm.compression.quantize.autoround import AutoRound
from jaxlm.compression.quantize.awq import Awq
from jaxlm.compression.quantize.codebook import ShareWeights, TableQuantize
from jaxlm.compression.quantize.float8 import Float8
from jaxlm.compression.quantize.gptq import Gptq
from jaxlm.compression.quantize.half_precision import HalfPrecision
from jaxlm.compression.quantize.kv_cache import QuantizeCache
from jaxlm.compression.quantize.rotate import Rotate
from jaxlm.compression.quantize.rtn import Quantize
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.steps import Data, OnCpu, Step, needs_data
from jaxlm.core.errors import UserError
from jaxlm.core.untrusted import read_json

__all__ = ["NAMES", "RecipeName", "load_recipe", "markdown", "parse"]


@dataclass(frozen=True)
class RecipeName:
    """A form of recipe names.

    Attributes:
        example: one name of the form.
        meaning: what it does, for users.
        pattern: a regular expression for all names of the form, in which ``{bits}``, ``{group}`` and ``{sparse}`` stand
            for what several forms share (``_SHARED``).
        make: the steps, from the groups that the pattern finds.
    """

    example: str
    meaning: str
    pattern: str
    make: Callable[[dict[str, str]], tuple[Step, ...]]

    @property
    def regex(self) -> re.Pattern:
        return re.compile(self.pattern.format(**_SHARED))

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the example."""
        return self.make(self.regex.fullmatch(self.example).groupdict())

    @property
    def data(self) -> Data:
        """Whether the recipe is calibrated with data: "needed", "of use" or ""."""
        if needs_data(self.steps) is not None:
            return "needed"
        return next((step.data for step in self.steps if step.data), "")

    @property
    def on_cpu(self) -> OnCpu:
        """How a model of large matrices runs on CPU."""
        return next((step.on_cpu for step in reversed(self.steps) if step.on_cpu != "as dense"), "as dense")


_SHARED = {
    "bits": r"w(?P<bits>\d)",
    "a8group": r"(-g(?P<group>\d+))?",
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


NAMES: tuple[RecipeName, ...] = (
    RecipeName(
        "w8a8-dynamic", "int8 weights with a scale an output channel; activations rounded to int8 with a scale a "
        "token, on the fly (w4a8-dynamic-g128: a scale for each 128 inputs of an output)", "{bits}a8-dynamic{a8group}",
        lambda f: (Quantize(int(f["bits"]), int(f["group"] or 0), symmetric=True, act_bits=8),),
    ),
    RecipeName(
        "w8a8-static", "the same, with activations rounded on one grid for all tokens, found with data", "w8a8-static",
        lambda f: (StaticActivations(),),
    ),
    RecipeName(
        "w8a8-smooth", "w8a8-dynamic after SmoothQuant, which moves the range of activations into the weights",
        "{bits}a8-smooth", lambda f: (SmoothQuant(), Quantize(int(f["bits"]), symmetric=True, act_bits=8)),
    ),
    RecipeName(
        "fp8", "float8 e4m3 weights and activations, scaled as in w8a8-dynamic (fp8-static: as in w8a8-static)",
        "fp8(?P<static>-static)?", lambda f: (StaticActivations("float8") if f["static"] else Float8(),),
    ),
    RecipeName(
        "w4a16-rtn", "2 to 8-bit weights in groups of 128 inputs with zero points, rounded to nearest "
        "(-g32, -g64, -channel; -sym: no zero points)", "{bits}a16-rtn{group}", lambda f: (Quantize(**_grid(f)),),
    ),
    RecipeName(
        "w4a16-gptq", "the same grids, with GPTQ (act-order, static groups)", "{bits}a16-gptq{group}",
        lambda f: (Gptq(**_grid(f)),),
    ),
    RecipeName(
        "w2a16-autoround", "the same grids, with rounding and clipping learned from the layers' outputs by AutoRound; "
        "for 2 and 3 bits", "{bits}a16-autoround{group}", lambda f: (AutoRound(**_grid(f)),),
    ),
    RecipeName(
        "w4a16-awq", "the same grids, clipped, after AWQ has scaled up salient channels", "{bits}a16-awq{group}",
        lambda f: (Awq(**_grid(f)),),
    ),
    RecipeName(
        "nf4", "4-bit weights at the quantiles of a normal distribution, in groups of 64 (nf4-g128)",
        r"nf4(-g(?P<group>\d+))?", lambda f: (TableQuantize("nf4", int(f["group"] or 64)),),
    ),
    RecipeName(
        "mxfp4", "4-bit floats with a power of two as the scale of each 32 inputs", "mxfp4",
        lambda f: (TableQuantize("mxfp4", 32),),
    ),
    RecipeName(
        "share4", "16 (2 to the power of 4) shared values a matrix, found by k-means", r"share(?P<bits>\d)",
        lambda f: (ShareWeights(int(f["bits"])),),
    ),
    RecipeName(
        "sparse50-magnitude", "sets the smallest half of each matrix to zero; 2:4-magnitude keeps two of every four "
        "inputs", "{sparse}-magnitude",
        lambda f: (NofM(**_sparsity(f)) if f["m"] else Magnitude(**_sparsity(f)),),
    ),
    RecipeName(
        "sparse50-wanda", "prunes by magnitude times input norm; also 2:4-wanda", "{sparse}-wanda",
        lambda f: (Wanda(**_sparsity(f)),),
    ),
    RecipeName(
        "sparse50-sparsegpt", "prunes with error feedback; also 2:4-sparsegpt", "{sparse}-sparsegpt",
        lambda f: (SparseGpt(**_sparsity(f)),),
    ),
    RecipeName(
        "sparse50-sparsegpt-w4", "prunes and rounds to 4 bits in one pass, with a grid an output channel (-g128: a "
        "group)", r"{sparse}-sparsegpt-{bits}(-g(?P<group>\d+))?",
        lambda f: (SparseGpt(**_sparsity(f), bits=int(f["bits"]), group=int(f["group"] or 0)),),
    ),
    RecipeName(
        "lowrank50", "replaces each weight by a product of two narrow matrices with half of its entries",
        r"lowrank(?P<percent>\d+)", lambda f: (Factorize(int(f["percent"]) / 100),),
    ),
    RecipeName(
        "prune-heads25", "removes a quarter of the attention heads; also prune-ffn30, prune-experts50, prune-width20",
        r"prune-(?P<what>heads|ffn|experts|width)(?P<percent>\d+)",
        lambda f: (StructuredPrune(f["what"], int(f["percent"]) / 100),),
    ),
    RecipeName(
        "drop-layers2", "removes two whole layers, of an encoder-decoder those of the decoder "
        "(drop-encoder-layers2: of the encoder)", r"drop-(?P<encoder>encoder-)?layers(?P<count>\d+)",
        lambda f: (DropLayers(int(f["count"]), "encoder" if f["encoder"] else "decoder"),),
    ),
    RecipeName(
        "rotate", "folds random Hadamard rotations into the weights; put it before rounding", "rotate",
        lambda f: (Rotate(),),
    ),
    RecipeName(
        "kv8", "keeps keys and values in int8 while decoding; also kv4, kvfp8", r"kv(?P<kind>8|4|fp8)",
        lambda f: (QuantizeCache({"8": "int8", "4": "int4", "fp8": "fp8"}[f["kind"]]),),
    ),
    RecipeName(
        "half", "stores what is left dense in bfloat16, and scales in float16; put it after the others", "half",
        lambda f: (HalfPrecision(),),
    ),
    RecipeName(
        "deep-compression", "sparse50-sparsegpt, share4 and entropy-coded storage", "deep-compression",
        lambda f: (SparseGpt(0.5), ShareWeights(4)),
    ),
)  # fmt: skip
_COMPILED = [(name.regex, name.make) for name in NAMES]
STORAGE = RecipeName("huffman", "entropy-coded storage, without loss; put it last", "huffman", lambda f: ())


def markdown() -> str:
    """The table of names in README.md."""
    rows = [f"| `{name.example}` | {name.data} | {name.on_cpu} | {name.meaning} |" for name in (*NAMES, STORAGE)]
    return "\n".join(["| recipe | data | on CPU | what it does |", "|---|---|---|---|", *rows])


def parse(name: str) -> Recipe:
    """The recipe of a name such as ``2:4-magnitude+w8a8-dynamic+huffman``.

    Raises:
        UserError: when a part of the name has no form in ``NAMES``.
    """
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
        f"unknown recipe {part!r} in {name!r}; join names with '+' from: {forms}, huffman (last), or give a FILE.py"
    )


def load_recipe(spec: str) -> Recipe:
    """The recipe that ``--recipe`` means.

    Args:
        spec: a name, a Python file that defines ``recipe``, or the compression.json of a model that a recipe made.

    Raises:
        UserError: when the file does not exist or holds no recipe, or the name is unknown.
    """
    if not spec.endswith((".py", ".json")):
        return parse(spec)
    if not Path(spec).is_file():
        raise UserError(
            f"{spec} does not exist; give the name of a recipe, a Python file that defines `recipe`, or a "
            "compression.json"
        )
    if spec.endswith(".json"):
        content = read_json(Path(spec))
        try:
            return Recipe.from_json(content["recipe"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{spec} does not hold a recipe as compression.json does: {error}") from None
    recipe = runpy.run_path(spec).get("recipe")
    if not isinstance(recipe, Recipe):
        raise UserError(f"{spec} does not define `recipe`, a jaxlm.compression.Recipe")
    return recipe
