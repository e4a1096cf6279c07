"""A thousand requests through an engine that is too small for them: none is lost or mixed up, and memory stays flat.

    python tests/benchmarks/inference/engine_soak.py [--requests 1000] [--draft]

The requests come at random times and have many lengths; some are greedy and some sampled, and a tenth is cancelled on
the way. Pages run out all the time. Afterwards each request is sent again, alone, and must give the same text.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from jaxlm import nn
from jaxlm.inference.engine.engine import Engine
from jaxlm.inference.engine.requests import Request
from jaxlm.model import LM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--draft", action="store_true", help="with a draft, whose weights are nearly the model's")
    args = parser.parse_args()
    config = nn.DecoderConfig(vocab_size=64, width=32, heads=4, kv_heads=2, ffn=48, layers=2, eos_id=7)
    graphdef, params = nn.build(config, jax.random.key(0))
    lm = LM(config, graphdef, jax.tree.map(lambda x: 2 * x, params))
    near = jax.tree.map(lambda x: x + 0.01 * np.sin(np.arange(x.size)).reshape(x.shape), lm.params)
    draft = dataclasses.replace(lm, params=near) if args.draft else None
    options = {"slots": 8, "context": 96, "page_size": 8, "prefill_chunk": 32, "draft": draft, "num_draft_tokens": 3}
    engine = Engine(lm, num_pages=20, **options)
    engine.warm_up()
    rng = np.random.default_rng(0)
    shared = rng.integers(8, 64, 40).tolist()
    requests = [request(rng, shared) for _ in range(args.requests)]
    cancelled = set(rng.choice(args.requests, args.requests // 10, replace=False).tolist())
    begin = time.perf_counter()
    said, finish, memory = crowd(engine, requests, cancelled, rng)
    seconds, stats = time.perf_counter() - begin, engine.stats
    assert sorted(finish) == list(range(args.requests)), "a request was lost"
    alone = Engine(lm, **options)
    mixed = 0
    for i, wanted in enumerate(requests):
        number = alone.submit(wanted)
        tokens: list[int] = []
        while alone.busy:
            for event in alone.step():
                assert event.request_id == number
                tokens += event.tokens
        whole = tokens if finish[i] != "cancelled" else tokens[: len(said[i])]
        mixed += said[i] != whole
    resident, arrays = np.array(memory, float)[len(memory) // 4 :].T  # the first quarter fills things up
    early, late = (np.median(part) for part in np.array_split(resident, 3)[::2])
    print(
        f"{args.requests} requests, {stats.generated_tokens} tokens, {seconds:.0f} s, {stats.preemptions} preemptions; "
        f"{stats.cached_tokens} of {stats.cached_tokens + stats.prefill_tokens} prompt tokens found in the cache, "
        f"{stats.accepted_tokens} of {stats.draft_tokens} draft tokens accepted"
    )
    print(
        f"texts that differ alone: {mixed}; pages in use at the end: {stats.pages_used}; resident {early:.1f} MiB in "
        f"the second quarter, {late:.1f} in the last; arrays on devices {arrays.min():.0f} to {arrays.max():.0f}"
    )
    assert not mixed and not stats.pages_used and late < 1.02 * early and arrays.max() < arrays.min() + 16


def request(rng: np.random.Generator, shared: list[int]) -> Request:
    """One of any kind; a third of them begin alike."""
    head = shared[: rng.integers(8, 40)] if rng.random() < 1 / 3 else []
    prompt = (*head, *rng.integers(8, 64, rng.integers(1, 24)).tolist())
    sampled = {"temperature": 1.0, "top_p": 0.9} if rng.random() < 0.5 else {"temperature": 0.0}
    return Request(prompt, int(rng.integers(1, 32)), seed=int(rng.integers(1 << 30)), **sampled)


def crowd(engine: Engine, requests: list[Request], cancelled: set[int], rng: np.random.Generator):
    """All requests, about twenty of them there at a time: what each said, how it ended, and at every tenth step the MiB
    in memory and the arrays on devices."""
    number: dict[int, int] = {}
    said: dict[int, list[int]] = {}
    finish: dict[int, str] = {}
    memory: list[tuple[float, int]] = []
    step, submitted = 0, 0
    while engine.busy or submitted < len(requests):
        while submitted < len(requests) and len(number) < 20 and rng.random() < 0.7:
            number[engine.submit(requests[submitted])] = submitted
            said[submitted] = []
            submitted += 1
        for key in [key for key, i in number.items() if i in cancelled and rng.random() < 0.05]:
            engine.cancel(key)
        for event in engine.step():
            i = number[event.request_id]
            assert i not in finish, "an event of a finished request"
            said[i] += event.tokens
            if event.finish_reason:
                finish[i] = event.finish_reason
                del number[event.request_id]
        if step % 10 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory.append((pages * 4096 / 2**20, len(jax.live_arrays())))
        step += 1
    return said, finish, memory


if __name__ == "__main__":
    main()
