"""A process that tries grammars before the server compiles them. It ends when its input does.

llguidance has limits of its own, but there are constraints of a few kilobytes that it compiles for hours. A function of
a library cannot be stopped and a process can: each grammar is tried in a fork that may use little time and memory.

The first line of the input is the vocabulary, every further one a grammar to try; each is answered by a line, all in
JSON. This module imports nothing of jaxlm, so that the process is small.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

__all__: list[str] = []


class _Tokenizer:
    """What llguidance needs of a tokenizer. Forced texts become one token a byte, which is slower than the model's own
    tokenizer is."""

    def __init__(self, said: dict[str, Any]):
        self.tokens = [text.encode("latin-1") for text in said["tokens"]]
        self.special_token_ids, self.bos_token_id = said["special"], said["bos"]
        self.eos_token_id = said["eos"][0]
        self._of_bytes = {token: i for i, token in enumerate(self.tokens)}
        self._unknown = self.eos_token_id
        self._most = said["forced"]

    def __call__(self, text: str) -> list[int]:
        data = text[: self._most].encode()
        return [self._of_bytes.get(data[i : i + 1], self._unknown) for i in range(len(data))]


def _attempt(library: Any, bitmasks: Any, tokens: Any, said: dict[str, Any]) -> str:
    """Compiles a grammar as ``GrammarCompiler.compile`` does. Returns what is wrong with it, or ""."""
    matcher = library.LLMatcher(tokens, said["grammar"], log_level=0, limits=library.LLParserLimits(**said["limits"]))
    if not matcher.get_error():
        bitmasks.fill_next_token_bitmask(matcher, bitmasks.allocate_token_bitmask(1, tokens.vocab_size))
    return matcher.get_error()


def _limit(said: dict[str, Any]) -> None:
    """Limits this process to seconds of computation and to bytes more than it has."""
    seconds = said["seconds"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + said["bytes"],) * 2)
    except (OSError, ValueError):  # a system without /proc: the time limits the memory too
        pass


def _try(library: Any, bitmasks: Any, tokens: Any, said: dict[str, Any]) -> dict[str, str]:
    """The result of a fork: {"error": text}, or {"limit": "time" or "memory"}."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiving)
            _limit(said)
            with os.fdopen(sending, "wb") as file:
                file.write(json.dumps({"error": _attempt(library, bitmasks, tokens, said)[:1000]}).encode())
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return json.loads(answer)
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    return {"limit": "time" if late else "memory"}


def main() -> None:
    import llguidance
    import llguidance.numpy

    os.nice(10)  # requests whose constraints are known go first
    said = json.loads(sys.stdin.readline())
    tokens = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokenizer(said)), eos_token=said["eos"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_try(llguidance, llguidance.numpy, tokens, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
