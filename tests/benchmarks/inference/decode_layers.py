"""What does it cost on a CPU that layers are stacked in one array? Steps of decoding with stacked and single layers.

    python tests/benchmarks/inference/decode_layers.py MODEL [--new-tokens 64] [--rounds 5] [--slots 8]

MODEL is read twice, and the two copies take turns. It prints for each the milliseconds of a step of the engine with one
text and with ``--slots`` texts, and for comparison those in which the weights are read once (a sum over an array of
their size): medians of all rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
from jaxlm.core.tree import count_bytes
from jaxlm.inference import Engine, Request

PROMPT = 40  # tokens


def engine_seconds(engine: Engine, slots: int, new_tokens: int, vocab_size: int) -> float:
    begin = time.perf_counter()
    rng = np.random.default_rng(0)
    for _ in range(slots):
        prompt = tuple(map(int, rng.integers(3, min(vocab_size, 4000), PROMPT)))
        engine.submit(Request(prompt=prompt, max_new_tokens=new_tokens, ignore_eos=True))
    while engine.busy:
        engine.step()
    return time.perf_counter() - begin


def read_seconds(read, weights: jax.Array) -> float:
    begin = time.perf_counter()
    read(weights).block_until_ready()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=8)
    args = parser.parse_args()
    runs, short, step = {}, 2, args.new_tokens
    for name, stacked in (("stacked", True), ("single", False)):
        lm = jaxlm.load(args.model, stacked=stacked)
        for slots in (1, args.slots):
            runs[name, slots] = lm, Engine(lm, slots=slots, context=PROMPT + step + short + 1)
    weights = jnp.ones(count_bytes(lm.params) // 4)
    read = jax.jit(jnp.sum)
    taken: dict = {key: [] for key in [*runs, "read"]}
    for turn in range(args.rounds + 1):
        for (name, slots), (lm, engine) in runs.items():
            pair = [engine_seconds(engine, slots, n, lm.config.vocab_size) for n in (short, short + step)]
            if turn:  # the first round compiles
                taken[name, slots].append((pair[1] - pair[0]) / step * 1e3)
        taken["read"].append(read_seconds(read, weights) * 1e3)
    medians = {key: statistics.median(values) for key, values in taken.items()}
    print(f"{'layers':<10}{'1 text':>12}{f'{args.slots} texts':>12}   ms a step, medians of {args.rounds}")
    for name in ("stacked", "single"):
        print(f"{name:<10}{medians[name, 1]:>12.1f}{medians[name, args.slots]:>12.1f}")
    print(f"weights are read once in {medians['read']:.1f} ms ({weights.nbytes / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()
