"""Runs requests through an engine and collects their events."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from jaxlm.inference.engine.engine import Engine
from jaxlm.inference.engine.requests import Request


@dataclass
class Answer:
    """The events of one continuation, put together."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list = field(default_factory=list)
    finish: str | None = None
    pieces: list[str] = field(default_factory=list)


def serve(
    engine: Engine, requests: Iterable[Request] = (), *, each_step: Callable[[int], None] = lambda step: None,
    answers: dict[tuple[int, int], Answer] | None = None,
) -> dict[tuple[int, int], Answer]:
    """Runs an engine until it is idle. ``each_step(step)`` may submit and cancel; answers are by request and index."""
    answers = {} if answers is None else answers
    for request in requests:
        engine.submit(request)
    step = 0
    while True:
        each_step(step)
        if not engine.busy:
            return answers
        for event in engine.step():
            answer = answers.setdefault((event.request_id, event.index), Answer())
            assert answer.finish is None, "an event of a finished continuation"
            answer.tokens += event.tokens
            answer.text += event.text
            answer.logprobs += event.logprobs
            answer.finish = event.finish_reason
            answer.pieces.append(event.text)
        step += 1
        assert step < 10_000, "it never ends"
