"""Jobs in slices: what a model computes beside its engine, a piece at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxlm.core.errors import UserError
from jaxlm.evaluation.insight import Slices
from jaxlm.serving.grammars import give_way
from jaxlm.serving.protocol.errors import ApiError, internal_error

__all__ = ["SliceQueue", "run_into"]

_MAX_PROGRAMS = 8  # compiled programs that are kept; each has megabytes
_log = logging.getLogger("jaxlm.serving")


@dataclass(eq=False)
class _Job:
    """Slices, the result of the last one, and the next one if it waits for its program."""

    future: Future
    slices: Slices[Any]
    found: Any = None
    call: partial | None = None

    def next_call(self) -> partial:
        """The next slice. Ends with ``StopIteration`` after the last."""
        if self.call is None:
            self.call = self.slices.send(self.found)
        return self.call


class SliceQueue:
    """Jobs that take turns. False in a condition where no slice can run."""

    def __init__(self, name: str, changed: threading.Condition):
        """``changed`` guards the queue, and is notified when there is a slice to run."""
        self._changed = changed
        self._jobs: deque[_Job] = deque()
        self._programs: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()  # the last used last
        self._compiling = ThreadPoolExecutor(1, f"jaxlm-programs-{name}", give_way)

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, future: Future, slices: Slices[Any]) -> None:
        """Queues a job whose result ``future`` gets. Cancelling that ends the job after its current slice."""
        self._put(_Job(future, slices))

    def _put(self, job: _Job) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def run_next(self) -> float:
        """Runs one slice of the job whose turn it is, if there is one. Returns the seconds that it took."""
        with self._changed:
            if not self._jobs:
                return 0.0
            job = self._jobs.popleft()
        if job.future.cancelled():
            job.slices.close()
            return 0.0
        begin = time.monotonic()
        try:
            call = job.next_call()
            with self._changed:
                if (program := self._programs.get(key := _program_key(call))) is not None:
                    self._programs.move_to_end(key)
            if program is None:
                self._compiling.submit(self._compile, key, job)
            else:
                job.found, job.call = jax.block_until_ready(program(*call.args)), None
                self._put(job)
        except StopIteration as end:
            run_into(job.future, partial(_same, end.value))
        except Exception as error:
            run_into(job.future, partial(_raise, error))
        return time.monotonic() - begin

    def _compile(self, key: Hashable, job: _Job) -> None:
        """Compiles the program that a job waits for, in another thread, and puts the job back."""
        try:
            if not job.future.cancelled() and key not in self._programs:
                program = job.call.func.lower(*job.call.args, **job.call.keywords).compile()
                with self._changed:
                    self._programs[key] = program
                    while len(self._programs) > _MAX_PROGRAMS:
                        self._programs.popitem(last=False)
            self._put(job)
        except Exception as error:
            run_into(job.future, partial(_raise, error))

    def close(self) -> None:
        """Ends the thread that compiles."""
        self._compiling.shutdown(wait=False, cancel_futures=True)


def _program_key(call: partial) -> Hashable:
    """What decides which program a slice needs: its function, static arguments and shapes."""
    leaves, structure = jax.tree.flatten(call.args)
    return call.func, frozenset(call.keywords.items()), structure, tuple((x.shape, str(x.dtype)) for x in leaves)


def _same(value: Any) -> Any:
    return value


def _raise(error: Exception) -> None:
    raise error


def run_into(future: Future, job: Callable[[], Any]) -> None:
    """Calls ``job`` and puts its result or error into ``future``, unless that is cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except (UserError, ApiError) as error:
        future.set_exception(error)
    except Exception:
        _log.exception("a job failed")
        future.set_exception(internal_error())
