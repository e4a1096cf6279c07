"""Compresses a model with a recipe or to a budget, and writes a model directory with a report, compression.json.

    jaxlm compress MODEL --recipe w4a16-gptq --calibrate text:some.txt --out DIR
    jaxlm compress MODEL --fit 3.2bits --calibrate text:some.txt --out DIR
    jaxlm compress MODEL --fit 70%zeros --calibrate text:some.txt --out DIR
    jaxlm compress MODEL --max-perplexity +1% --calibrate text:some.txt --out DIR

Recipes are joined with "+", as in 2:4-sparsegpt+w4a16-gptq+huffman; `jaxlm recipes` lists them. For a budget, bits,
groups and sparsity are chosen for each kernel of the layers so that the loss grows least; embeddings and head stay as
they are.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from jaxlm.cli.arguments import add_first_token, add_model, add_special_tokens
from jaxlm.cli.output import ProgressBar, format_bytes, format_shape, print_table

if TYPE_CHECKING:
    from jaxlm.compression.fit.budget import FittedKernel
    from jaxlm.compression.report import TensorReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, adapter=True)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--recipe", metavar="NAME|FILE", help="names of recipes joined with \"+\"; or FILE.py that "
                      "defines `recipe`, or the compression.json of another model")
    goal.add_argument("--fit", metavar="SIZE", default="", help="3.2bits: bits per weight of the layers' kernels, "
                      "scales included; 900MiB: all weights on disk; 70%%zeros: zeros in the layers' kernels")
    goal.add_argument("--max-perplexity", metavar="P", default="", help="the smallest model with at most this "
                      "perplexity on held-out data: 46.5, or +1%% above that of the dense model")
    parser.add_argument("--storage", choices=("plain", "huffman"), default="plain",
                        help="how weights are stored, with --fit and --max-perplexity")
    parser.add_argument("--out", metavar="DIR", required=True, help="the model directory to write")
    parser.add_argument("--calibrate", metavar="SPEC", default="", help="calibration data, for recipes that need it")
    add_special_tokens(parser)
    add_first_token(parser)
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="windows of calibration data (128)")
    parser.add_argument("--context", type=int, default=0, metavar="N",
                        help="tokens in a window; 0: the model's context (0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random choices (0)")


def run(args: argparse.Namespace) -> None:
    import jaxlm
    from jaxlm.compression.names import load_recipe
    from jaxlm.compression.report import summary
    from jaxlm.hf.directory import weight_bytes

    recipe = load_recipe(args.recipe) if args.recipe else None
    lm = jaxlm.load(args.model, adapter=args.adapter, expand=False)
    small = jaxlm.compress(
        lm, recipe, fit=args.fit, max_perplexity=args.max_perplexity, storage=args.storage, calibrate=args.calibrate,
        special_tokens=args.special_tokens or "text", first_token=args.first_token or "auto",
        samples=args.samples, context=args.context, seed=args.seed,
        progress=ProgressBar(),
    )
    out = small.save(args.out)
    if small.fitted_kernels:
        measure = "bytes" if any(row.choice and row.choice.bits for row in small.fitted_kernels) else "nonzero"
        print_table([_kernel_row(row, measure) for row in small.fitted_kernels])
        predicted, final = (sum(getattr(row, name) for row in small.fitted_kernels) for name in ("predicted", "final"))
        print(f"loss added, in nats a token: {predicted:.4f} predicted, {final:.4f} with the final kernels")
    print_table([_tensor_row(row) for row in (*small.report, summary(small.report))])
    for note in small.info["notes"]:
        print(f"note: {note}")
    before = f"{format_bytes(lm.info['bytes_on_disk'])} to " if "bytes_on_disk" in lm.info else ""
    print(f"{out}: {before}{format_bytes(weight_bytes(out))} of weights")


def _tensor_row(row: TensorReport) -> dict[str, Any]:
    error = "" if row.relative_error is None else f"{row.relative_error:.4f}"
    return {
        "tensor": row.path, "shape": format_shape(row.shape), "representation": row.representation,
        "bits": f"{row.bits:.2f}", "sparsity": f"{row.sparsity:.0%}", "bytes": row.bytes, "error": error,
    }


def _kernel_row(row: FittedKernel, measure: str) -> dict[str, Any]:
    """What a fit chose for a kernel; ``measure`` names its size: "bytes" or "nonzero"."""
    choice, bits, group, sparsity = row.choice, "dense", "", ""
    if choice is not None:
        sparsity = f"{choice.n}:{choice.m}" if choice.m else f"{choice.sparsity:.0%}"
        bits, group = (str(choice.bits), str(choice.group or "channel")) if choice.bits else (bits, group)
    return {
        "kernel": row.kernel, "bits": bits, "group": group, "sparsity": sparsity, measure: row.size,
        "predicted": f"{row.predicted:.2e}", "final": f"{row.final:.2e}",
    }
