"""Pairs of replies to the same prompt, of which one is preferred: batches for losses such as DPO."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.batch import Batch
from jaxlm.data.batches.buckets import EpochPlan, plan_epoch
from jaxlm.data.batches.encoding import EncodedDocuments
from jaxlm.data.batches.packing import count_learned

_SIDES = ("chosen", "rejected")


class PreferencePairs:
    """Encoded pairs in batches of ``batch_size`` pairs, padded to ``length`` or to a half, quarter or eighth of it.

    A dialogue longer than ``length`` targets ends there (counted as cut); a pair of which one side has nothing to learn
    before that is left out and counted.
    """

    def __init__(self, encoded: EncodedDocuments, length: int, batch_size: int, pad_id: int):
        self._encoded, self._pad_id, self._rows = encoded, pad_id, batch_size
        lengths_Px2 = encoded.lengths.reshape(-1, 2)
        self._starts_Px2 = (np.cumsum(encoded.lengths) - encoded.lengths).reshape(-1, 2)
        self._sizes_Px2 = np.minimum(lengths_Px2 - 1, length)  # targets
        learned_Px2 = count_learned(
            encoded.learned, self._starts_Px2.reshape(-1) + 1, self._sizes_Px2.reshape(-1)
        ).reshape(-1, 2)
        self._kept = np.flatnonzero(learned_Px2.all(1))
        if not len(self._kept):
            raise UserError(f"no pair has two replies within {length} tokens; raise data.seq_len")
        self._lengths = sorted({-(-length // shrink) for shrink in (8, 4, 2, 1)})
        self._bucket_of = np.searchsorted(self._lengths, self._sizes_Px2.max(1))
        self._cut = int((lengths_Px2.max(1) - 1 > length)[self._kept].sum())

    def __len__(self) -> int:
        """Pairs in an epoch."""
        return len(self._kept)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, length) of the batches that occur, shortest first."""
        return [(self._rows, self._lengths[bucket]) for bucket in np.unique(self._bucket_of[self._kept])]

    def plan(self, seed: int | None, epoch: int) -> EpochPlan:
        return plan_epoch(self._bucket_of, self._kept, [self._rows] * len(self._lengths), seed, epoch)

    def take(self, plan: EpochPlan, k: int, part: int = 0, parts: int = 1) -> Batch:
        """Rows ``part`` of ``parts`` of batch k: for both sides ``chosen_inputs`` and ``chosen_targets`` int32 and
        ``chosen_weights`` float32 (1 on the tokens of the reply), and the same of ``rejected``, each [rows, length].

        Row i of one belongs to row i of the other. Rows beyond the last pair have weight 0.
        """
        rows, length = self._rows // parts, self._lengths[plan.bucket[k]]
        chosen = plan.order[plan.starts[k] : plan.starts[k + 1]][part * rows : (part + 1) * rows]
        batch = {}
        for side, name in enumerate(_SIDES):
            size_B, start_B = np.zeros((2, rows), np.int64)
            size_B[: len(chosen)] = self._sizes_Px2[chosen, side]
            start_B[: len(chosen)] = self._starts_Px2[chosen, side]
            mask_BxT = np.arange(length) < size_B[:, None]
            at_BxT = np.where(mask_BxT, start_B[:, None] + np.arange(length), 0)
            ids = self._encoded.ids
            batch |= {
                f"{name}_inputs": np.where(mask_BxT, ids[at_BxT], self._pad_id).astype(np.int32),
                f"{name}_targets": np.where(mask_BxT, ids[at_BxT + 1], self._pad_id).astype(np.int32),
                f"{name}_weights": (mask_BxT & self._encoded.learned[at_BxT + 1]).astype(np.float32),
            }
        return batch

    def report(self) -> dict[str, int | float]:
        plan = self.plan(None, 0)
        padded = 2 * sum(self._rows * self._lengths[bucket] for bucket in plan.bucket)
        tokens = int(self._sizes_Px2[self._kept].sum())
        return {
            "pairs": len(self._kept), "unlearnable": len(self._bucket_of) - len(self._kept), "cut": self._cut,
            "tokens": tokens, "batches": len(plan.bucket), "efficiency": tokens / padded,
        }

    def documents(self) -> Iterable[EncodedDocuments]:
        return (self._encoded,)

    def notes(self) -> list[str]:
        notes, (total, longest) = list(self._encoded.notes), (len(self._bucket_of), self._lengths[-1])
        if out := total - len(self._kept):
            notes.append(f"{out:,} of {total:,} pairs are without two replies within {longest} tokens and are left out")
        if self._cut:
            notes.append(
                f"{self._cut:,} of {total:,} pairs are longer than {longest} tokens and are cut there; raise "
                "data.seq_len to keep them whole"
            )
        return notes
