"""Translation: sentences that wait together are searched together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from jaxlm.core.errors import UserError
from jaxlm.inference.translate import Hypothesis, encode_sources, generation_for_language, search_translations
from jaxlm.serving.protocol.requests import MOST_SENTENCES
from jaxlm.serving.worker import Worker, answer

__all__ = ["Sentences", "TranslationWorker"]


@dataclass(frozen=True)
class Sentences:
    """Token rows to translate alike."""

    rows: Sequence[Sequence[int]] = field(compare=False)
    target_language: str | None = None
    beam: int | None = None
    length_penalty: float | None = None
    max_length: int | None = None


class TranslationWorker(Worker):
    """Searches for the translations of all that wait with the same settings, at most 64 sentences at a time."""

    def __init__(self, name: str, lm, places: int):
        super().__init__(name, places)
        self._lm = lm
        self._waiting: deque[tuple[Future, Sentences]] = deque()

    async def translate(self, sentences: Sentences) -> list[list[Hypothesis]]:
        """All hypotheses of the beam for each row, best first. UserError for settings that mean nothing."""
        import asyncio

        self.enter(1)
        begin, future = time.monotonic(), Future()
        try:
            self._order(lambda: self._waiting.append((future, sentences)))
            return await asyncio.wrap_future(future)
        finally:
            self.leave(1, time.monotonic() - begin)

    @property
    def _busy(self) -> bool:
        return bool(self._waiting)

    def _step(self) -> None:
        batch = self._next()
        if not batch:
            return
        rows = [row for _, sentences in batch for row in sentences.rows]
        found: Future = Future()
        answer(found, lambda: self._search(batch[0][1], rows))
        if (error := found.exception()) is not None:
            for future, _ in batch:
                future.set_exception(error)
            return
        hypotheses = iter(found.result())
        for future, sentences in batch:
            future.set_result([next(hypotheses) for _ in sentences.rows])

    def _next(self) -> list[tuple[Future, Sentences]]:
        """The first that waits, and those behind it that go with it."""
        batch: list[tuple[Future, Sentences]] = []
        later: deque[tuple[Future, Sentences]] = deque()
        size = 0
        for future, sentences in self._waiting:
            fits = not batch or (sentences == batch[0][1] and size + len(sentences.rows) <= MOST_SENTENCES)
            if not fits:
                later.append((future, sentences))
            elif future.set_running_or_notify_cancel():
                batch.append((future, sentences))
                size += len(sentences.rows)
        self._waiting = later
        return batch

    def _search(self, how: Sentences, rows: Sequence[Sequence[int]]) -> list[list[Hypothesis]]:
        return search_translations(
            self._lm, rows, generation_for_language(self._lm, how.target_language), beam=how.beam,
            length_penalty=how.length_penalty, max_length=how.max_length,
        )


def sources(lm, sentences: Sequence[str], language: str | None, most: int) -> list[list[int]]:
    """What the encoder reads of each. UserError for a sentence of more than ``most`` tokens."""
    rows = encode_sources(lm, sentences, language)
    for number, row in enumerate(rows, 1):
        if len(row) > most:
            raise UserError(f"sentence {number} has {len(row)} tokens and the most is {most}: split it")
    return rows
