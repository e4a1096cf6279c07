"""Limits for code that reads what may be damaged: an exception in place of a process that never ends or takes all
memory."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Hang(BaseException):
    """The time is up. Not an Exception: code that catches those must not take it for damage."""


@contextmanager
def limited(size: int, seconds: float) -> Iterator[None]:
    """Inside, memory runs out once the process has grown by ``size`` bytes, and Hang is raised after ``seconds`` of CPU
    time: other programs may keep the process waiting."""

    def stop(*_: Any) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (before + size, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, handler)


def traced(error: BaseException) -> str:
    """An error with the place in the code that raised it, in one line."""
    where = error.__traceback__
    while where.tb_next is not None:
        where = where.tb_next
    place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}"
    return f"{type(error).__name__} in {place}: {str(error)[:300]!r}"
