"""The thread of a model: all computation with it happens there, and results come back through asyncio.

A worker has a single thread because a device does one thing at a time. Other jobs than the engine's steps come in
slices. While the engine has something to do, they get a quarter of the time, and their programs are compiled in another
thread; so no request waits long for them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TypeVar

from jaxlm.core.errors import UserError
from jaxlm.evaluation.insight import Slices
from jaxlm.inference.engine.constraints import Constraint
from jaxlm.inference.engine.engine import Engine
from jaxlm.inference.engine.requests import Event, Request
from jaxlm.serving.grammars import GrammarQueue
from jaxlm.serving.protocol.errors import (
    ApiError,
    client_queue_full,
    internal_error,
    queue_full,
    request_timeout,
    too_many_choices,
)
from jaxlm.serving.slices import SliceQueue, run_into

__all__ = ["Caller", "EngineWorker", "GenerationStream", "Worker"]

T = TypeVar("T")
_log = logging.getLogger("jaxlm.serving")
_STEPS_SHARE = 3  # seconds of steps for a second of slices, while there are steps to do


@dataclass(frozen=True)
class Caller:
    """Whose request it is, and how long it may take.

    Attributes:
        client: an API key or an address. All requests of a client share its part of the places.
        timeout: seconds.
        request_id: of this request alone.
    """

    client: str = ""
    timeout: float = 600.0
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Worker:
    """Runs jobs slice by slice in a thread.

    Attributes:
        name: of the model.
        capacity: how many continuations or jobs may run and wait at once (places).
        client_capacity: how many of them may be of one client, and so of one request; None for all.
        in_use: how many run and wait now.
    """

    def __init__(self, name: str, capacity: int, client_capacity: int | None = None):
        self.name, self.capacity, self.in_use = name, capacity, 0
        self.client_capacity = capacity if client_capacity is None else min(client_capacity, capacity)
        self._in_use_by: Counter[str] = Counter()  # by client, without zeros
        self._mean_seconds = 1.0  # of recent requests
        self._calls: deque[Callable[[], None]] = deque()  # short calls; all of them run before the next step
        self._owed = 0.0  # seconds of steps that come before the next slice
        self._changed = threading.Condition()
        self._slices = SliceQueue(name, self._changed)
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=f"jaxlm-{name}", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after its current step."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._slices.close()

    def check_capacity(self, client: str, count: int = 1) -> None:
        """Call it before any work is spent on a request.

        Raises:
            ApiError: with status 429 when there is not enough capacity for ``count`` continuations of a client now,
                400 when there never is.
        """
        if count > self.client_capacity:
            raise too_many_choices(count, self.client_capacity)
        if self.in_use + count > self.capacity:
            raise queue_full(self.retry_after())
        if self._in_use_by[client] + count > self.client_capacity:
            raise client_queue_full(self.client_capacity, self.retry_after())

    def acquire(self, count: int, client: str) -> None:
        """Reserves capacity for ``count`` continuations of a client.

        Raises:
            ApiError: with status 429 when there is not enough capacity now, 400 when there never is.
        """
        with self._changed:
            self.check_capacity(client, count)
            self.in_use += count
            self._in_use_by[client] += count

    def release(self, count: int, client: str, seconds: float) -> None:
        """Gives capacity back after ``seconds``."""
        with self._changed:
            self.in_use -= count
            self._in_use_by[client] -= count
            self._in_use_by += Counter()  # forgets clients without places
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)

    def retry_after(self) -> int:
        """Seconds after which a client should try again."""
        return min(max(1, round(self._mean_seconds)), 60)

    async def run(self, slices: Slices[T], client: str) -> T:
        """Runs slices one by one in the worker's thread, and returns their result. When this is cancelled, the
        remaining slices do not run."""
        self.acquire(1, client)
        begin, future = time.monotonic(), Future()
        try:
            self._slices.add(future, slices)
            return await asyncio.wrap_future(future)
        finally:
            self.release(1, client, time.monotonic() - begin)

    def _call(self, function: Callable[[], None]) -> None:
        """Has the thread call a short function before its next step."""
        with self._changed:
            self._calls.append(function)
            self._changed.notify()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._calls or self._slices or self._busy)
                if self._closed:
                    return
                calls, self._calls = self._calls, deque()
            for function in calls:
                run_into(Future(), function)
            if self._owed <= 0 or not self._busy:
                self._owed = _STEPS_SHARE * self._slices.run_next()
            begin = time.monotonic()
            self._step()
            self._owed = max(0.0, self._owed - (time.monotonic() - begin))

    @property
    def _busy(self) -> bool:
        """Whether ``_step`` has something to do."""
        return False

    def _step(self) -> None:
        """Called between jobs."""


class EngineWorker(Worker):
    """Runs the steps of an engine. ``make_engine`` makes the engine, and a new one when it has failed."""

    def __init__(
        self, name: str, make_engine: Callable[[], Engine], capacity: int, client_capacity: int | None = None
    ):
        super().__init__(name, capacity, client_capacity)
        self._make_engine, self.engine = make_engine, make_engine()
        self._streams: dict[int, tuple[GenerationStream, int]] = {}  # request id -> stream, number of the request there
        self._grammars = GrammarQueue(name, lambda: self.engine.grammars)

    async def submit(self, requests: Sequence[Request], caller: Caller) -> GenerationStream:
        """Compiles the constraints of requests, reserves capacity for them, and hands them to the engine.

        Raises:
            UserError: when one of them cannot be served; then none is submitted.
            ApiError: with status 429 when there is not enough capacity.
        """
        self.check_capacity(caller.client, sum(request.samples for request in requests))
        with_grammars = []
        for request in requests:
            if isinstance(constraint := request.constraint, Constraint):
                request = replace(request, constraint=await self._grammars.compile(constraint))
            with_grammars.append(request)
        return await self.open(with_grammars, caller).start()

    def close(self) -> None:
        super().close()
        self._grammars.close()

    def open(self, requests: Sequence[Request], caller: Caller) -> GenerationStream:
        """Reserves capacity for requests; ``GenerationStream.start`` submits them."""
        owner = (caller.client, caller.request_id)
        requests = [replace(request, owner=owner) for request in requests]
        self.acquire(sum(request.samples for request in requests), caller.client)
        return GenerationStream(self, requests, caller)

    @property
    def _busy(self) -> bool:
        return self.engine.busy

    def _step(self) -> None:
        if not self.engine.busy:
            return
        try:
            events = self.engine.step()
        except Exception:
            _log.exception("the engine of %s failed; a new one is made", self.name)
            streams = [stream for stream, _ in self._streams.values()]
            self._streams.clear()
            self.engine = self._make_engine()
            for stream in streams:
                stream.publish(internal_error())
            return
        by_stream: dict[GenerationStream, list[tuple[int, Event]]] = {}
        for event in events:
            if event.request_id in self._streams:
                stream, number = self._streams[event.request_id]
                by_stream.setdefault(stream, []).append((number, event))
        for stream, items in by_stream.items():
            stream.publish(items)


class GenerationStream:
    """The events of several requests: ``async for number, event in stream`` with the number of the request.

    It ends when all continuations have ended, or after the time that the caller has, whether or not somebody reads it.
    Then it gives its capacity back; closing it earlier cancels the continuations that still run.

    Raises:
        ApiError: with status 504 after that time, 500 or 400 when the engine cannot go on.
    """

    def __init__(self, worker: EngineWorker, requests: Sequence[Request], caller: Caller):
        self._worker, self._requests, self._caller = worker, requests, caller
        self._places = sum(request.samples for request in requests)
        self._running = sum(request.n for request in requests)  # continuations that the engine has yet to end
        self._written = 0  # tokens
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[tuple[int, Event]] | ApiError] = asyncio.Queue()
        self._begin, self._released = time.monotonic(), False
        self._timer = self._loop.call_later(caller.timeout, self._expire)

    async def start(self) -> GenerationStream:
        """Submits the requests.

        Raises:
            UserError: when one of them cannot be served; then none is submitted.
        """
        submitted: Future = Future()
        self._worker._call(lambda: run_into(submitted, self._submit))
        try:
            await asyncio.wrap_future(submitted)
        except BaseException:
            self.close()
            raise
        return self

    def _submit(self) -> None:
        for number, request in enumerate(self._requests):
            self._worker._streams[self._worker.engine.submit(request)] = self, number

    def close(self) -> None:
        """Cancels what still runs and releases the capacity. A second call does nothing."""
        self._timer.cancel()
        self._release()

    def _release(self) -> None:
        """What ``close`` does, in any thread."""
        with self._worker._changed:
            released, self._released = self._released, True
        if not released:
            self._worker._call(self._cancel)
            self._worker.release(self._places, self._caller.client, time.monotonic() - self._begin)

    def _cancel(self) -> None:
        for request_id in [key for key, (stream, _) in self._worker._streams.items() if stream is self]:
            self._worker.engine.cancel(request_id)
            del self._worker._streams[request_id]

    def _expire(self) -> None:
        if not self._released:
            self._release()
            most = None
            if all(request.samples == request.n for request in self._requests):  # others are told of at the end only
                most = sum(request.samples * (request.max_new_tokens or 0) for request in self._requests)
            self._events.put_nowait(request_timeout(self._caller.timeout, self._written, most))

    def publish(self, items: list[tuple[int, Event]] | ApiError) -> None:
        """Hands events to whoever iterates, or an error; the worker calls it in its thread."""
        if not isinstance(items, ApiError):
            for _, event in items:
                self._written += len(event.tokens)
                self._running -= event.finish_reason is not None
        if isinstance(items, ApiError) or self._running <= 0:
            self._release()
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, items)
        except RuntimeError:  # the event loop has ended, and with it the reader
            self._release()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        unfinished = sum(request.n for request in self._requests)
        while unfinished:
            items = await self._events.get()
            if isinstance(items, ApiError):
                raise items
            for number, event in items:
                if event.finish_reason == "error":  # the request's own: its constraint cannot be followed
                    raise UserError(event.message)
                unfinished -= event.finish_reason is not None
                yield number, event
