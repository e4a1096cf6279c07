"""The Pareto frontier of size and loss, where each of several things has options: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["ParetoFrontier", "pareto_frontier"]

_POINTS = 1 << 13  # of a frontier


@dataclass(frozen=True)
class ParetoFrontier:
    """The least loss for every size: points of rising ``size`` and falling ``loss``, ``[points]``.

    ``picks``, ``[points, things]``, has for each point the number of the option of each thing.
    """

    size: np.ndarray
    loss: np.ndarray
    picks: np.ndarray

    def within(self, most: float) -> int | None:
        """The number of the best point of at most this size; None where there is none."""
        point = int(np.searchsorted(self.size, most, side="right")) - 1
        return point if point >= 0 else None


def pareto_frontier(
    sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], points: int = _POINTS
) -> ParetoFrontier:
    """The best choices for all budgets, one option for each thing; sizes and losses of options add up.

    Exact while there are no more than ``points`` of them. Beyond, of points whose sizes are within one part in
    ``points`` of the whole range on a logarithmic scale, only the best one is kept, and always the smallest of all.

    Args:
        sizes, losses: of each thing, those of its options.
    """
    total, loss, picks = np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int16)
    for size, cost in zip(sizes, losses, strict=True):
        size, cost = np.asarray(size, np.int64), np.asarray(cost, np.float64)
        useful = _not_dominated(size, cost)
        sums = np.add.outer(total, size[useful]).ravel()
        costs = np.add.outer(loss, cost[useful]).ravel()
        order = _not_dominated(sums, costs)
        if len(order) > points:
            scale = np.log(sums[order] / sums[order[0]])
            slot = np.ceil(scale * ((points - 1) / scale[-1])).astype(np.int64)
            order = order[np.concatenate([slot[1:] != slot[:-1], [True]])]
        total, loss = sums[order], costs[order]
        picks = np.column_stack([picks[order // len(useful)], useful[order % len(useful)].astype(np.int16)])
    return ParetoFrontier(total, loss, picks)


def _not_dominated(size: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """The numbers of those that cost less than all smaller ones, by size."""
    order = np.lexsort((cost, size))
    least = np.minimum.accumulate(cost[order])
    return order[np.concatenate([[True], least[1:] < least[:-1]])]
