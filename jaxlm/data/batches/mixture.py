"""Rows of several sources, each as often as its weight says."""

from __future__ import annotations

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.batch import Batch
from jaxlm.data.batches.packing import PackedDocuments, Windows
from jaxlm.data.batches.shuffle import ShuffledOrder
from jaxlm.data.sources.types import Mixture


class MixedRows:
    """The rows of several sources. Each source repeats independently of the others, shuffled again each time.

    With weights in epochs, an epoch of the mixture goes through each source as often as its weight says. With shares,
    each source has its share of the rows, and an epoch ends when the first source would begin again. Counts are rounded
    to whole rows. Every epoch has the same number of rows of a source, and no row of a source comes again before all
    its other rows have come.
    """

    def __init__(self, parts: list[Windows | PackedDocuments], mixture: Mixture, seed: int | None):
        """
        Args:
            parts: the rows of each source of ``mixture``.
            mixture: the weights.
            seed: of the order; None: each row once, in order, whatever the weights.

        Raises:
            UserError: when the weight of a source is less than one row.
        """
        self._parts, self._mixture = parts, mixture
        sizes, weights = np.array([len(part) for part in parts]), np.array(mixture.weights)
        if seed is None:
            counts = sizes
        elif mixture.shares:
            counts = np.rint(weights * (sizes / weights).min()).astype(np.int64)
        else:
            counts = np.rint(weights * sizes).astype(np.int64)
        if not counts.all():
            least = mixture.sources[int(counts.argmin())].spec
            raise UserError(f"{least!r} has less than one row in an epoch of the mixture; raise its weight")
        self._counts, self._ends = counts, np.cumsum(counts)
        self._orders = None
        if seed is not None:  # every source has an order of its own
            self._orders = [ShuffledOrder(len(part), seed + ((i + 1) << 32)) for i, part in enumerate(parts)]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, epoch: int, rows_B: np.ndarray) -> Batch:
        """Some rows of an epoch, in which the rows of a source follow one another. Row -1 is all padding."""
        part_B = np.searchsorted(self._ends, rows_B, side="right")
        batch: Batch = {}
        for i in np.unique(part_B):
            here = np.flatnonzero(part_B == i)
            found = self._take(int(i), epoch, rows_B[here])
            if len(here) == len(rows_B):
                return found
            for name, values in found.items():
                batch.setdefault(name, np.empty((len(rows_B), *values.shape[1:]), values.dtype))[here] = values
        return batch

    def _take(self, i: int, epoch: int, rows_B: np.ndarray) -> Batch:
        part, first = self._parts[i], self._ends[i] - self._counts[i]
        if self._orders is None:
            return part.take(0, np.where(rows_B < 0, -1, rows_B - first))
        repeat_B, place_B = np.divmod(epoch * self._counts[i] + rows_B - first, len(part))
        batch: Batch = {}
        for repeat in np.unique(repeat_B):
            here = np.flatnonzero(repeat_B == repeat)
            found = part.take(int(repeat), self._orders[i](int(repeat), place_B[here]))
            for name, values in found.items():
                batch.setdefault(name, np.empty((len(rows_B), *values.shape[1:]), values.dtype))[here] = values
        return batch

    def report(self) -> dict[str, int | float]:
        reports = [part.report() for part in self._parts]
        return {
            "sources": len(reports), "tokens": sum(report["tokens"] for report in reports), "rows": len(self),
        }

    def notes(self) -> list[str]:
        notes = [
            f"an epoch has {count:,} rows ({count / len(self):.1%}) of {source.spec}, "
            f"{count / len(part):.4g} times its {len(part):,}"
            for source, count, part in zip(self._mixture.sources, self._counts, self._parts, strict=True)
        ]
        return [*notes, *(note for part in self._parts for note in part.notes())]
