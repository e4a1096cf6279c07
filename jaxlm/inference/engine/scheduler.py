"""Decides which sequences run: first come, first served, as far as slots and pages allow.

Pages are allocated as sequences grow. When they run out, the sequence that came last is preempted: it gives up its
pages and its slot, becomes the first in the queue, and is read anew when there is room; often its pages are still
cached then. Of those that run, the first is never preempted, and any sequence alone fits the pool, so there is always
progress.

Requests with an owner share the slots evenly instead. Owners are paths from the whole to the part, as ``(client,
request)``: a slot goes to the client that has the fewest, and there to the request that has the fewest. Whoever has at
least two slots more than another who waits is preempted, so that nobody waits for the texts of one who asks for many.

Where a model's rotations depend on the length of the text (``nn.rereading``), a sequence that has grown beyond a length
gives up its pages in the same way and is read anew. Pages are shared only between sequences of the same rotations.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxlm.inference.detokenizer import Detokenizer
from jaxlm.inference.engine.block_allocator import BlockAllocator, page_hashes
from jaxlm.inference.engine.constraints import Matcher
from jaxlm.inference.engine.requests import Request

__all__ = ["PrefillChunk", "Scheduler", "Sequence"]


@dataclass
class Sequence:
    """One continuation of a request. ``num_computed`` of its tokens have keys and values in its pages: all but the last
    once it decodes."""

    request_id: int
    index: int  # which of the request's continuations
    request: Request
    seed: int
    tokens: list[int]
    detokenizer: Detokenizer | None
    matcher: Matcher | None = None
    slot: int | None = None
    on_device: bool = False  # whether the devices have its tokens and settings in its slot
    num_computed: int = 0
    draft_lags: bool = False  # whether the draft has yet to read the token before the last
    rotation: tuple[int, ...] = ()  # what its pages were computed with (``ResolvedOptions.rotation``)
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)  # of the pages that are registered
    logprob: float = 0.0  # of its new tokens together, where the request needs it

    @property
    def arrival(self) -> tuple[int, int]:
        """Sorts sequences by who came first."""
        return self.request_id, self.index

    @property
    def num_generated(self) -> int:
        """New tokens so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_to_prefill(self) -> int:
        """Tokens to read before the sequence can decode. Decoding itself reads the last token."""
        return len(self.tokens) - 1 - self.num_computed


class PrefillChunk(NamedTuple):
    """Tokens of a sequence to read in this step: ``count`` from ``begin`` on."""

    sequence: Sequence
    begin: int
    count: int


class Scheduler:
    """The sequences in slots and in the queue."""

    def __init__(
        self, allocator: BlockAllocator, *, slots: int, page_size: int, prefill_chunk: int, num_draft_tokens: int,
        rotation: Callable[[int], tuple[int, ...]],
    ):
        """For the arguments see ``EngineOptions`` and ``ResolvedOptions.rotation``."""
        self.allocator, self.page_size = allocator, page_size
        self.prefill_chunk, self.num_draft_tokens, self.rotation = prefill_chunk, num_draft_tokens, rotation
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.cached_tokens = 0
        self._free_slots = list(range(slots - 1, -1, -1))
        self._slots_of: Counter[tuple[str, ...]] = Counter()  # by owner, and by each whole that the owner is part of

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue, before those that came later."""
        insort(self.waiting, sequence, key=lambda each: each.arrival)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out of its slot or out of the queue."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._release_slot(sequence)

    def schedule_prefill(self) -> Iterator[PrefillChunk]:
        """The chunks to read in this step, ``prefill_chunk`` tokens at most. Slots are assigned to waiting sequences
        while some of these tokens are left. Each chunk must be read before the next is asked for."""
        budget = self.prefill_chunk
        for sequence in self.running:
            while budget > 0 and sequence.num_to_prefill:
                yield (chunk := self._next_chunk(sequence, budget))
                budget -= chunk.count
        while budget > 0 and self._assign_slot():
            sequence = self.running[-1]
            while budget > 0 and sequence.num_to_prefill:
                yield (chunk := self._next_chunk(sequence, budget))
                budget -= chunk.count

    def _next_chunk(self, sequence: Sequence, budget: int) -> PrefillChunk:
        chunk = PrefillChunk(sequence, sequence.num_computed, min(budget, sequence.num_to_prefill))
        self.mark_computed(sequence, chunk.begin + chunk.count)
        return chunk

    def reserve_pages(self) -> None:
        """Gives every sequence that decodes in this step pages for its new tokens; preempts others where needed."""
        for sequence in list(self.running):
            if sequence.slot is not None and not sequence.num_to_prefill:
                self._reserve(sequence)

    def decoding(self) -> list[Sequence]:
        """The sequences that can decode a token now."""
        return [sequence for sequence in self.running if not sequence.num_to_prefill]

    def draft_budget(self, sequence: Sequence) -> int:
        """How many tokens the draft may propose for a sequence."""
        if sequence.matcher:
            return 0
        most = min(self.num_draft_tokens, sequence.request.max_new_tokens - sequence.num_generated - 1)
        while most > 0 and self.rotation(len(sequence.tokens) + most) != sequence.rotation:
            most -= 1
        return max(0, most)

    def mark_decoded(self, sequence: Sequence) -> None:
        """Records that a sequence has got new tokens. All but the last are in its pages; or it must be read anew."""
        if self.rotation(len(sequence.tokens)) == sequence.rotation:
            self.mark_computed(sequence, len(sequence.tokens) - 1)
        else:
            self._release_slot(sequence)
            self.add(sequence)

    def mark_computed(self, sequence: Sequence, count: int) -> None:
        """Records that the first ``count`` tokens of a sequence are in its pages, and registers the full pages, so that
        other sequences find them."""
        sequence.num_computed = count
        if self.rotation(len(sequence.tokens) + 1) != sequence.rotation:
            return  # its next token makes these pages useless
        final = count - (1 if self.num_draft_tokens else 0)  # the draft may lag behind by one
        registered = len(sequence.page_hashes)
        parent = sequence.page_hashes[-1] if registered else _root(sequence.rotation)
        for page_hash in page_hashes(sequence.tokens[registered * self.page_size : final], self.page_size, parent):
            self.allocator.register(sequence.pages[len(sequence.page_hashes)], page_hash)
            sequence.page_hashes.append(page_hash)

    def _pages_needed(self, sequence: Sequence) -> int:
        return -(-(len(sequence.tokens) + self.draft_budget(sequence)) // self.page_size)

    def _assign_slot(self) -> bool:
        """Gives a waiting sequence a slot and pages if there are enough, or if another has more than its share. One
        page more is left for each running sequence, so that it can grow."""
        while self.waiting and (self._free_slots or self._slots_of):
            sequence = self.waiting[0]
            if self._slots_of or sequence.request.owner:
                sequence = min(self.waiting, key=self._share)
            if self._free_slots and self._assign(sequence):
                return True
            by_share = sorted(self.running, key=self._last_preempted, reverse=True)
            greedy = next((each for each in by_share if self._has_more(each, sequence)), None)
            if greedy is None:
                return False
            self._preempt(greedy)
        return False

    def _assign(self, sequence: Sequence) -> bool:
        full = sequence.tokens[: (len(sequence.tokens) - 1) // self.page_size * self.page_size]
        sequence.rotation = self.rotation(len(sequence.tokens))
        hashes = list(page_hashes(full, self.page_size, _root(sequence.rotation)))
        found = self.allocator.acquire_prefix(hashes)
        needed = self._pages_needed(sequence) - len(found)
        if needed + len(self.running) > self.allocator.available and self.running:
            self.allocator.release(found)
            return False
        sequence.pages = found + self.allocator.allocate(needed)
        sequence.page_hashes = hashes[: len(found)]
        sequence.num_computed = len(found) * self.page_size
        sequence.draft_lags = sequence.on_device = False
        sequence.slot = self._free_slots.pop()
        self.cached_tokens += sequence.num_computed
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self._slots_of.update(_wholes(sequence))
        return True

    def _share(self, sequence: Sequence) -> tuple[int, ...]:
        """How many slots the owner of a sequence has, from the whole to the part."""
        return tuple(self._slots_of[each] for each in _wholes(sequence))

    def _last_preempted(self, sequence: Sequence) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Sorts running sequences: the last of those with the most slots is preempted first."""
        return self._share(sequence), sequence.arrival

    def _has_more(self, running: Sequence, waiting: Sequence) -> bool:
        """Whether the owner of the one has at least two slots more than that of the other, where they part."""
        for one, other in zip(_wholes(running), _wholes(waiting), strict=False):
            if one != other:
                return self._slots_of[one] >= self._slots_of[other] + 2
        return False

    def _reserve(self, sequence: Sequence) -> None:
        while True:
            missing = max(0, self._pages_needed(sequence) - len(sequence.pages))
            if (pages := self.allocator.allocate(missing)) is not None:
                sequence.pages += pages
                return
            last = max(self.running, key=self._last_preempted)
            self._preempt(last)
            if last is sequence:
                return

    def _preempt(self, sequence: Sequence) -> None:
        self._release_slot(sequence)
        self.add(sequence)
        self.preemptions += 1

    def _release_slot(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._slots_of -= Counter(_wholes(sequence))
        self._free_slots.append(sequence.slot)
        self.allocator.release(sequence.pages)
        sequence.slot, sequence.pages, sequence.page_hashes, sequence.num_computed = None, [], [], 0


def _wholes(sequence: Sequence) -> list[tuple[str, ...]]:
    """The owner of a sequence, and before it the wholes that the owner is part of, the largest first."""
    owner = sequence.request.owner
    return [owner[:depth] for depth in range(1, len(owner) + 1)]


def _root(rotation: tuple[int, ...]) -> bytes:
    """With what the hashes of pages begin."""
    return repr(rotation).encode()
