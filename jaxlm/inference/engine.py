"""Many requests at once through one model."""

from __future__ import annotations

from collections import deque

from jaxlm.core.errors import UserError
from jaxlm.inference.generate import generate_tokens
from jaxlm.inference.requests import Event, Request, Stats

__all__ = ["Engine"]


class Engine:
    """Serves requests one after the other."""

    def __init__(self, lm, *, slots: int = 8, context: int = 0):
        self.lm = lm
        self.context = context or lm.config.max_positions
        self._waiting: deque[tuple[int, int, Request]] = deque()
        self._running: tuple[int, int, Request, list[int], str] | None = None
        self._cancelled: list[Event] = []
        self._next = 0
        self._stats = Stats(pages=slots)

    def submit(self, request: Request) -> int:
        """Queues a request and gives its number. UserError for what cannot be served."""
        request.check(self.lm.config.vocab_size)
        if len(request.prompt) + request.max_new_tokens > self.context:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens and may be followed by {request.max_new_tokens}: "
                f"together at most {self.context}"
            )
        self._next += 1
        self._waiting.extend((self._next, index, request) for index in range(request.n))
        return self._next

    def cancel(self, number: int) -> None:
        """Ends a request: its continuations that are not finished get a last event. An unknown one is no error."""
        self._cancelled += [Event(i, index, finish="cancelled") for i, index, _ in self._waiting if i == number]
        self._waiting = deque(item for item in self._waiting if item[0] != number)
        if self._running and self._running[0] == number:
            self._cancelled.append(Event(number, self._running[1], finish="cancelled"))
            self._running = None

    def step(self) -> list[Event]:
        """One step of work, and what came of it."""
        events, self._cancelled = self._cancelled, []
        if self._running is None and self._waiting:
            number, index, request = self._waiting.popleft()
            tokens = generate_tokens(
                self.lm, [request.prompt], max_new_tokens=request.max_new_tokens, temperature=request.temperature,
                seed=request.seed or 0,
            )[0]
            self._running = number, index, request, tokens, ""
        if self._running is not None:
            number, index, request, tokens, _ = self._running
            first, rest = tokens[:1], tokens[1:]
            text = "" if self.lm.tokenizer is None else self.lm.tokenizer.decode(first)
            finish = None if rest else "length" if len(tokens) == request.max_new_tokens else "stop"
            self._running = (number, index, request, rest, "") if rest else None
            events.append(Event(number, index, tuple(first), text, finish=finish))
        return events

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do or to tell."""
        return bool(self._waiting or self._running or self._cancelled)

    @property
    def stats(self) -> Stats:
        """What it does and has done."""
        self._stats.running, self._stats.waiting = int(self._running is not None), len(self._waiting)
        return self._stats

    def warm_up(self) -> None:
        """Compiles everything; afterwards nothing compiles."""
