"""Size against BLEU of a Multi30k translator under many recipes.

    python tests/benchmarks/compression/multi30k_pareto.py RUN --data bitext:test.en.gz,test.de.gz \\
        --calibrate bitext:train.en.gz,train.de.gz --out DIR [--sparse RUN2]
    python tests/benchmarks/compression/multi30k_pareto.py --show FILE

RUN is a training run of configs/multi30k.py; RUN2 is one that continued from it and pruned 80% of the weights. Prints a
row for each recipe, and writes DIR/multi30k_pareto.json and its picture. ``--show`` prints the table of such a file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import jaxlm
from jaxlm.compression.names import parse
from jaxlm.compression.prune.sparsegpt import SparseGpt
from jaxlm.compression.quantize.autoround import AutoRound
from jaxlm.compression.quantize.gptq import Gptq
from jaxlm.compression.quantize.half_precision import HalfPrecision
from jaxlm.compression.quantize.rtn import Quantize
from jaxlm.compression.recipe import Recipe
from jaxlm.evaluation.comparison import Comparison
from jaxlm.hf.directory import weight_bytes
from jaxlm.pictures.curves import size_quality

TABLE = "embed/table"  # which is the output head too
RECIPES: tuple[Recipe, ...] = (
    parse("w8a8-dynamic"),
    parse("deep-compression"),
    parse("w4a16-gptq+half+huffman"),
    Recipe((Gptq(4, 64), Quantize(8, target=TABLE)), "huffman", "w4-gptq, table w8"),
    Recipe((Gptq(4, 128), Quantize(4, target=TABLE), HalfPrecision()), "huffman", "w4-gptq, table w4, half"),
    Recipe((Gptq(3, 128), Quantize(4, target=TABLE), HalfPrecision()), "huffman", "w3-gptq, table w4, half"),
    Recipe((Gptq(3, 128), Quantize(3, target=TABLE), HalfPrecision()), "huffman", "w3-gptq, table w3, half"),
    Recipe(
        (SparseGpt(0.5, bits=4), Quantize(4, target=TABLE), HalfPrecision()), "huffman", "sparse50-w4, table w4, half"
    ),
    Recipe((AutoRound(2, 64), Quantize(4, target=TABLE), HalfPrecision()), "huffman", "w2-autoround, table w4, half"),
)
SPARSE: tuple[Recipe, ...] = tuple(
    Recipe(
        (Gptq(4, 128), Quantize(bits, target=TABLE), HalfPrecision()), "huffman",
        f"sparse80, w4-gptq, table w{bits}, half",
    )
    for bits in (5, 4)
)


def markdown(rows: list[dict]) -> str:
    head = "| recipe | KiB | smaller | BLEU | perplexity |\n|---|---:|---:|---:|---:|"
    dense = rows[0]["bytes_on_disk"]
    return "\n".join([head, *(
        f"| {row['name']} | {row['bytes_on_disk'] / 1024:,.0f} | {dense / row['bytes_on_disk']:.1f}x | "
        f"{row['bleu']:.2f} | {row['perplexity']:.3f} |" for row in rows
    )])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--data", metavar="SPEC")
    parser.add_argument("--calibrate", metavar="SPEC")
    parser.add_argument("--sparse", type=Path, metavar="RUN2")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--show", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", metavar="NAME", help="recipes whose name contains this")
    args = parser.parse_args()
    if args.show:
        print(markdown(json.loads(args.show.read_text())))
        return
    if not (args.run and args.data and args.calibrate and args.out):
        parser.error("give RUN, --data, --calibrate and --out, or --show")
    args.out.mkdir(parents=True, exist_ok=True)
    dense = jaxlm.load(args.run)
    rows: list[Comparison] = []
    print(f"{'recipe':<36}{'KiB':>8}{'smaller':>9}{'BLEU':>8}{'perplexity':>12}")
    todo = [(dense, recipe) for recipe in RECIPES]
    if args.sparse:
        todo += [(jaxlm.load(args.sparse), recipe) for recipe in SPARSE]
    for lm, recipe in [(dense, None), *(each for each in todo if args.only in each[1].name)]:
        lm = lm if recipe is None else jaxlm.compress(lm, recipe, calibrate=args.calibrate)
        with tempfile.TemporaryDirectory() as directory:
            size = weight_bytes(lm.save(Path(directory) / "model"))
            lm = jaxlm.load(Path(directory) / "model")  # what is evaluated has been on disk
            scores = lm.evaluate(args.data, beam=5)
        name = "dense" if recipe is None else recipe.name
        rows.append(Comparison(name, size, 0, 0.0, scores["perplexity"], scores["bleu"], 0.0, scores["signature"], ()))
        print(f"{name:<36}{size / 1024:>8.0f}{rows[0].bytes_on_disk / size:>8.1f}x{scores['bleu']:>8.2f}"
              f"{scores['perplexity']:>12.3f}", flush=True)
    print(rows[0].signature)
    (args.out / "multi30k_pareto.json").write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    size_quality(rows).savefig(args.out / "multi30k_pareto.png")


if __name__ == "__main__":
    main()
