"""Allocates the memory of the paged key/value cache, and finds pages again by the tokens that they hold.

The unit of allocation, a block of vLLM (arXiv:2309.06180), is called a page here, as in ``jaxlm.nn.attention.paged``: a
fixed number of slots, one for the keys and values of one token.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["BlockAllocator", "page_hashes"]


def page_hashes(tokens: Sequence[int], page_size: int, parent: bytes = b"") -> Iterator[bytes]:
    """A hash for each full page of ``tokens``: of its tokens and, through ``parent``, of all tokens before it. The
    ``parent`` of a first page says with what else its keys and values were computed."""
    for end in range(page_size, len(tokens) + 1, page_size):
        page = np.asarray(tokens[end - page_size : end], np.int32).tobytes()
        parent = hashlib.blake2b(parent + page, digest_size=16).digest()
        yield parent


class BlockAllocator:
    """Reference counts of pages 1 to ``num_pages``; page 0 belongs to nobody.

    A page is free, in use by one or more sequences, or cached: in use by none, but kept for a sequence that begins with
    the same tokens. Cached pages are evicted when no page is free, least recently used first.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._references = [0] * (num_pages + 1)
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Pages in use by sequences."""
        return self.num_pages - self.available

    def acquire_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages that hold the longest known prefix of ``hashes``, each with one reference more."""
        found = []
        for page_hash in hashes:
            if (page := self._page_of.get(page_hash)) is None:
                break
            self._cached.pop(page, None)
            self._references[page] += 1
            found.append(page)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages for one sequence to write to, or None if fewer are available."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                del self._page_of[self._hash_of.pop(page)]
            self._references[page] = 1
            pages.append(page)
        return pages

    def register(self, page: int, page_hash: bytes) -> None:
        """Makes a full page findable by its hash. Nothing changes if another page with the same tokens already is."""
        if page_hash not in self._page_of and page not in self._hash_of:
            self._page_of[page_hash], self._hash_of[page] = page, page_hash

    def release(self, pages: Sequence[int]) -> None:
        """Takes back one reference to each page.

        Of pages that become unused together, the last ones of a sequence are evicted first: the first ones are of use
        without the last, but not the last without the first.
        """
        for page in reversed(pages):
            self._references[page] -= 1
            if not self._references[page]:
                if page in self._hash_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)
