"""The order of examples: a pure function of (seed, epoch), in little memory even for very many examples."""

from __future__ import annotations

import functools

import numpy as np

_BLOCK = 1 << 10  # consecutive rows that move together
_GROUP = 1 << 10  # blocks whose rows are permuted together


def random_state(seed: int, epoch: int) -> np.random.RandomState:
    """The random numbers of an epoch. RandomState is used because NumPy promises never to change its stream (NEP 19),
    so that a run that is resumed with another version of NumPy sees the same data."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))


class ShuffledOrder:
    """The shuffled order of ``count`` rows, of any epoch, in memory that hardly grows with ``count``.

    Up to a million rows are permuted freely. Of more rows, blocks of 1,024 consecutive rows are permuted, and then the
    rows within each group of 1,024 blocks. So the rows of some thousand batches lie in 1,024 places of a disk, not
    everywhere on it. The first block begins at another row in each epoch.
    """

    def __init__(self, count: int, seed: int, block: int = _BLOCK, group: int = _GROUP):
        self.count, self._seed, self._block, self._group = count, seed, block, group
        self._blocks = functools.lru_cache(maxsize=2)(self._blocks)
        self._permuted = functools.lru_cache(maxsize=4)(self._permuted)

    def __call__(self, epoch: int, places_B: np.ndarray) -> np.ndarray:
        """The rows at some places of the order of an epoch."""
        size = self._block * self._group
        rows_B = np.empty(len(places_B), np.int64)
        for number in np.unique(places_B // size):
            here = places_B // size == number
            rows_B[here] = self._permuted(epoch, int(number))[places_B[here] % size]
        return rows_B

    def _permuted(self, epoch: int, number: int) -> np.ndarray:
        """The permuted rows of a group of blocks."""
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
        """The order of the blocks, with a partial block last; and the row at which the first block begins."""
        random = random_state(self._seed, epoch)
        full = self.count // self._block
        blocks = random.permutation(full)
        return np.append(blocks, full) if self.count % self._block else blocks, int(random.randint(self.count))
