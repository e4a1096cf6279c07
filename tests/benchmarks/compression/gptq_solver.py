"""The GPTQ and SparseGPT solvers of jaxlm and the authors' PyTorch code on one matrix, in turn: seconds and loss.

    python tests/benchmarks/compression/gptq_solver.py --gptq DIR            # a checkout of IST-DASLab/gptq
    python tests/benchmarks/compression/gptq_solver.py --sparsegpt DIR       # a checkout of IST-DASLab/sparsegpt

torch is needed. GPTQ: int4, groups of 128, asymmetric, act-order with static groups; SparseGPT: half of the weights.
The inputs are correlated, like those of a real layer. "loss" is ``tr((W - Q) H (W - Q)^T)``, the mean over tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxlm.compression.prune.sparsegpt import sparsegpt
from jaxlm.compression.quantize.gptq import gptq
from jaxlm.compression.quantize.rtn import IntegerGrid


def problem(n_out: int, n_in: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    x = normal(2 * n_in, n_in // 4) @ normal(n_in // 4, n_in) * (n_in // 4) ** -0.5 + 0.3 * normal(2 * n_in, n_in)
    return normal(n_out, n_in), x.T @ x / len(x)


def ours(w: np.ndarray, h: np.ndarray, prune: bool) -> Callable[[], jax.Array]:
    w, h = jax.device_put(w), jax.device_put(h)

    def run():
        if prune:
            return jax.block_until_ready(sparsegpt(w, h, sparsity=0.5).weights_OxI)
        grid = IntegerGrid(4)
        found = gptq(w, h, grid=grid, group=128)
        return jax.block_until_ready(grid.values(found.codes_OxI, found.params, 128))

    return run


def authors(w: np.ndarray, h: np.ndarray, prune: bool, checkout: str) -> Callable[[], np.ndarray]:
    sys.path.insert(0, checkout)
    import torch

    torch.cuda.synchronize = lambda: None  # which they call, on CPU too
    if prune:
        from sparsegpt import SparseGPT as Solver
    else:
        from gptq import GPTQ as Solver
        from quant import Quantizer

    @torch.no_grad()
    def run():
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        layer.weight.data = torch.from_numpy(w)
        solver = Solver(layer)
        solver.H = torch.from_numpy(h.copy())
        with contextlib.redirect_stdout(None):
            if prune:
                solver.fasterprune(0.5)
            else:
                solver.quantizer = Quantizer()
                solver.quantizer.configure(4, perchannel=True, sym=False)
                solver.fasterquant(groupsize=128, actorder=True, static_groups=True)
        return layer.weight.numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--gptq", metavar="DIR")
    which.add_argument("--sparsegpt", metavar="DIR")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096], help="inputs, and as many outputs")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    prune = args.gptq is None
    for size in args.sizes:
        w, h = problem(size, size)
        runs = {"jaxlm": ours(w, h, prune), "authors": authors(w, h, prune, args.gptq or args.sparsegpt)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(args.rounds + 1):
            for name, run in runs.items():
                if not turn and name == "authors":  # the first round compiles
                    continue
                begin = time.perf_counter()
                q = np.asarray(run())
                seconds = time.perf_counter() - begin
                times[name] += [seconds] if turn else []
                if turn <= 1:
                    note = f"first call {seconds:.2f} s" if not turn else f"loss {np.sum((w - q) @ h * (w - q)):.6g}"
                    print(f"{size} x {size}  {name:8} {note}")
        for name, each in times.items():
            print(f"{size} x {size}  {name:8} median {statistics.median(each):7.3f} s, best {min(each):7.3f}")
        ratios = [mine / theirs for mine, theirs in zip(*times.values(), strict=True)]
        print(f"{size} x {size}  jaxlm / authors: median of {len(ratios)} rounds {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
