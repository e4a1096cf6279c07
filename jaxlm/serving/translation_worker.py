"""The worker of a translation model: sentences that wait with the same settings are searched together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from jaxlm.inference.translation import Hypothesis, generation_for_language, search_translations
from jaxlm.model import LM
from jaxlm.serving.protocol.requests import MAX_SENTENCES
from jaxlm.serving.slices import run_into
from jaxlm.serving.worker import Worker

__all__ = ["TranslationJob", "TranslationWorker"]


@dataclass(frozen=True)
class TranslationJob:
    """Rows of source token ids, and the settings to translate them with. Jobs are equal if their settings are."""

    rows: Sequence[Sequence[int]] = field(compare=False)
    target_language: str | None = None
    beam: int | None = None
    length_penalty: float | None = None
    max_length: int | None = None


class TranslationWorker(Worker):
    """Translates all jobs that wait with the same settings together, at most 64 sentences at a time."""

    def __init__(self, name: str, lm: LM, capacity: int, client_capacity: int | None = None):
        super().__init__(name, capacity, client_capacity)
        self._lm = lm
        self._waiting: deque[tuple[Future, TranslationJob]] = deque()

    async def translate(self, job: TranslationJob, client: str) -> list[list[Hypothesis]]:
        """For each row the hypotheses of the beam, best first.

        Raises:
            UserError: when a setting has no meaning.
        """
        self.acquire(1, client)
        begin, future = time.monotonic(), Future()
        try:
            self._call(lambda: self._waiting.append((future, job)))
            return await asyncio.wrap_future(future)
        finally:
            self.release(1, client, time.monotonic() - begin)

    @property
    def _busy(self) -> bool:
        return bool(self._waiting)

    def _step(self) -> None:
        batch = self._next_batch()
        if not batch:
            return
        rows = [row for _, job in batch for row in job.rows]
        found: Future = Future()
        run_into(found, lambda: self._search(batch[0][1], rows))
        if (error := found.exception()) is not None:
            for future, _ in batch:
                future.set_exception(error)
            return
        hypotheses = iter(found.result())
        for future, job in batch:
            future.set_result([next(hypotheses) for _ in job.rows])

    def _next_batch(self) -> list[tuple[Future, TranslationJob]]:
        """The first job that waits, and those behind it with the same settings."""
        batch: list[tuple[Future, TranslationJob]] = []
        later: deque[tuple[Future, TranslationJob]] = deque()
        size = 0
        for future, job in self._waiting:
            fits = not batch or (job == batch[0][1] and size + len(job.rows) <= MAX_SENTENCES)
            if not fits:
                later.append((future, job))
            elif future.set_running_or_notify_cancel():
                batch.append((future, job))
                size += len(job.rows)
        self._waiting = later
        return batch

    def _search(self, settings: TranslationJob, rows: Sequence[Sequence[int]]) -> list[list[Hypothesis]]:
        return search_translations(
            self._lm, rows, generation_for_language(self._lm, settings.target_language), beam=settings.beam,
            length_penalty=settings.length_penalty, max_length=settings.max_length,
        )
