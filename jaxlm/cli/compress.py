"""Compresses a model by a recipe. Writes a model directory, with what happened to each tensor in compression.json.

    jaxlm compress MODEL --recipe w4a16-gptq --calibrate text:some.txt --out DIR

Recipes compose with "+", as in 2:4-sparsegpt+w4a16-gptq+huffman; `jaxlm recipes` lists them.
"""

from __future__ import annotations

from jaxlm.cli.arguments import add_model
from jaxlm.cli.output import Progress, print_table, shape_str, size


def add_arguments(parser) -> None:
    add_model(parser, adapter=True)
    parser.add_argument("--recipe", metavar="NAME|FILE.py", required=True, help="see above; a file says recipe = ...")
    parser.add_argument("--out", metavar="DIR", required=True, help="the model directory to write")
    parser.add_argument("--calibrate", metavar="SPEC", default="", help="data, for the recipes that need some")
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="windows of it to use (128)")
    parser.add_argument("--context", type=int, default=0, metavar="N", help="tokens in a window; 0: the model's own")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is random (0)")


def run(args) -> None:
    import jaxlm
    from jaxlm.checkpoint.directory import weight_bytes
    from jaxlm.compression.recipe import load_recipe
    from jaxlm.compression.report import summary

    recipe = load_recipe(args.recipe)
    lm = jaxlm.load(args.model, adapter=args.adapter, expand=False)
    small = jaxlm.compress(
        lm, recipe, calibrate=args.calibrate, samples=args.samples, context=args.context, seed=args.seed,
        progress=Progress(),
    )
    out = small.save(args.out)
    print_table([_shown(row) for row in (*small.report, summary(small.report))])
    for note in small.info["notes"]:
        print(f"note: {note}")
    before = f"{size(lm.info['bytes_on_disk'])} to " if "bytes_on_disk" in lm.info else ""
    print(f"{out}: {before}{size(weight_bytes(out))} of weights")


def _shown(row) -> dict:
    error = "" if row.relative_error is None else f"{row.relative_error:.4f}"
    return {
        "tensor": row.path, "shape": shape_str(row.shape), "representation": row.representation,
        "bits": f"{row.bits:.2f}", "sparsity": f"{row.sparsity:.0%}", "bytes": row.bytes, "error": error,
    }
