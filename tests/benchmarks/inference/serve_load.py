"""Sends a server four times the load that it can serve; then kills it and starts it again.

    python tests/benchmarks/inference/serve_load.py MODEL [--seconds 300] [--slots 4] [--queue 8] [--tokens 192]

First it measures the capacity: tokens a second with as many clients as the server has places. Then clients begin
requests at four times that rate, whether others are answered or not (an open loop), each with its own prompt. It prints
goodput (tokens of complete answers a second, beside the capacity), the share of answers with status 429, the times of
the accepted requests, and the server's memory before and after. No request may fail otherwise, and the 99th percentile
must be below twice the time that all places take at capacity. Then it kills the server in the middle of its work and
starts it again; the server must answer as before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np


class Server:
    """``jaxlm serve`` as a process."""

    def __init__(self, options: argparse.Namespace):
        command = [
            sys.executable, "-m", "jaxlm", "serve", f"m={options.model}", "--port", "0", "--slots", str(options.slots),
            "--queue", str(options.queue), "--client-places", str(options.slots + options.queue),
        ]
        begin = time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise SystemExit("the server did not start")
        self.seconds = time.monotonic() - begin

    def memory(self) -> float:
        """MiB that it holds."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(120)


def body(number: int, tokens: int) -> dict:
    return {
        "model": "m", "prompt": f"Story {number}. It was a dark night and", "max_tokens": tokens, "temperature": 1.0,
        "seed": number, "ignore_eos": True,
    }


async def ask(client: httpx.AsyncClient, number: int, tokens: int) -> tuple[str, float, int]:
    """What came of a request (a status, or the name of an error), its seconds, and tokens."""
    begin = time.monotonic()
    try:
        answer = await client.post("/v1/completions", json=body(number, tokens))
    except httpx.HTTPError as error:
        return type(error).__name__, time.monotonic() - begin, 0
    written = answer.json()["usage"]["completion_tokens"] if answer.status_code == 200 else 0
    if answer.status_code == 429 and int(answer.headers["retry-after"]) < 1:
        return "429 without Retry-After", 0.0, 0
    return str(answer.status_code), time.monotonic() - begin, written


async def capacity(client: httpx.AsyncClient, options: argparse.Namespace, seconds: float) -> float:
    """Tokens a second where every place is taken always."""
    places = options.slots + options.queue
    await asyncio.gather(*(ask(client, i, options.tokens) for i in range(places)))  # whatever comes first is slower
    begin, written = time.monotonic(), 0

    async def keep_asking(i: int) -> None:
        nonlocal written
        while time.monotonic() - begin < seconds:
            _, _, tokens = await ask(client, i, options.tokens)
            written += tokens

    await asyncio.gather(*(keep_asking(1000 + i) for i in range(places)))
    return written / (time.monotonic() - begin)


async def overload(client: httpx.AsyncClient, options: argparse.Namespace, rate: float) -> list[tuple[str, float, int]]:
    """``rate`` requests a second."""
    tasks, begin = [], time.monotonic()
    while (now := time.monotonic() - begin) < options.seconds:
        while len(tasks) < rate * now:
            tasks.append(asyncio.create_task(ask(client, 10_000 + len(tasks), options.tokens)))
        await asyncio.sleep(0.005)
    return await asyncio.gather(*tasks)


async def load(url: str, options: argparse.Namespace) -> dict:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        full = await capacity(client, options, max(5.0, options.seconds / 20))
        rate = 4 * full / options.tokens
        begin = time.monotonic()
        found = await overload(client, options, rate)
        seconds = time.monotonic() - begin
    counts = Counter(status for status, _, _ in found)
    times = np.array([each for status, each, _ in found if status == "200"])
    bound = 2 * (options.slots + options.queue) * options.tokens / full
    return {
        "capacity_tokens_per_second": full, "offered_requests_per_second": rate, "requests": len(found),
        "answers": dict(counts), "share_of_429": counts["429"] / len(found),
        "goodput_tokens_per_second": sum(tokens for _, _, tokens in found) / seconds,
        "p50_seconds": float(np.percentile(times, 50)), "p99_seconds": float(np.percentile(times, 99)),
        "bound_of_p99_seconds": bound, "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--queue", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192, help="of an answer")
    options = parser.parse_args()
    server = Server(options)
    before = server.memory()
    figures = asyncio.run(load(server.url, options))
    figures |= {"start_seconds": server.seconds, "memory_before_mib": before, "memory_after_mib": server.memory()}

    fixed = body(1, options.tokens)
    said = httpx.post(f"{server.url}/v1/completions", json=fixed, timeout=600).json()["choices"][0]["text"]
    with httpx.stream("POST", f"{server.url}/v1/completions", json=fixed | {"stream": True}, timeout=600) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.end(signal.SIGKILL)
    again = Server(options)
    figures["restart_seconds"] = again.seconds
    figures["same_after_restart"] = said == httpx.post(
        f"{again.url}/v1/completions", json=fixed, timeout=600
    ).json()["choices"][0]["text"]
    figures["exit_status_of_sigterm"] = again.end(signal.SIGTERM)
    print(json.dumps(figures, indent=2))
    failed = [status for status in figures["answers"] if status not in ("200", "429")]
    if failed or figures["p99_seconds"] > figures["bound_of_p99_seconds"] or not figures["same_after_restart"]:
        raise SystemExit(f"failed: {failed or 'p99, or other words after the restart'}")


if __name__ == "__main__":
    main()
