"""GPTQ of a whole model by jaxlm and by the authors' PyTorch code, in turn: seconds, peak memory, and perplexity.

    python tests/benchmarks/compression/gptq_model.py --gptq DIR [--rounds 3]

DIR is a checkout of IST-DASLab/gptq; transformers is needed. Both quantize to int4 in groups of 128, asymmetric,
act-order with static groups, and calibrate with 128 windows of 256 tokens. JAXLM_SHARED names the directory of the
model and of its calibration and evaluation tokens. Each run is a process of its own, which loads the model, compresses
it once to warm up (jaxlm compiles then), and once for the measurement. The authors' solver is driven as their llama.py
does it: layer by layer, one window at a time; hooks gather the inputs of a layer, and its outputs are computed anew
with the rounded weights. Memory is the largest resident set while compressing, less the resident set before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SHARED = Path(os.environ.get("JAXLM_SHARED") or Path(__file__).parents[4] / "shared")
MODEL, BOOKS = SHARED / "models/books-llama", SHARED / "data/books"


def memory(field: str) -> int:
    """A figure of /proc/self/status for this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def ours() -> None:
    import jax

    import jaxlm

    lm = jaxlm.load(MODEL)

    def run():
        small = jaxlm.compress(lm, "w4a16-gptq", calibrate=f"tokens:{BOOKS / 'calibration_tokens.npy'}", context=256)
        jax.block_until_ready(small.params)
        return small

    clock(run, lambda small: small.evaluate(f"tokens:{BOOKS / 'valid_tokens.npy'}", context=256)["perplexity"])


def authors(checkout: str) -> None:
    sys.path.insert(0, checkout)
    import torch
    from gptq import GPTQ
    from quant import Quantizer
    from transformers import LlamaForCausalLM

    torch.cuda.synchronize = lambda: None  # which they call, on CPU too
    windows = torch.from_numpy(np.load(BOOKS / "calibration_tokens.npy").astype(np.int64)).reshape(-1, 256)

    @torch.no_grad()
    def run():
        model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        layers, states, others = model.model.layers, [], {}

        def catch(_, inputs, named):
            states.append(inputs[0])
            others.update(named)

        hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        for window in windows:
            model(window[None], use_cache=False)
        hook.remove()
        for layer in layers:
            solvers = {each: GPTQ(each) for each in layer.modules() if isinstance(each, torch.nn.Linear)}
            hooks = [
                each.register_forward_hook(lambda _, x, y, solver=solver: solver.add_batch(x[0].data, y.data))
                for each, solver in solvers.items()
            ]
            for state in states:
                layer(state, **others)
            for each in hooks:
                each.remove()
            for solver in solvers.values():
                solver.quantizer = Quantizer()
                solver.quantizer.configure(4, perchannel=True, sym=False)
                with contextlib.redirect_stdout(None):
                    solver.fasterquant(groupsize=128, actorder=True, static_groups=True)
            states = [layer(state, **others) for state in states]
            states = [state[0] if isinstance(state, tuple) else state for state in states]
        return model

    @torch.no_grad()
    def perplexity(model) -> float:
        valid = torch.from_numpy(np.load(BOOKS / "valid_tokens.npy").astype(np.int64)).reshape(-1, 256)
        losses = [float(model(each, labels=each).loss) for each in valid.split(16)]
        return float(np.exp(np.mean(losses)))

    clock(run, perplexity)


def clock(run, perplexity) -> None:
    """Prints what this process found, as JSON."""
    first = time.perf_counter()
    run()
    first = time.perf_counter() - first
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is that from now on
    before, start = memory("VmRSS"), time.perf_counter()
    model = run()
    seconds = time.perf_counter() - start
    found = {"first": first, "seconds": seconds, "peak": memory("VmHWM") - before, "perplexity": perplexity(model)}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptq", metavar="DIR", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=("jaxlm", "authors"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return ours() if args.child == "jaxlm" else authors(args.gptq)
    found: dict[str, list[dict[str, float]]] = {"jaxlm": [], "authors": []}
    for _ in range(args.rounds):
        for name, each in found.items():
            words = [sys.executable, __file__, "--gptq", args.gptq, "--child", name]
            result = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            each.append(json.loads(result.stdout.splitlines()[-1]))
    for name, each in found.items():
        first, seconds, peak, perplexity = (
            statistics.median(one[key] for one in each) for key in ("first", "seconds", "peak", "perplexity")
        )
        print(f"{name:8} {seconds:6.2f} s, the first time {first:6.2f} s; peak memory {peak / 2**20:5.0f} MiB above "
              f"what it held; perplexity {perplexity:.4f}")
    for key in ("seconds", "first"):
        ratios = [mine[key] / theirs[key] for mine, theirs in zip(*found.values(), strict=True)]
        print(f"{key}: jaxlm / authors, median of {len(ratios)} rounds {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
