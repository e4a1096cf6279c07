"""What does a server's normal client notice of hostile ones?

    python tests/benchmarks/inference/hostile_clients.py [MODEL] [--seconds 8] [--only NAME ...]

The model is by default one of 6 M random parameters with a context of 2,048 tokens; it is served with default options.
The normal client sends a request of 8 tokens every 0.2 seconds, each through a new connection: alone first, and then
beside each attacker in turn. An attacker is one function below; it runs in a process of its own that gives way to
others, and has an address of its own (127.0.0.2, which Linux has). Memory is that of the server's processes together,
before the first attacker, once everything has been used, after each one, and at the end.

A request may take 2 seconds, none may fail, and the memory may be 10% more at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np

MEBIBYTE = 1 << 20
MOST_SECONDS, MOST_MEMORY = 2.0, 1.1
PROMPT = "It was a dark night and the wind sang in the trees. "
COMPLETION = {"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
CHAT = {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "temperature": 1}


def save_model(directory: Path) -> Path:
    """A model of random numbers, with a tokenizer and a chat template."""
    import jax

    from jaxlm import nn
    from jaxlm.data.tokenizers.tokenizer import Tokenizer
    from jaxlm.model import LM

    texts = [string.printable, *Path(__file__).read_text(encoding="utf-8").splitlines(), PROMPT * 9]
    plain = Tokenizer.train(texts, "bpe", 1024)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer = Tokenizer(plain.backend, plain.config | {"chat_template": template})
    config = nn.DecoderConfig(
        vocab_size=tokenizer.vocab_size, width=256, heads=8, kv_heads=4, ffn=704, layers=6, max_positions=2048
    )
    graphdef, params = nn.build(config, jax.random.key(0))
    return LM(config, graphdef, params, tokenizer).save(directory)


class Server:
    """``jaxlm serve`` as a process."""

    def __init__(self, model: str | Path):
        command = [sys.executable, "-m", "jaxlm", "serve", f"m={model}", "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise SystemExit("the server did not start")

    def memory(self) -> float:
        """MiB of its processes."""
        return sum(_resident(pid) for pid in _family(self.process.pid))


def _family(pid: int) -> list[int]:
    children = [int(each) for file in Path(f"/proc/{pid}/task").glob("*/children") for each in file.read_text().split()]
    return [pid, *(each for child in children for each in _family(child))]


def _resident(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE


async def use_normally(url: str, seconds: float) -> dict:
    """The times of one request after the other. A request that fails counts as one that takes for ever."""
    times, failures, begin = [], Counter(), time.monotonic()
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        while (start := time.monotonic()) < begin + seconds:
            body = COMPLETION | {"prompt": f"{len(times)}. {PROMPT}"}
            try:
                answer = await client.post("/v1/completions", json=body)
                outcome = "" if answer.status_code == 200 else str(answer.status_code)
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            took = time.monotonic() - start
            times.append(np.inf if outcome else took)
            failures[outcome] += bool(outcome)
            await asyncio.sleep(max(0.0, 0.2 - took))
    return {
        "requests": len(times), "median": float(np.median(times)), "worst": max(times), "failures": dict(+failures),
    }


class Attack:
    """What an attacker has: the server's address, an address of its own, and some time."""

    def __init__(self, url: str, seconds: float):
        self.url, self.end = url, time.monotonic() + seconds
        self.answers: Counter[str] = Counter()

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.end

    async def post(self, path: str, body: dict | bytes) -> None:
        """Sends one request and notes the answer's status."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        transport = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
        async with httpx.AsyncClient(base_url=self.url, timeout=60, transport=transport) as client:
            try:
                answer = await client.post(path, content=content, headers={"content-type": "application/json"})
                self.answers[str(answer.status_code)] += 1
                if answer.status_code >= 400:
                    await asyncio.sleep(0.01)
            except httpx.HTTPError as error:
                self.answers[type(error).__name__] += 1

    async def keep_posting(self, clients: int, path: str, make: Callable[[int], dict | bytes]) -> None:
        """``clients`` requests at once, of bodies by their number, until the time is over."""
        async def one(number: int) -> None:
            while self.goes_on:
                await self.post(path, make(number))
                number += clients

        await asyncio.gather(*(one(number) for number in range(clients)))

    async def connect(self, sent: bytes, receive_buffer: int = 0) -> socket.socket | None:
        """A connection through which something is sent; None if the server refuses."""
        client = socket.socket()
        client.setblocking(False)
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.bind(("127.0.0.2", 0))
        loop, at = asyncio.get_running_loop(), urlsplit(self.url)
        try:
            await loop.sock_connect(client, (at.hostname, at.port))
            await loop.sock_sendall(client, sent)
        except OSError:
            client.close()
            return None
        return client

    async def hold(self, count: int, sent: bytes, drip: bytes = b"", receive_buffer: int = 0) -> None:
        """``count`` connections that read nothing and send ``drip`` every second. Those that end are opened again."""
        held: list[socket.socket] = []
        while self.goes_on:
            for _ in range(count - len(held)):
                if (client := await self.connect(sent, receive_buffer)) is not None:
                    held.append(client)
            self.answers["connections"] = max(self.answers["connections"], len(held))
            await asyncio.sleep(1)
            alive = []
            for client in held:
                with contextlib.suppress(OSError):
                    client.send(drip)
                    if drip and not client.recv(1, socket.MSG_PEEK):
                        raise ConnectionResetError
                    alive.append(client)
                    continue
                if _is_open(client):
                    alive.append(client)
                else:
                    self.answers["closed"] += 1
                    client.close()
            held = alive
        for client in held:
            client.close()


def _is_open(client: socket.socket) -> bool:
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _fill(begin: str, item: str, end: str) -> bytes:
    """A body of one mebibyte: a list of the same item."""
    return (begin + ",".join([item] * ((MEBIBYTE - len(begin) - len(end)) // (len(item) + 1))) + end).encode()


def _head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def wrong_types(attack: Attack) -> None:
    """Bodies of one mebibyte in which every item is wrong."""
    chats = [
        _fill('{"model":"m","messages":[{"role":"user","content":[', "{}", "]}]}"),
        _fill('{"model":"m","messages":[', "{}", "]}"),
        b"{" + b",".join(b'"k%d":1' % i for i in range(90_000)) + b"}",
    ]
    prompts = [_fill('{"model":"m","prompt":[', item, "]}") for item in ("{}", "[0.5]", "null")]
    await asyncio.gather(
        attack.keep_posting(4, "/v1/chat/completions", lambda i: chats[i % 3]),
        attack.keep_posting(4, "/v1/completions", lambda i: prompts[i % 3]),
    )


async def long_prompts(attack: Attack) -> None:
    """Prompts of one mebibyte, which must be tokenized before they are found to be too long."""
    bodies = [COMPLETION | {"prompt": text * (900_000 // len(text))} for text in (PROMPT, "a\u0301", " ", "qj")]
    await attack.keep_posting(8, "/v1/completions", lambda i: bodies[i % len(bodies)])


async def half_sent_headers(attack: Attack) -> None:
    """Connections that never finish their headers, more than the server has."""
    await attack.hold(1010, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-", drip=b"a")


async def half_sent_bodies(attack: Attack) -> None:
    """Connections that never finish their body."""
    await attack.hold(1010, _head("/v1/completions", 100_000) + b"{", drip=b" ")


async def stalled_readers(attack: Attack) -> None:
    """Streams that nobody reads, with all log-probabilities, and answers of other pages that nobody reads."""
    body = json.dumps(CHAT | {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 1900}).encode()
    await asyncio.gather(
        attack.hold(80, _head("/v1/chat/completions", len(body)) + body, receive_buffer=4096),
        attack.hold(80, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200, receive_buffer=4096),
    )


async def large_schemas(attack: Attack) -> None:
    """Many choices of a large schema, a new one each time."""
    def body(number: int) -> dict:
        names = {f"field_{number}_{i}": {"type": "string", "pattern": "^(a|b){1,99}c$"} for i in range(400)}
        schema = {"type": "object", "properties": names, "required": list(names)}
        described = {"type": "json_schema", "json_schema": {"name": "large", "schema": schema}}
        return CHAT | {"n": 64, "response_format": described, "max_tokens": 64}

    await attack.keep_posting(4, "/v1/chat/completions", body)


async def endless_schemas(attack: Attack) -> None:
    """Schemas that contain themselves, or expand without end."""
    schemas = [
        {"$ref": "#"}, {"type": "string", "pattern": "^((a{1,99}){1,99}){1,99}$"}, {"allOf": [{"$ref": "#"}] * 500},
        {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}},
    ]

    def body(number: int) -> dict:
        schema = schemas[number % len(schemas)] | {"description": str(number)}
        described = {"type": "json_schema", "json_schema": {"name": "endless", "schema": schema}}
        return CHAT | {"response_format": described, "max_tokens": 64}

    await attack.keep_posting(4, "/v1/chat/completions", body)


async def inspections(attack: Attack) -> None:
    """Integrated gradients of the longest texts, at the most points."""
    text = "".join(random.Random(0).choices("bcdfghjklmnpqrstvwxz", k=120))
    body = {"model": "m", "text": text, "method": "integrated_gradients", "steps": 64}
    await attack.keep_posting(4, "/v1/inspect", lambda i: body)


async def echoes(attack: Attack) -> None:
    """As many log-probabilities of long prompts as there may be, and ten times as many."""
    rng = random.Random(0)
    prompts = [[rng.randrange(100, 500) for _ in range(2000)] for _ in range(30)]
    body = {"model": "m", "echo": True, "logprobs": 20, "max_tokens": 0}
    bodies = [json.dumps(body | {"prompt": prompts[:count]}).encode() for count in (3, 30)]
    await attack.keep_posting(8, "/v1/completions", lambda i: bodies[i % 8 == 0])


async def no_max_tokens(attack: Attack) -> None:
    """Chats that go on to the end of the context."""
    await attack.keep_posting(60, "/v1/chat/completions", lambda i: CHAT)


async def many_choices(attack: Attack) -> None:
    """As many choices as there may be, with all log-probabilities."""
    body = CHAT | {"n": 64, "logprobs": True, "top_logprobs": 20, "max_tokens": 96}
    await attack.keep_posting(4, "/v1/chat/completions", lambda i: body)


async def long_errors(attack: Attack) -> None:
    """Mistakes whose error would repeat what is wrong."""
    long = "a" * 900_000
    bodies = [
        COMPLETION | {"model": long}, COMPLETION | {long: 1}, COMPLETION | {"logit_bias": {long: 1}},
        CHAT | {"messages": [{"role": long, "content": ""}]}, CHAT | {"response_format": {"type": long}},
    ]
    encoded = [json.dumps(body).encode() for body in bodies]
    await attack.keep_posting(8, "/v1/chat/completions", lambda i: encoded[i % len(encoded)])


ATTACKERS: tuple[Callable[[Attack], Awaitable[None]], ...] = (
    wrong_types, long_prompts, long_errors, half_sent_headers, half_sent_bodies, stalled_readers, large_schemas,
    endless_schemas, inspections, echoes, no_max_tokens, many_choices,
)


def _attack(name: str, url: str, seconds: float, answers: multiprocessing.Queue) -> None:
    os.nice(19)  # others have machines of their own
    attack = Attack(url, seconds)
    attacker = next(each for each in ATTACKERS if each.__name__ == name)

    async def run() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await attacker(attack)

    asyncio.run(run())
    answers.put(dict(attack.answers))


def under_attack(name: str, server: Server, seconds: float) -> dict:
    """The latencies of the normal client beside one attacker, and the answers that the attacker gets."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_attack, args=(name, server.url, seconds + 1, answers), daemon=True)
    process.start()
    time.sleep(1.5)  # until it has begun
    found = asyncio.run(use_normally(server.url, seconds))
    found["answers"] = answers.get(timeout=120)
    process.join()
    return found


async def use_everything(url: str) -> None:
    """What everybody may ask for, so that all programs are compiled and loaded before memory is looked at."""
    attack = Attack(url, 60)
    for path, body in (
        ("/v1/chat/completions", CHAT | {"max_tokens": 8, "n": 8, "logprobs": True, "top_logprobs": 20}),
        ("/v1/chat/completions", CHAT | {"max_tokens": 8, "response_format": {"type": "json_object"}}),
        ("/v1/completions", COMPLETION | {"prompt": [9] * 2000, "echo": True, "logprobs": 20, "max_tokens": 0}),
        ("/v1/inspect", {"model": "m", "text": "b" * 120, "steps": 64}),
    ):
        await attack.post(path, body)
    if set(attack.answers) != {"200"}:
        raise SystemExit(f"the server does not answer: {attack.answers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="one with a chat template and a context of 2,048 tokens")
    parser.add_argument("--seconds", type=float, default=8, help="beside each attacker")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[each.__name__ for each in ATTACKERS])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        server = Server(options.model or save_model(Path(directory) / "model"))
        try:
            failed = run(server, options)
        finally:
            server.process.send_signal(signal.SIGTERM)
            if server.process.wait(120):
                failed = ["SIGTERM"]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(server: Server, options: argparse.Namespace) -> list[str]:
    """Prints a line for each attacker; the names of those that were felt too much."""
    failed = []
    asyncio.run(use_everything(server.url))
    alone = asyncio.run(use_normally(server.url, options.seconds))
    before = server.memory()
    print(f"{'attacker':<18} median s  worst s  MiB after, of {before:.0f}  answers to the attacker")
    print(f"{'(none)':<18} {alone['median']:8.3f} {alone['worst']:8.3f}", flush=True)
    for name in options.only or [each.__name__ for each in ATTACKERS]:
        found = under_attack(name, server, options.seconds)
        print(
            f"{name:<18} {found['median']:8.3f} {found['worst']:8.3f} {server.memory():10.0f}  {found['answers']} "
            f"{found['failures'] or ''}", flush=True,
        )
        if found["worst"] > MOST_SECONDS:
            failed.append(name)
    time.sleep(8)  # the server gives memory back every five seconds
    after = server.memory()
    print(f"{'(afterwards)':<36}{after:10.0f}")
    if after > MOST_MEMORY * before:
        failed.append(f"memory, {after:.0f} of {before:.0f} MiB")
    return failed


if __name__ == "__main__":
    main()
