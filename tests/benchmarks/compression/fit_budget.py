"""What a fit of the bits to each kernel gains over the same bits for all kernels, on a small Llama trained on books.

    python tests/benchmarks/compression/fit_budget.py [--bits 2.5,3.5] [--json FILE] [--table]

JAXLM_SHARED names the directory of the model and of the calibration and evaluation tokens; reference/README.md there
describes the protocol. For each uniform GPTQ recipe it prints the bits of a weight as stored (float32 scales and zero
points included), the perplexity, the perplexity of the same grids with the clip search and the sweeps that fitted
kernels get, and that of the model that was fitted to exactly as many bytes. Then it prints fitted models of the sizes
in between.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from functools import partial
from pathlib import Path

import jaxlm
from jaxlm import nn
from jaxlm.checkpoint.storage import PackedWeights, leaf_bytes
from jaxlm.compression.calibration import Calibration
from jaxlm.compression.fit.budget import Budget
from jaxlm.compression.fit.kernel_solver import KernelChoice
from jaxlm.compression.fit.mixed_precision import MixedPrecision
from jaxlm.compression.fit.search import BudgetSearch
from jaxlm.compression.fit.sensitivity import SOLVER, measure_sensitivity
from jaxlm.compression.names import parse
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.steps import LAYER_KERNELS
from jaxlm.data.calibration import calibration_batches
from jaxlm.nn.layerwise import LayerwiseModel

UNIFORM = {
    "w2a16-gptq-g64": (2, 64), "w2a16-gptq-g128": (2, 128), "w3a16-gptq-channel": (3, 0), "w3a16-gptq": (3, 128),
    "w3a16-gptq-g64": (3, 64), "w4a16-gptq-channel": (4, 0), "w4a16-gptq": (4, 128),
}  # fmt: skip


def kernel_bytes(config, params, packed: PackedWeights) -> int:
    return sum(size.nbytes for path, size in packed.sizes.items() if re.fullmatch(LAYER_KERNELS, path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", default="2.4,2.75,3.0", help="sizes in between, of fitted models only")
    parser.add_argument("--only", default="", metavar="NAME", help="uniform recipes whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--table", action="store_true", help="also what was chosen for each kernel")
    args = parser.parse_args()
    shared = Path(os.environ.get("JAXLM_SHARED") or Path(__file__).parents[4] / "shared")
    lm = jaxlm.load(shared / "models/books-llama")
    tokens = shared / "data/books"
    batches = calibration_batches(
        f"tokens:{tokens / 'calibration_tokens.npy'}", lm.tokenizer, pairs=False, samples=128, context=256, seed=0
    )
    calibration = Calibration(batches, lambda config: LayerwiseModel(config, nn.initializer(config)[0]))
    sensitivity = measure_sensitivity(lm.config, lm.params, calibration, leaf_bytes)
    search = BudgetSearch(lm.config, lm.params, calibration, sensitivity, leaf_bytes)
    weights = sum(sensitivity.weights.values())

    def score(model) -> tuple[float, float]:
        """Bits a weight and perplexity."""
        bits = 8 * kernel_bytes(model.config, model.params, PackedWeights(model.params)) / weights
        small = lm.replace(config=lm.config, params=search.expand(model))
        return bits, small.evaluate(f"tokens:{tokens / 'valid_tokens.npy'}", context=256)["perplexity"]

    def fitted(bits: float) -> dict:
        done = search.within(Budget(bits=bits), kernel_bytes)
        stored_bits, ours = score(done.model)
        if args.table:
            for row in done.kernels:
                print(f"    {row.kernel:<22}{row.choice}  predicted {row.predicted:.2e} final {row.final:.2e}")
        predicted, final = (sum(getattr(row, name) for row in done.kernels) for name in ("predicted", "final"))
        return {"fit_bits": stored_bits, "fit": ours, "predicted": predicted, "final": final}

    rows = []
    print(f"{'uniform':<22}{'bits':>8}{'perplexity':>12}{'searched':>10}{'fit bits':>10}{'fit':>10}{'predicted':>11}")
    run = partial(Recipe.run, config=lm.config, params=lm.params, calibration=calibration)
    for name, (bits, group) in UNIFORM.items():
        if args.only in name:
            size, plain = score(run(parse(name)))
            choices = tuple(KernelChoice(kernel, bits, group) for kernel in sensitivity.candidates)
            step = MixedPrecision(choices, **dataclasses.asdict(SOLVER))
            _, searched = score(run(Recipe((step,))))
            rows.append({"uniform": name, "bits": size, "plain": plain, "searched": searched} | fitted(size))
            show(rows[-1])
    for bits in filter(None, args.bits.split(",")):
        rows.append({"uniform": "", "bits": float(bits)} | fitted(float(bits)))
        show(rows[-1])
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def show(row: dict) -> None:
    plain, searched = (f"{row[name]:.4f}" if name in row else "" for name in ("plain", "searched"))
    told = f"{row['uniform']:<22}{row['bits']:>8.4f}{plain:>12}{searched:>10}{row['fit_bits']:>10.4f}"
    print(f"{told}{row['fit']:>10.4f}{row['predicted']:>11.4f}", flush=True)


if __name__ == "__main__":
    main()
