"""The order of examples: shuffled anew each epoch, by block where there are many, and the same for all who ask."""

from __future__ import annotations

import functools

import numpy as np

_BLOCK = 1 << 10  # rows read one after another
_GROUP = 1 << 10  # blocks whose rows are mixed


def random_state(seed: int, epoch: int) -> np.random.RandomState:
    """The randomness of an epoch. RandomState, because NumPy promises never to change what it draws (NEP 19), so a run
    resumed under another NumPy sees the same data."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))


class ShuffledOrder:
    """``count`` rows in shuffled order, of any epoch, in memory that hardly grows with their number.

    Up to a million rows are permuted. Of more, blocks of 1,024 rows are: groups of 1,024 blocks then have their rows
    mixed, so that what is read within some thousand batches lies in as many places, not all over a disk. The grid of
    blocks begins elsewhere each epoch.
    """

    def __init__(self, count: int, seed: int, block: int = _BLOCK, group: int = _GROUP):
        self.count, self._seed, self._block, self._group = count, seed, block, group
        self._blocks = functools.lru_cache(maxsize=2)(self._blocks)
        self._mixed = functools.lru_cache(maxsize=4)(self._mixed)

    def __call__(self, epoch: int, places_B: np.ndarray) -> np.ndarray:
        """The rows at some places of an epoch."""
        size = self._block * self._group
        rows_B = np.empty(len(places_B), np.int64)
        for number in np.unique(places_B // size):
            here = places_B // size == number
            rows_B[here] = self._mixed(epoch, int(number))[places_B[here] % size]
        return rows_B

    def _mixed(self, epoch: int, number: int) -> np.ndarray:
        """The rows of a group of blocks."""
        if self.count <= self._block * self._group:
            return random_state(self._seed, epoch).permutation(self.count)
        blocks, shift = self._blocks(epoch)
        chosen = blocks[number * self._group : (number + 1) * self._group]
        rows = (chosen[:, None] * self._block + np.arange(self._block)).reshape(-1)
        rows = (rows[rows < self.count] + shift) % self.count
        return np.random.RandomState(
            np.random.MT19937(np.random.SeedSequence([self._seed, epoch, number + 1]))
        ).permutation(rows)

    def _blocks(self, epoch: int) -> tuple[np.ndarray, int]:
        """The blocks in their order, the one that is not full at the end; and the row that the first begins with."""
        random = random_state(self._seed, epoch)
        full = self.count // self._block
        blocks = random.permutation(full)
        return np.append(blocks, full) if self.count % self._block else blocks, int(random.randint(self.count))
