"""The thread of a model: everything that computes with it happens there, and answers come back by asyncio.

A worker is one thread, because one device does one thing at a time: an engine's steps for all requests together, and
between two of them at most one job of another kind, so that neither waits long for the other.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from jaxlm.core.errors import UserError
from jaxlm.inference.engine.engine import Engine
from jaxlm.inference.engine.requests import Event, Request
from jaxlm.serving.protocol.errors import ApiError, busy, internal

__all__ = ["EngineWorker", "Stream", "Worker"]

T = TypeVar("T")
_log = logging.getLogger("jaxlm.serving")


class Worker:
    """Runs jobs one after the other. ``places`` is how many requests may be here at once, running and waiting."""

    def __init__(self, name: str, places: int):
        self.name, self.places, self.taken = name, places, 0
        self.seconds = 1.0  # that requests have taken lately
        self._orders: deque[Callable[[], None]] = deque()  # quick ones, all done before the next step
        self._jobs: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._live, name=f"jaxlm-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> None:
        """ApiError 429 if there is no place at all: before any work is spent on a request."""
        if self.taken >= self.places:
            raise busy(self.wait())

    def enter(self, count: int) -> None:
        """Takes places. ApiError 429 if there are not as many now, 400 if there never are."""
        if count > self.places:
            raise ApiError(400, f"this asks for {count} answers at once, and {self.places} is the most; ask for less")
        with self._news:
            if self.taken + count > self.places:
                raise busy(self.wait())
            self.taken += count

    def leave(self, count: int, seconds: float) -> None:
        with self._news:
            self.taken -= count
            self.seconds += 0.1 * (seconds - self.seconds)

    def wait(self) -> int:
        """Seconds after which it is worth trying again."""
        return min(max(1, round(self.seconds)), 60)

    async def run(self, job: Callable[[], T]) -> T:
        """What ``job`` returns, called in the thread. It takes a place; cancelled before its turn, it is not done."""
        self.enter(1)
        begin, future = time.monotonic(), Future()
        try:
            with self._news:
                self._jobs.append((future, job))
                self._news.notify()
            return await asyncio.wrap_future(future)
        finally:
            self.leave(1, time.monotonic() - begin)

    def _order(self, call: Callable[[], None]) -> None:
        with self._news:
            self._orders.append(call)
            self._news.notify()

    def _live(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closed or self._orders or self._jobs or self._busy)
                if self._closed:
                    return
                orders, self._orders = self._orders, deque()
            for call in orders:
                answer(Future(), call)
            self._work()
            self._step()

    def _work(self) -> None:
        """The next job."""
        with self._news:
            if not self._jobs:
                return
            future, job = self._jobs.popleft()
        answer(future, job)

    @property
    def _busy(self) -> bool:
        return False

    def _step(self) -> None:
        """What is done between jobs."""


def answer(future: Future, job: Callable[[], Any]) -> None:
    """Does a job, unless nobody waits for it any more."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except (UserError, ApiError) as error:
        future.set_exception(error)
    except Exception:
        _log.exception("a job failed")
        future.set_exception(internal())


class EngineWorker(Worker):
    """Steps an engine. ``make`` makes it, and makes it anew where it has failed."""

    def __init__(self, name: str, make: Callable[[], Engine], places: int):
        super().__init__(name, places)
        self._make, self.engine = make, make()
        self._streams: dict[int, tuple[Stream, int]] = {}  # the stream of a request's number, and its place there

    def open(self, requests: Sequence[Request]) -> Stream:
        """Takes places for requests; ``Stream.start`` submits them."""
        count = sum(request.samples for request in requests)
        self.enter(count)
        return Stream(self, requests, count)

    @property
    def _busy(self) -> bool:
        return self.engine.busy

    def _step(self) -> None:
        if not self.engine.busy:
            return
        try:
            events = self.engine.step()
        except Exception:
            _log.exception("the engine of %s failed and is made anew", self.name)
            streams = [stream for stream, _ in self._streams.values()]
            self._streams.clear()
            self.engine = self._make()
            for stream in streams:
                stream.tell([(0, Event(0, 0, finish_reason="error", message="the engine failed"))])
            return
        news: dict[Stream, list[tuple[int, Event]]] = {}
        for event in events:
            if event.request_id in self._streams:
                stream, place = self._streams[event.request_id]
                news.setdefault(stream, []).append((place, event))
        for stream, items in news.items():
            stream.tell(items)


class Stream:
    """The events of some requests, each with the place of its request: ``async for place, event in stream``.

    It ends when all continuations have. To close it before cancels what still runs.
    """

    def __init__(self, worker: EngineWorker, requests: Sequence[Request], count: int):
        self._worker, self._requests, self._count = worker, requests, count
        self._open = sum(request.n for request in requests)  # continuations that are to end
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[tuple[int, Event]]] = asyncio.Queue()
        self._begin, self._closed = time.monotonic(), False

    async def start(self) -> Stream:
        """Submits the requests. UserError where one cannot be served, and then none is."""
        submitted: Future = Future()
        self._worker._order(lambda: answer(submitted, self._submit))
        try:
            await asyncio.wrap_future(submitted)
        except BaseException:
            self.close()
            raise
        return self

    def _submit(self) -> None:
        for place, request in enumerate(self._requests):
            self._worker._streams[self._worker.engine.submit(request)] = self, place

    def close(self) -> None:
        """Leaves; may be called again."""
        if not self._closed:
            self._closed = True
            self._worker._order(self._cancel)
            self._worker.leave(self._count, time.monotonic() - self._begin)

    def _cancel(self) -> None:
        for number in [number for number, (stream, _) in self._worker._streams.items() if stream is self]:
            self._worker.engine.cancel(number)
            del self._worker._streams[number]

    def tell(self, items: list[tuple[int, Event]]) -> None:
        """Called by the worker."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, items)
        except RuntimeError:  # its loop has ended, and so has whoever listened
            self._cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self._open:
            for place, event in await self._events.get():
                if event.finish_reason == "error":
                    raise ApiError(500, event.message or "generation failed", kind="server_error")
                self._open -= event.finish_reason is not None
                yield place, event
