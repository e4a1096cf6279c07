"""Compresses a model by a recipe. Writes a model directory, with what happened to each tensor in compression.json.

Recipes compose with "+": w8a8-dynamic, w4a16-rtn (groups of 128; -g64 for 64), sparse50-magnitude, 2:4-magnitude, and
at the end huffman for entropy-coded storage, as in sparse50-magnitude+w4a16-rtn-g64+huffman.
"""

from __future__ import annotations

from jaxlm.cli.arguments import add_model
from jaxlm.cli.output import print_table, shape_str, size


def add_arguments(parser) -> None:
    add_model(parser, adapter=True)
    parser.add_argument("--recipe", metavar="NAME|FILE.py", required=True, help="see above; a file says recipe = ...")
    parser.add_argument("--out", metavar="DIR", required=True, help="the model directory to write")


def run(args) -> None:
    import jaxlm
    from jaxlm.checkpoint.directory import weight_bytes
    from jaxlm.compression.recipe import load_recipe
    from jaxlm.compression.report import summary

    recipe = load_recipe(args.recipe)
    lm = jaxlm.load(args.model, adapter=args.adapter, expand=False)
    small = jaxlm.compress(lm, recipe)
    out = small.save(args.out)
    print_table([_shown(row) for row in (*small.report, summary(small.report))])
    before = f"{size(lm.info['bytes_on_disk'])} to " if "bytes_on_disk" in lm.info else ""
    print(f"{out}: {before}{size(weight_bytes(out))} of weights")


def _shown(row) -> dict:
    error = "" if row.relative_error != row.relative_error else f"{row.relative_error:.4f}"
    return {
        "tensor": row.path, "shape": shape_str(row.shape), "representation": row.representation,
        "bits": f"{row.bits:.2f}", "sparsity": f"{row.sparsity:.0%}", "bytes": row.bytes, "error": error,
    }
