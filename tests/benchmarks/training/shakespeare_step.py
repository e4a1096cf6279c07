"""A training step of configs/shakespeare.py against nanoGPT's, on this machine, in turn.

    python tests/benchmarks/training/shakespeare_step.py --nanogpt DIR

DIR is a checkout of nanoGPT; torch is needed. Both train 4 layers of width 128 on 12 windows of 64 characters with
AdamW and gradient clipping, without the time to make batches. Rounds alternate, so that the ratio holds while the
machine's speed drifts. Both use the memory allocator as ``jaxlm.train`` sets it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from jaxlm.core.host_memory import keep_freed_memory

ROWS, LENGTH, VOCAB = 12, 64, 65


def jaxlm_step(tokens: np.ndarray) -> Callable[[int], None]:
    import jax

    from jaxlm import nn
    from jaxlm.training.config import OptimConfig
    from jaxlm.training.objectives.loss import make_loss
    from jaxlm.training.optimizers.optimizer import make_optimizer
    from jaxlm.training.state import init_state
    from jaxlm.training.step import make_step

    config = nn.preset("nano", vocab_size=VOCAB)
    graphdef, like = nn.abstract(config)
    tx = make_optimizer(OptimConfig(b2=0.99), 2000)
    state = init_state(lambda: nn.initializer(config)[1](jax.random.key(0)), tx, 0)
    step = make_step(graphdef, like, make_loss(config), tx)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((ROWS, LENGTH), np.float32)}

    def run(steps: int):  # as the training loop: nothing waits for a step but the last one
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    return run


def nanogpt_step(tokens: np.ndarray, checkout: str) -> Callable[[int], None]:
    sys.path.insert(0, checkout)
    import torch
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(
        block_size=LENGTH, vocab_size=VOCAB, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False
    ))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    ids = torch.from_numpy(tokens.astype(np.int64))

    def run(steps: int):
        for _ in range(steps):
            _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="a round")
    args = parser.parse_args()
    keep_freed_memory()
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    runs = {"jaxlm": jaxlm_step(tokens), "nanoGPT": nanogpt_step(tokens, args.nanogpt)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run(args.steps)
            if turn:  # the first round compiles
                times[name].append((time.perf_counter() - begin) / args.steps * 1e3)
    for name, each in times.items():
        print(f"{name:8} median {statistics.median(each):6.1f} ms a step, best {min(each):6.1f}")
    ratios = [ours / theirs for ours, theirs in zip(*times.values(), strict=True)]
    print(f"jaxlm / nanoGPT: median of {len(ratios)} rounds {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
