"""What a training remembers from step to step besides its state: sums for the log, and the best validations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["History"]

_NOT_SUMMED = ("weight", "grad_norm", "bad")


def _no_sums() -> dict[str, float]:
    return {"nll": 0.0, "loss": 0.0, "weight": 0.0}


@dataclass
class History:
    """Saved with every checkpoint, as JSON: the names of the fields are part of the format."""

    skipped: int = 0  # bad updates so far
    sums: dict[str, float] = field(default_factory=_no_sums)  # of metrics times tokens, since the last logged row
    evaluated: int = 0  # step of the last validation
    best: list[tuple[float, int]] = field(default_factory=list)  # (score, step) of the best validations, best first
    stale: int = 0  # validations since the best

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Adds the metrics of a good step."""
        self.sums["weight"] += metrics["weight"]
        for name in sorted(metrics.keys() - set(_NOT_SUMMED)):
            self.sums[name] = self.sums.get(name, 0.0) + metrics[name] * metrics["weight"]

    def take_means(self) -> dict[str, float | int | None]:
        """``loss``, ``objective``, ``tokens`` and the means of what else the loss sums, since the last call; the first
        two are None where no step was good."""
        sums, self.sums = self.sums, _no_sums()
        weight = sums["weight"]
        means = {name: total / weight for name, total in sums.items() if name not in _no_sums()}
        tokens = weight * means.pop("tokens", 1.0) if weight else 0.0
        return {
            "loss": sums["nll"] / weight if weight else None, "objective": sums["loss"] / weight if weight else None,
            "tokens": round(tokens), **means,
        }

    def add_score(self, step: int, score: float, *, eligible: bool, highest: bool, keep: int) -> bool:
        """Records a validation; returns whether it is the best so far.

        Args:
            step: updates done.
            score: what is compared; one that is not finite is never among the best.
            eligible: False where the model is not yet what the training is for, such as one that is not yet pruned:
                it neither competes nor counts as stale.
            highest: whether the highest score is best, or the lowest.
            keep: how many of the best to remember.
        """
        self.evaluated = step
        self.stale += eligible
        if math.isfinite(score) and eligible:
            scored = sorted([*self.best, (score, step)], key=lambda pair: pair[0], reverse=highest)
            self.best = scored[:keep]
            self.stale = self.stale if self.best[0][1] != step else 0
        return eligible and not self.stale

    def score_of(self, step: int) -> float | None:
        """The score of a step that is among the best; None of any other."""
        return next((score for score, best in self.best if best == step), None)
