"""Products with compressed weights against dense float32 ones through ``ops.dot`` on a CPU.

    taskset -c 0 python tests/benchmarks/inference/cpu_dots.py [--kinds w8a8 w8a16] [--shapes 1024x1024] [--rows 1 128]

Its output is the table of ``jaxlm.compression.platforms``: time dense / time compressed, medians of rounds taken in
turn. Time is the processor time of the process; on one core, other processes of the machine do not count. ``stack``
scans layers, ``lone`` multiplies by separate matrices. All matrices together are larger than the second-level cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.compression.quantize import codebook, float8, rtn
from jaxlm.core import ops
from jaxlm.core.leaves import Codebook, LowRank

BYTES = 2**25  # of dense matrices


def low_rank(w):
    """Random factors of half the weights."""
    n_in, n_out = w.shape[-2:]
    rank = n_in * n_out // (n_in + n_out) // 2
    return LowRank(w[..., :rank], w[..., :rank, :])


def nf4(w):
    codes, scale = codebook.nf4(w.swapaxes(-1, -2))
    return Codebook(codes, jnp.tile(jnp.asarray(codebook.nf4_table()), (len(w), 1)), scale, 4, 64, "nf4")


KINDS = {
    "w8a8": lambda w: rtn.quantize(w, bits=8, act_bits=8),
    "w8a8-static": lambda w: dataclasses.replace(
        rtn.quantize(w, bits=8, act_bits=8), act_scale=jnp.full((*w.shape[:-2], 1, 1), 0.03)
    ),
    "w8a16": lambda w: rtn.quantize(w, bits=8),
    "w4a16-g128": lambda w: rtn.quantize(w, bits=4, group=128, symmetric=False),
    "fp8": lambda w: float8.quantize_float8(w, act_bits=8),
    "nf4": nf4,
    "low-rank": low_rank,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--shapes", nargs="+", default=["256x256", "1024x1024", "2048x2048"], help="INxOUT")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 128, 512])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"jax {jax.__version__}; time dense / time compressed")
    print(f"{'':24}{'kind':12}" + "".join(f"{f'M = {rows}':>9}" for rows in args.rows))
    for shape in args.shapes:
        n_in, n_out = map(int, shape.split("x"))
        layers = int(np.clip(BYTES // (4 * n_in * n_out), 2, 64))
        w = jax.random.normal(jax.random.key(0), (layers, n_in, n_out)) * n_in**-0.5
        leaves = {"dense": w} | {kind: KINDS[kind](w) for kind in args.kinds}
        for how, multiply in (("stack", stack), ("lone", lone)):
            ratios = [measure(multiply, leaves, rows, n_in, args.rounds) for rows in args.rows]
            for kind in args.kinds:
                print(f"{shape:>16} {how:6} {kind:12}" + "".join(f"{each[kind]:9.2f}" for each in ratios), flush=True)


def stack(x_MxI, w):
    """The sum of the products with every layer of a stack."""
    return jax.lax.scan(lambda x, layer: (x, jnp.sum(ops.dot(x, layer))), x_MxI, w)[1]


def lone(x_MxI, ws):
    return [ops.dot(x_MxI, w) for w in ws]


def measure(multiply, leaves: dict, rows: int, n_in: int, rounds: int) -> dict[str, float]:
    """Time dense / time for each kind."""
    x_MxI = jax.random.normal(jax.random.key(1), (rows, n_in))
    calls = {}
    for kind, w in leaves.items():
        if multiply is lone:
            w = [jax.tree.map(lambda part: part[i], w) for i in range(len(jax.tree.leaves(w)[0]))]  # noqa: B023
        compiled = jax.jit(multiply).lower(x_MxI, w).compile()
        calls[kind] = (compiled, w, [])
    for turn in range(rounds + 1):
        for compiled, w, seconds in calls.values():
            begin, repeats = time.process_time(), 0
            while time.process_time() - begin < 0.005:
                jax.block_until_ready(compiled(x_MxI, w))
                repeats += 1
            if turn:  # the first one warms up
                seconds.append((time.process_time() - begin) / repeats)
    medians = {kind: statistics.median(seconds) for kind, (_, _, seconds) in calls.items()}
    return {kind: medians["dense"] / median for kind, median in medians.items()}


if __name__ == "__main__":
    main()
