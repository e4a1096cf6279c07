"""Compresses a model by a recipe or to a budget. Writes a model directory; compression.json tells of each tensor.

    jaxlm compress MODEL --recipe w4a16-gptq --calibrate text:some.txt --out DIR
    jaxlm compress MODEL --fit 3.2bits --calibrate text:some.txt --out DIR
    jaxlm compress MODEL --fit 70%zeros --calibrate text:some.txt --out DIR
    jaxlm compress MODEL --max-perplexity +1% --calibrate text:some.txt --out DIR

Recipes compose with "+", as in 2:4-sparsegpt+w4a16-gptq+huffman; `jaxlm recipes` lists them. A budget is met by bits,
groups and sparsity chosen for each kernel of the blocks, to the least loss; embeddings and head stay as they are.
"""

from __future__ import annotations

from jaxlm.cli.arguments import add_model
from jaxlm.cli.output import Progress, print_table, shape_str, size


def add_arguments(parser) -> None:
    add_model(parser, adapter=True)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--recipe", metavar="NAME|FILE", help="see above; FILE.py that says recipe = ..., or a "
                      "compression.json")
    goal.add_argument("--fit", metavar="SIZE", default="", help="3.2bits, for each weight of the blocks' kernels with "
                      "its share of scales; 900MiB, for all weights on disk; or 70%%zeros, of these kernels")
    goal.add_argument("--max-perplexity", metavar="P", default="", help="the smallest model that keeps 46.5, or +1%% "
                      "above the dense one's, on a part of the data")
    parser.add_argument("--storage", choices=("plain", "huffman"), default="plain", help="of a model without a recipe")
    parser.add_argument("--out", metavar="DIR", required=True, help="the model directory to write")
    parser.add_argument("--calibrate", metavar="SPEC", default="", help="data, for the recipes that need some")
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="windows of it to use (128)")
    parser.add_argument("--context", type=int, default=0, metavar="N", help="tokens in a window; 0: the model's own")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is random (0)")


def run(args) -> None:
    import jaxlm
    from jaxlm.compression.names import load_recipe
    from jaxlm.compression.report import summary
    from jaxlm.hf.directory import weight_bytes

    recipe = load_recipe(args.recipe) if args.recipe else None
    lm = jaxlm.load(args.model, adapter=args.adapter, expand=False)
    small = jaxlm.compress(
        lm, recipe, fit=args.fit, max_perplexity=args.max_perplexity, storage=args.storage, calibrate=args.calibrate,
        samples=args.samples, context=args.context, seed=args.seed, progress=Progress(),
    )
    out = small.save(args.out)
    if small.fitted_kernels:
        measure = "bytes" if any(row.choice and row.choice.bits for row in small.fitted_kernels) else "nonzero"
        print_table([_chosen(row, measure) for row in small.fitted_kernels])
        predicted, final = (sum(getattr(row, name) for row in small.fitted_kernels) for name in ("predicted", "final"))
        print(f"loss added, in nats a token: {predicted:.4f} predicted, {final:.4f} as the kernels are solved for")
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


def _chosen(row, measure: str) -> dict:
    choice, bits, group, sparsity = row.choice, "dense", "", ""
    if choice is not None:
        sparsity = f"{choice.n}:{choice.m}" if choice.m else f"{choice.sparsity:.0%}"
        bits, group = (str(choice.bits), str(choice.group or "channel")) if choice.bits else (bits, group)
    return {
        "kernel": row.kernel, "bits": bits, "group": group, "sparsity": sparsity, measure: row.size,
        "predicted": f"{row.predicted:.2e}", "final": f"{row.final:.2e}",
    }
