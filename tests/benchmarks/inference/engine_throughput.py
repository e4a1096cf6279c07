"""Throughput and latency of the engine, transformers and llama.cpp under the same stream of requests, in turn.

    python tests/benchmarks/inference/engine_throughput.py MODEL|124m [--requests 64] [--rate 4] [--rounds 3] \\
        [--json FILE]

MODEL is a model directory; "124m" is a random Llama of that size. The same requests, greedy and to their full length,
arrive by the same Poisson process at each server; with ``--rate 0`` all arrive at once. transformers takes the next
batch of the requests that have arrived when it has finished the one before (left-padded to the longest). llama.cpp
serves the GGUF file that jaxlm exports (f16), with as many sequences at once as the engine has slots, and continuous
batching by the low-level API of llama_cpp. Each run is a process of its own and warms up first. A server whose package
is missing is left out.

The time to the first token counts from the arrival of a request. The time between tokens is what a reader would see: a
batch whose texts are all reported when it is finished has all of its time in the first token.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Job:
    """A request: when it arrives, what it is, and how many tokens it wants."""

    arrival: float
    prompt: tuple[int, ...]
    count: int


def jobs(args, vocabulary: int) -> list[Job]:
    rng = np.random.default_rng(args.seed)
    gaps = rng.exponential(1 / args.rate, args.requests) if args.rate else np.zeros(args.requests)
    arrivals = np.cumsum(gaps) - gaps[0]
    lengths = np.clip(rng.lognormal(np.log(args.prompt), 0.6, args.requests).astype(int), 4, 4 * args.prompt)
    counts = np.clip(rng.lognormal(np.log(args.tokens), 0.4, args.requests).astype(int), 2, 3 * args.tokens)
    return [
        Job(float(at), tuple(rng.integers(3, vocabulary, length).tolist()), int(count))
        for at, length, count in zip(arrivals, lengths, counts, strict=True)
    ]


class Clock:
    """The times at which the tokens of each request came, from the arrival of the first request on."""

    def __init__(self, todo: list[Job]):
        self.todo, self.times = todo, [[] for _ in todo]
        self.begin = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.begin

    def record(self, i: int, count: int = 1) -> None:
        self.times[i] += [self.now()] * count

    def arrived(self, seen: int) -> int:
        """How many requests have arrived; ``seen`` were known."""
        while seen < len(self.todo) and self.todo[seen].arrival <= self.now():
            seen += 1
        return seen

    def wait(self, seen: int) -> None:
        time.sleep(max(0.0, self.todo[seen].arrival - self.now()))

    def figures(self) -> dict[str, float]:
        assert all(len(times) == job.count for times, job in zip(self.times, self.todo, strict=True))
        first = [times[0] - job.arrival for times, job in zip(self.times, self.todo, strict=True)]
        between = np.concatenate([np.diff(times) for times in self.times])
        total = sum(job.count for job in self.todo)
        return {
            "tokens_per_second": total / max(times[-1] for times in self.times),
            "first_token_p50": float(np.median(first)), "first_token_p99": float(np.quantile(first, 0.99)),
            "between_tokens_p50": float(np.median(between)), "between_tokens_p99": float(np.quantile(between, 0.99)),
        }


def run_jaxlm(args, path: Path) -> Callable[[list[Job]], Clock]:
    import jaxlm
    from jaxlm.inference.engine.requests import Request

    lm = jaxlm.load(path)
    draft = jaxlm.compress(lm, args.draft) if args.draft else None
    engine = lm.engine(slots=args.slots, context=context(args), kv_cache=args.kv_cache, draft=draft)
    engine.warm_up()

    def serve(todo: list[Job]) -> Clock:
        clock, seen, number = Clock(todo), 0, {}
        while seen < len(todo) or engine.busy:
            there = clock.arrived(seen)
            for i in range(seen, there):
                asked = Request(todo[i].prompt, todo[i].count, temperature=0.0, ignore_eos=True)
                number[engine.submit(asked)] = i
            seen = there
            if not engine.busy:
                clock.wait(seen)
            for event in engine.step():
                clock.record(number[event.request_id], len(event.tokens))
        return clock

    return serve


def run_transformers(args, path: Path) -> Callable[[list[Job]], Clock]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def serve(todo: list[Job]) -> Clock:
        clock, seen, done = Clock(todo), 0, 0
        while done < len(todo):
            seen = clock.arrived(seen)
            if done == seen:
                clock.wait(seen)
                continue
            batch = range(done, min(seen, done + args.slots))
            longest = max(len(todo[i].prompt) for i in batch)
            ids, mask = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(2))
            for row, i in enumerate(batch):
                length = len(todo[i].prompt)
                ids[row, longest - length :], mask[row, longest - length :] = torch.tensor(todo[i].prompt), 1
            count = max(todo[i].count for i in batch)
            with torch.inference_mode():
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                    pad_token_id=0,
                )
            for i in batch:
                clock.record(i, todo[i].count)
            done = batch.stop
        return clock

    return serve


def run_llama_cpp(args, path: Path) -> Callable[[list[Job]], Clock]:
    """Its server's own way: one batch a step with a token of every sequence and parts of new prompts."""
    import llama_cpp as c

    import jaxlm

    silent = c.llama_log_callback(lambda *_: None)
    c.llama_log_set(silent, None)
    with tempfile.TemporaryDirectory() as scratch:
        file = jaxlm.load(path).export(Path(scratch) / "model.gguf", format="gguf-f16")
        c.llama_backend_init()
        model = c.llama_model_load_from_file(str(file).encode(), c.llama_model_default_params())
    settings = c.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = args.slots * context(args), args.slots
    settings.n_batch = settings.n_ubatch = 256
    settings.n_threads = settings.n_threads_batch = args.threads
    context_ = c.llama_init_from_model(model, settings)
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    memory = c.llama_get_memory(context_)
    batch = c.llama_batch_init(256, 0, 1)

    def add(token: int, position: int, slot: int, wanted: bool) -> None:
        n = batch.n_tokens
        batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, position, 1, wanted
        batch.seq_id[n][0] = slot
        batch.n_tokens += 1

    def serve(todo: list[Job]) -> Clock:
        clock, seen, started, free = Clock(todo), 0, 0, list(range(args.slots))
        running: dict[int, list] = {}  # slot: [request, tokens, number of tokens read]
        while started < len(todo) or running:
            seen = clock.arrived(seen)
            while free and started < seen:
                running[free.pop()] = [started, list(todo[started].prompt), 0]
                started += 1
            if not running:
                clock.wait(started)
                continue
            batch.n_tokens, wanted = 0, {}
            for slot, state in sorted(running.items(), key=lambda item: len(item[1][1]) - item[1][2]):
                _, tokens, read = state
                part = tokens[read : read + 256 - batch.n_tokens]
                for offset, token in enumerate(part):
                    last = read + offset + 1 == len(tokens)
                    if last:
                        wanted[slot] = batch.n_tokens
                    add(token, read + offset, slot, last)
                state[2] += len(part)
            assert c.llama_decode(context_, batch) == 0
            for slot, place in wanted.items():
                i, tokens, _ = running[slot]
                logits = np.ctypeslib.as_array(c.llama_get_logits_ith(context_, place), (vocabulary,))
                tokens.append(int(logits.argmax()))
                clock.record(i)
                if len(clock.times[i]) == todo[i].count:
                    del running[slot]
                    c.llama_memory_seq_rm(memory, slot, -1, -1)
                    free.append(slot)
        return clock

    return serve


SERVERS = {"jaxlm": run_jaxlm, "transformers": run_transformers, "llama_cpp": run_llama_cpp}


def context(args) -> int:
    return min(7 * max(args.prompt, args.tokens), args.context)


def random_model(directory: Path) -> Path:
    import jax

    from jaxlm import nn
    from jaxlm.data.tokenizers.tokenizer import Tokenizer
    from jaxlm.hf.directory import write_model

    config = nn.DecoderConfig(
        width=768, heads=12, ffn=2048, layers=12, vocab_size=50257, max_positions=2048, tie_embeddings=True,
    )
    tokenizer = Tokenizer.train(["a few words, which nobody reads"])
    return write_model(directory, config, nn.build(config, jax.random.key(0))[1], tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--prompt", type=int, default=64, help="tokens, the median")
    parser.add_argument("--tokens", type=int, default=48, help="new ones, the median")
    parser.add_argument("--context", type=int, default=448)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--kv-cache")
    parser.add_argument("--draft", help="a recipe: jaxlm's model, compressed by it, is the draft")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--server", choices=SERVERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.server:
        path = Path(args.model)
        vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
        serve = SERVERS[args.server](args, path)
        todo = jobs(args, vocabulary)
        serve([dataclasses.replace(job, arrival=0.0) for job in todo[: args.slots]])
        print(json.dumps(serve(todo).figures()))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if args.model == "124m":
            args.model = str(random_model(Path(scratch) / "model"))
        rows: dict[str, list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            for name in SERVERS:
                if name == "jaxlm" or importlib.util.find_spec(name):
                    rows.setdefault(name, []).append(measure(name, args))
    for name, figures in rows.items():
        median = {key: float(np.median([each[key] for each in figures])) for key in figures[0]}
        print(f"{name:12}  {median.pop('tokens_per_second'):8.1f} tokens/s  " + "  ".join(
            f"{key.replace('_', ' ')} {1e3 * value:.0f} ms" for key, value in median.items()
        ))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(name: str, args) -> dict[str, float]:
    """The figures of one server, in a process of its own."""
    options = [
        f"--{key.replace('_', '-')}={value}" for key, value in vars(args).items()
        if key not in ("model", "json", "server") and value is not None
    ]
    command = [sys.executable, __file__, args.model, *options, f"--server={name}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
