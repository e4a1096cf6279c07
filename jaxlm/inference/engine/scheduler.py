"""Which sequences run: first come, first served, as slots and pages allow.

Pages are taken as sequences grow. When they run out the sequence that came last gives up its pages and slot, waits
again, first in the queue, and is read anew when there is room; its pages may still be there then. The one that came
first is never stopped, and any sequence alone fits the pool, so there is always one that goes on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxlm.inference.detokenizer import Detokenizer
from jaxlm.inference.engine.block_allocator import BlockAllocator, page_keys
from jaxlm.inference.engine.constraints import Matcher
from jaxlm.inference.engine.requests import Request


@dataclass
class Sequence:
    """One continuation of a request, and how far it is. ``read`` tokens are in its pages, all but the last once it
    decodes."""

    number: int
    index: int
    request: Request
    seed: int
    tokens: list[int]
    text: Detokenizer | None
    matcher: Matcher | None = None
    slot: int | None = None
    placed: bool = False  # whether the devices know what is in its slot
    read: int = 0
    behind: bool = False  # the draft has not read the token before the last
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of those of its pages that have a name
    logprob: float = 0.0  # of its new tokens, where anybody asks

    @property
    def order(self) -> tuple[int, int]:
        """Who came first."""
        return self.number, self.index

    @property
    def drawn(self) -> int:
        """New tokens."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Tokens of it to be read before the next can be drawn, which reads the last."""
        return len(self.tokens) - 1 - self.read


class Part(NamedTuple):
    """Tokens of a sequence to be read at this step."""

    sequence: Sequence
    begin: int
    count: int


class Scheduler:
    """Sequences in slots and in the queue."""

    def __init__(self, ledger: BlockAllocator, *, slots: int, size: int, chunk: int, drafts: int):
        self.ledger, self.size, self.chunk, self.drafts = ledger, size, chunk, drafts
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.hit = 0
        self._slots = list(range(slots - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue, before those that came later."""
        insort(self.waiting, sequence, key=lambda each: each.order)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._unseat(sequence)

    def parts(self) -> Iterator[Part]:
        """What to read at this step, ``chunk`` tokens at most; seats sequences of the queue as long as some of them are
        left. What is asked for must be read before the next part is."""
        budget = self.chunk
        for sequence in self.running:
            while budget > 0 and sequence.left:
                yield (part := self._part(sequence, budget))
                budget -= part.count
        while budget > 0 and self._seat():
            sequence = self.running[-1]
            while budget > 0 and sequence.left:
                yield (part := self._part(sequence, budget))
                budget -= part.count

    def _part(self, sequence: Sequence, budget: int) -> Part:
        part = Part(sequence, sequence.read, min(budget, sequence.left))
        self.has_read(sequence, part.begin + part.count)
        return part

    def grow(self) -> None:
        """Sees to it that every sequence that draws a token has pages for it, and for what the draft may guess."""
        for sequence in list(self.running):
            if sequence.slot is not None and not sequence.left:
                self._grow(sequence)

    def ready(self) -> list[Sequence]:
        """Sequences that can draw a token."""
        return [sequence for sequence in self.running if not sequence.left]

    def guesses(self, sequence: Sequence) -> int:
        """How many tokens the draft may guess."""
        return 0 if sequence.matcher else max(0, min(self.drafts, sequence.request.max_new_tokens - sequence.drawn - 1))

    def has_read(self, sequence: Sequence, count: int) -> None:
        """Says that ``count`` tokens of a sequence are in its pages, so that others find those that are full."""
        sequence.read = count
        settled = count - (1 if self.drafts else 0)  # the draft may be one behind
        named = len(sequence.keys)
        parent = (sequence.keys[-1],) if named else ()
        for key in page_keys(sequence.tokens[named * self.size : settled], self.size, *parent):
            self.ledger.name(sequence.pages[len(sequence.keys)], key)
            sequence.keys.append(key)

    def _needed(self, sequence: Sequence) -> int:
        return -(-(len(sequence.tokens) + self.guesses(sequence)) // self.size)

    def _seat(self) -> bool:
        """Gives the first in the queue a slot and pages, where there are some; others keep a page each to grow."""
        if not self.waiting or not self._slots:
            return False
        sequence = self.waiting[0]
        whole = sequence.tokens[: (len(sequence.tokens) - 1) // self.size * self.size]
        keys = list(page_keys(whole, self.size))
        found = self.ledger.find(keys)
        needed = self._needed(sequence) - len(found)
        if needed + len(self.running) > self.ledger.available and self.running:
            self.ledger.release(found)
            return False
        sequence.pages = found + self.ledger.take(needed)
        sequence.keys = keys[: len(found)]
        sequence.read = len(found) * self.size
        sequence.behind = sequence.placed = False
        sequence.slot = self._slots.pop()
        self.hit += sequence.read
        self.running.append(self.waiting.pop(0))
        return True

    def _grow(self, sequence: Sequence) -> None:
        while (more := self.ledger.take(max(0, self._needed(sequence) - len(sequence.pages)))) is None:
            last = max(self.running, key=lambda each: each.order)
            self._unseat(last)
            self.add(last)
            self.preemptions += 1
            if last is sequence:
                return
        sequence.pages += more

    def _unseat(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        self.ledger.release(sequence.pages)
        sequence.slot, sequence.pages, sequence.keys, sequence.read = None, [], [], 0
