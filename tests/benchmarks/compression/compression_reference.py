"""Every compression method beside its authors' code, on a small Llama trained on books.

    python tests/benchmarks/compression/compression_reference.py [--only GPTQ] [--json FILE]
    python tests/benchmarks/compression/compression_reference.py --show FILE

JAXLM_SHARED names the directory of the model, of the calibration and evaluation tokens, and of
reference/compression.json with the perplexities and seconds of the authors' code under the same protocol. Prints a row
for each reference: both perplexities, how far jaxlm's is above the authors', and the seconds of both (jaxlm's include
calibration and are those of the second of two runs, so that compilation is left out). Methods without a reference are
compared with the authors' GPTQ on the same grid, and left out of the mean. ``--show`` prints the table of a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

import jaxlm
from jaxlm.compression.names import parse
from jaxlm.compression.quantize.gptq import Gptq
from jaxlm.compression.recipe import Recipe


def _sequential(bits: int, group: int = 128) -> Recipe:
    name = f"w{bits}a16-gptq" + f"-g{group}" * (group != 128)
    return Recipe((Gptq(bits, group, true_sequential=True),), name=f"{name}, true_sequential")


# (method, setting as it begins) -> our recipe; the first that fits. "" is a row without a counterpart of its own.
RECIPES: tuple[tuple[str, str, str | Recipe], ...] = (
    ("RTN", "int8 sym g128", "w8a16-rtn-sym"),
    ("RTN", "int4 sym g128", "w4a16-rtn-sym"),
    ("RTN", "int3 sym g128", "w3a16-rtn-sym"),
    ("RTN", "int4 asym g128", "w4a16-rtn"),
    ("RTN", "int3 asym g128", "w3a16-rtn"),
    ("RTN", "int4 asym g64", "w4a16-rtn-g64"),
    ("RTN", "int3 asym g64", "w3a16-rtn-g64"),
    ("RTN", "int2 asym g64", "w2a16-rtn-g64"),
    ("RTN", "int4 sym per-channel", "w4a16-rtn-channel-sym"),
    ("RTN", "int4 asym per-channel", "w4a16-rtn-channel"),
    ("GPTQ", "int4 sym g128 act-order", "w4a16-gptq-sym"),
    ("GPTQ", "int4 asym g128 act-order static-groups true-sequential", _sequential(4)),
    ("GPTQ", "int3 asym g128 act-order static-groups true-sequential", _sequential(3)),
    ("GPTQ", "int2 asym g64 act-order static-groups true-sequential", _sequential(2, 64)),
    ("GPTQ", "int4 asym g128 act-order", "w4a16-gptq"),
    ("GPTQ", "int3 asym g128 act-order", "w3a16-gptq"),
    ("GPTQ", "int2 asym g64 act-order", "w2a16-gptq-g64"),
    ("GPTQ", "int4 asym g128, other", ""),
    ("GPTQ", "int3 asym g128, other", ""),
    ("GPTQ", "int4 sym g128", "w4a16-gptq-sym"),
    ("GPTQ", "int4 asym g128", "w4a16-gptq"),
    ("GPTQ", "int3 asym g128", "w3a16-gptq"),
    ("GPTQ", "int4 sym g64", "w4a16-gptq-g64-sym"),
    ("GPTQ", "int4 asym g64", "w4a16-gptq-g64"),
    ("GPTQ", "int3 asym g64", "w3a16-gptq-g64"),
    ("GPTQ", "int2 asym g64", "w2a16-gptq-g64"),
    ("GPTQ", "int4 sym per-channel", "w4a16-gptq-channel-sym"),
    ("GPTQ", "int4 asym per-channel", "w4a16-gptq-channel"),
    ("magnitude", "50%", "sparse50-magnitude"),
    ("magnitude", "70%", "sparse70-magnitude"),
    ("magnitude", "80%", "sparse80-magnitude"),
    ("magnitude", "2:4", "2:4-magnitude"),
    ("Wanda", "50%, other", ""),
    ("Wanda", "50%", "sparse50-wanda"),
    ("Wanda", "70%", "sparse70-wanda"),
    ("Wanda", "80%", "sparse80-wanda"),
    ("Wanda", "2:4", "2:4-wanda"),
    ("SparseGPT", "50%, other", ""),
    ("SparseGPT", "50% + int4 asym per-channel", "sparse50-sparsegpt-w4"),
    ("SparseGPT", "2:4 + int4 asym per-channel", "2:4-sparsegpt-w4"),
    ("SparseGPT", "50%", "sparse50-sparsegpt"),
    ("SparseGPT", "70%", "sparse70-sparsegpt"),
    ("SparseGPT", "80%", "sparse80-sparsegpt"),
    ("SparseGPT", "2:4", "2:4-sparsegpt"),
    ("AWQ", "int4 asym g128", "w4a16-awq"),
    ("AWQ", "int4 asym g64", "w4a16-awq-g64"),
    ("W8A8", "per-channel", "w8a8-dynamic"),
    ("SmoothQuant", "W8A8", "w8a8-smooth"),
    ("torchao", "int8 weight-only", "w8a16-rtn-channel-sym"),
    ("torchao", "int8 dynamic", "w8a8-dynamic"),
)
# (method, our recipe) -> the row that it is set beside
BESIDE: tuple[tuple[str, str, tuple[str, str]], ...] = (
    ("AutoRound", "w2a16-autoround-g64", ("GPTQ", "int2 asym g64 act-order static-groups true-sequential")),
    ("AutoRound", "w3a16-autoround", ("GPTQ", "int3 asym g128")),
)


def recipe_of(row: dict) -> Recipe | None:
    for method, setting, recipe in RECIPES:
        if row["method"] == method and row["setting"].startswith(setting):
            return (parse(recipe) if recipe else None) if isinstance(recipe, str) else recipe
    raise SystemExit(f"no recipe for {row['method']} {row['setting']}")


def markdown(rows: list[dict]) -> str:
    """A row for each of theirs; "s" are seconds of the solver, recorded with the reference, and ours where measured."""

    def cells(row: dict) -> str:
        times = row["seconds_theirs"], row["seconds"]
        seconds = "" if None in times else "{:.1f} / {:.1f}".format(*times)
        return (f"| {row['method']} | {row['setting']} | `{row['recipe']}` | {row['theirs']:.3f} | {row['ours']:.3f} | "
                f"{row['above']:+.2%} | {seconds} |")

    head = ("| method | setting | recipe | authors | jaxlm | above | s, recorded / ours |\n"
            "|---|---|---|---:|---:|---:|---:|")
    own = [row["above"] for row in rows if not row["setting"].startswith("beside ")]
    mean = f"Mean of {len(own)} rows {np.mean(own):+.2%}, largest {max(own):+.2%}."
    return "\n".join([head, *map(cells, rows), "", mean])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="METHOD", help="rows whose method or setting contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows it holds are not made again, but to time them")
    parser.add_argument("--show", type=Path, metavar="FILE")
    parser.add_argument("--once", action="store_true", help="compress once, untimed")
    args = parser.parse_args()
    if args.show:
        print(markdown(json.loads(args.show.read_text())))
        return
    shared = Path(os.environ.get("JAXLM_SHARED") or Path(__file__).parents[4] / "shared")
    reference = json.loads((shared / "reference/compression.json").read_text())
    lm = jaxlm.load(shared / "models/books-llama")
    calibrate, data = (f"tokens:{shared / reference[key]}" for key in ("calibration", "evaluation"))
    done: dict[Recipe, tuple[float, float]] = {}
    out = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    made = {(row["method"], row["setting"]) for row in out if args.once or row["seconds"] is not None}
    print(f"{'method':<12}{'setting':<58}{'theirs':>9}{'ours':>10}{'above':>9}{'s theirs':>10}{'s ours':>8}")
    rows = [row for row in reference["rows"] if row["method"] != "dense"]
    theirs = {(row["method"], row["setting"]): row for row in rows}
    for method, name, peer in BESIDE:
        rows.append(theirs[peer] | {"method": method, "setting": f"beside {' '.join(peer)}", "recipe": name})
    order = [(row["method"], row["setting"]) for row in rows]
    for row in rows:
        if args.only not in f"{row['method']} {row['setting']}" or (row["method"], row["setting"]) in made:
            continue
        if (recipe := parse(row["recipe"]) if "recipe" in row else recipe_of(row)) is None:
            continue
        if recipe not in done:
            for _ in range(1 if args.once else 2):
                begin = time.perf_counter()
                small = jaxlm.compress(lm, recipe, calibrate=calibrate, context=256)
                jax.block_until_ready(small.params)
                seconds = time.perf_counter() - begin
            done[recipe] = small.evaluate(data, context=256)["perplexity"], None if args.once else seconds
        ours, seconds = done[recipe]
        above = ours / row["ppl"] - 1
        new = {"method": row["method"], "setting": row["setting"], "recipe": recipe.name, "theirs": row["ppl"],
               "ours": ours, "above": above, "seconds_theirs": row.get("seconds"), "seconds": seconds}
        kept = [old for old in out if (old["method"], old["setting"]) != (row["method"], row["setting"])]
        out = sorted([*kept, new], key=lambda row: order.index((row["method"], row["setting"])))
        told = f"{row['method']:<12}{row['setting'][:57]:<58}{row['ppl']:>9.4f}{ours:>10.4f}{above:>+9.2%}"
        print(f"{told}{row.get('seconds') or 0:>10.1f}{seconds or 0:>8.1f}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(out, indent=1) + "\n")
    if not out:
        sys.exit("no such row")
    if own := [row["above"] for row in out if not row["setting"].startswith("beside ")]:
        print(f"{len(own)} rows, mean {np.mean(own):+.3%}, largest {max(own):+.3%}")


if __name__ == "__main__":
    main()
