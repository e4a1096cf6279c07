"""Who has which page of a pool: counts of references, and pages found again by what their tokens are."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

_ROOT = b""


def page_keys(tokens: Sequence[int], size: int, parent: bytes = _ROOT) -> Iterator[bytes]:
    """A key for each whole page of ``tokens``: a digest of them and of all that came before, by way of ``parent``."""
    for end in range(size, len(tokens) + 1, size):
        page = np.asarray(tokens[end - size : end], np.int32).tobytes()
        parent = hashlib.blake2b(parent + page, digest_size=16).digest()
        yield parent


class BlockAllocator:
    """Pages 1 to ``pages`` (0 is nobody's), each free, in use by some sequences, or idle: in use by none, but kept
    for a sequence that begins as it does until a page is needed and it is the one longest out of use."""

    def __init__(self, pages: int):
        self.pages = pages
        self._free = list(range(pages, 0, -1))
        self._users = [0] * (pages + 1)
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that could be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages in use by sequences."""
        return self.pages - self.available

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of as many of the first keys as there are, now in use once more."""
        found = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            self._idle.pop(page, None)
            self._users[page] += 1
            found.append(page)
        return found

    def take(self, count: int) -> list[int] | None:
        """So many pages of one's own, or None where there are not enough."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._users[page] = 1
            taken.append(page)
        return taken

    def name(self, page: int, key: bytes) -> None:
        """Says what a page in use holds, so that it is found. Where another page holds that already, it is not."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """One sequence less uses these pages. Of those that go idle together the last ones are given up first: the
        others may be found without them, and they not without the others."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)
