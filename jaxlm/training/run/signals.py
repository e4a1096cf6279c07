"""Being told to stop: SIGTERM in one process, or in any of several."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

__all__ = ["StopSignal", "Terminated", "stop_on_sigterm"]


class Terminated(Exception):
    """This training was told to stop."""


class StopSignal:
    """Says whether this training was told to stop."""

    def __init__(self):
        self.event = threading.Event()
        self._checks = 0  # in this process; the same number in all processes

    def check(self) -> None:
        """Called between batches. All processes call it equally often, and stop at the call that JAX finds them to
        agree on.

        Raises:
            Terminated: when this process was told to stop, or when the processes have agreed to.
        """
        if jax.process_count() > 1:
            self._checks += 1
            if multihost_utils.reached_preemption_sync_point(self._checks):
                raise Terminated
        if self.event.is_set():
            raise Terminated


@contextmanager
def stop_on_sigterm() -> Iterator[StopSignal]:
    """A StopSignal that SIGTERM sets, inside the block.

    Outside the main thread, which alone can handle signals, nothing sets it. With several processes ``jax.distributed``
    catches SIGTERM, and the processes agree on the step to stop at.
    """
    stop = StopSignal()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.event.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
