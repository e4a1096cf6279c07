"""Collects the events of an engine; where a request asks for the best of several continuations, chooses them."""

from __future__ import annotations

import dataclasses

from jaxlm.inference.engine.requests import Event
from jaxlm.inference.engine.scheduler import Sequence

__all__ = ["EventQueue"]


class EventQueue:
    """Events to report. Those of a request with ``best_of`` wait until all its continuations are finished."""

    def __init__(self) -> None:
        self._ready: list[Event] = []
        self._held: dict[int, dict[int, list[Event]]] = {}  # by request and continuation
        self._scores: dict[int, dict[int, float]] = {}  # the mean log-probability of a token

    def __bool__(self) -> bool:
        """Whether there is an event to report."""
        return bool(self._ready)

    def hold(self, request_id: int) -> None:
        """Holds back the events of a request until ``release_best``."""
        self._held[request_id], self._scores[request_id] = {}, {}

    def put(self, event: Event, sequence: Sequence) -> None:
        """Adds an event of a sequence."""
        held = self._held.get(event.request_id)
        if held is None:
            self._ready.append(event)
            return
        held.setdefault(event.index, []).append(event)
        self._scores[event.request_id][event.index] = sequence.logprob / max(sequence.num_generated, 1)

    def release_best(self, request_id: int, count: int) -> None:
        """Reports the ``count`` best continuations of a request, numbered anew, best first. Nothing happens if its
        events were not held back."""
        held, scores = self._held.pop(request_id, {}), self._scores.pop(request_id, {})
        ranked = sorted(held, key=lambda index: (-scores[index], index))[:count]
        self._ready += [
            dataclasses.replace(event, index=rank) for rank, index in enumerate(ranked) for event in held[index]
        ]

    def cancel(self, request_id: int, unfinished: list[Sequence]) -> None:
        """Reports that the unfinished continuations of a request are cancelled; of a request whose events are held
        back, all that it would return."""
        held = self._held.pop(request_id, None) is not None
        self._scores.pop(request_id, None)
        indices = [sequence.index for sequence in unfinished]
        if held and unfinished:
            indices = list(range(unfinished[0].request.n))
        self._ready += [Event(request_id, index, finish_reason="cancelled") for index in indices]

    def take(self) -> list[Event]:
        """All events to report; afterwards there are none."""
        events, self._ready = self._ready, []
        return events
