"""Compiles the constraints of requests beside the model's thread, and only those that cost little.

A new constraint is first tried in a process that is limited in time and memory (``grammar_trial``), then compiled in a
thread. One is compiled at a time, and few may wait. Whoever disconnects gives up the place in this queue.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.core.processes import module_command, module_environment
from jaxlm.inference.engine.constraints import LIMITS, MAX_FORCED, Constraint, Grammar, GrammarCompiler, refusal
from jaxlm.serving.protocol.errors import grammars_busy, invalid_field

__all__ = ["MAX_BYTES", "GrammarQueue", "give_way"]

MAX_BYTES = 1 << 17  # of a constraint
_SECONDS = 2  # of computation that a new constraint may take
_MEMORY = 256 << 20  # bytes that it may take
_MAX_WAITING = 8  # constraints that may wait or be compiled
_PATIENCE = 60.0  # seconds without an answer after which the process is ended


class GrammarQueue:
    """Compiles the constraints of one model, one after the other."""

    def __init__(self, name: str, compiler: Callable[[], GrammarCompiler]):
        """``compiler`` gives the compiler of the model's engine of now."""
        self._compiler = compiler
        self._trials = _Trials()
        self._thread = ThreadPoolExecutor(1, f"jaxlm-grammars-{name}", give_way)
        self._waiting = 0

    async def compile(self, constraint: Constraint) -> Grammar:
        """The grammar of a constraint; at once if it is one of those used last.

        Raises:
            ApiError: with status 400 when the constraint is over the limits or cannot be used, 429 when too many wait.
        """
        try:
            return await self._compiled(self._compiler(), constraint)
        except UserError as error:
            raise invalid_field("response_format", str(error)) from None

    async def _compiled(self, compiler: GrammarCompiler, constraint: Constraint) -> Grammar:
        source = await asyncio.to_thread(_source, compiler, constraint)
        if (grammar := compiler.kept(source)) is not None:
            return grammar
        if self._waiting >= _MAX_WAITING:
            raise grammars_busy(_SECONDS)
        self._waiting += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(self._compile, compiler, source))
        finally:
            self._waiting -= 1

    def _compile(self, compiler: GrammarCompiler, source: str) -> Grammar:
        if (grammar := compiler.kept(source)) is None:
            self._trials.check(compiler, source)
            grammar = compiler.compile(source)
        return grammar

    def close(self) -> None:
        """Ends the thread and the process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._trials.close()


def give_way() -> None:
    """Lets the model's thread go first, where threads have priorities."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _source(compiler: GrammarCompiler, constraint: Constraint) -> str:
    source = compiler.source(constraint)
    if len(source) > MAX_BYTES:
        raise UserError(f"the constraint has {len(source):,} bytes, and at most {MAX_BYTES:,} are allowed: shorten it")
    return source


class _Trials:
    """The process that tries grammars. It is started at the first one, and anew when it has ended."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def check(self, compiler: GrammarCompiler, source: str) -> None:
        """Raises:
            UserError: when the grammar is over the limits, or llguidance refuses it.
        """
        if not hasattr(os, "fork"):  # on Windows llguidance's own limits must do
            return
        asked = {"grammar": source, "limits": LIMITS, "seconds": _SECONDS, "bytes": _MEMORY}
        answer = self._ask(compiler, asked)
        match answer:
            case {"error": ""}:
                return
            case {"error": error}:
                raise UserError(refusal(error))
            case {"limit": "memory"}:
                raise UserError(f"the constraint takes more than {_MEMORY >> 20} MiB to compile: simplify it")
        raise UserError(f"the constraint takes more than {_SECONDS} s to compile: simplify it")

    def _ask(self, compiler: GrammarCompiler, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message; empty if none came in time."""
        if self._process is None:
            vocabulary = compiler.vocabulary
            self._process = _start()
            ready = self._exchange({
                "tokens": [token.decode("latin-1") for token in vocabulary.tokens], "forced": MAX_FORCED,
                "special": vocabulary.special_token_ids, "bos": vocabulary.bos_token_id,
                "eos": vocabulary.eos_token_ids,
            })
            if not ready:
                raise RuntimeError("the process that tries grammars does not start")
        return self._exchange(message)

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        timer = threading.Timer(_PATIENCE, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            self.close()
        return json.loads(answer) if answer else {}

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def _start() -> subprocess.Popen:
    return subprocess.Popen(
        module_command("jaxlm.serving.grammar_trial"), env=module_environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
    )
