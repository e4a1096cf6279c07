"""Batches for losses such as DPO: pairs of replies to the same prompt, one preferred and one rejected."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.batch import Batch
from jaxlm.data.batches.buckets import EpochPlan, plan_epoch
from jaxlm.data.batches.encoding import EncodedDocuments
from jaxlm.data.batches.packing import count_trained

_SIDES = ("chosen", "rejected")


class PreferencePairs:
    """Encoded pairs in batches of ``batch_size`` pairs, padded to ``length`` or to a half, quarter or eighth of it.

    A dialogue of more than ``length`` targets is truncated there. A pair is left out if one of its sides then has no
    token that the model is trained on. The report counts both cases.
    """

    def __init__(self, encoded: EncodedDocuments, length: int, batch_size: int, pad_id: int):
        """
        Args:
            encoded: two documents for each pair, the preferred one first.
            length: targets of a row.
            batch_size: pairs of a batch.
            pad_id: fills rows up.

        Raises:
            UserError: when no pair remains.
        """
        self._encoded, self._pad_id, self._rows = encoded, pad_id, batch_size
        lengths_Px2 = encoded.lengths.reshape(-1, 2)
        self._starts_Px2 = (np.cumsum(encoded.lengths) - encoded.lengths).reshape(-1, 2)
        self._sizes_Px2 = np.minimum(lengths_Px2 - 1, length)  # targets
        trained_Px2 = count_trained(
            encoded.loss_mask, self._starts_Px2.reshape(-1) + 1, self._sizes_Px2.reshape(-1)
        ).reshape(-1, 2)
        self._used = np.flatnonzero(trained_Px2.all(1))
        if not len(self._used):
            raise UserError(f"no pair has two replies within {length} tokens; raise data.seq_len")
        self._lengths = sorted({-(-length // shrink) for shrink in (8, 4, 2, 1)})
        self._bucket_of = np.searchsorted(self._lengths, self._sizes_Px2.max(1))
        self._truncated = int((lengths_Px2.max(1) - 1 > length)[self._used].sum())

    def __len__(self) -> int:
        """The number of pairs in an epoch."""
        return len(self._used)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes (rows, length) of the batches that occur, shortest first."""
        return [(self._rows, self._lengths[bucket]) for bucket in np.unique(self._bucket_of[self._used])]

    def plan(self, seed: int | None, epoch: int) -> EpochPlan:
        """The batches of an epoch; see ``plan_epoch``."""
        return plan_epoch(self._bucket_of, self._used, [self._rows] * len(self._lengths), seed, epoch)

    def batch(self, plan: EpochPlan, k: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """A shard of the rows of batch k: ``chosen_inputs``, ``chosen_targets`` int32 and ``chosen_weights`` float32 (1
        on the tokens of the reply), and the same with ``rejected_``, each [rows, length].

        Row i of one side belongs to row i of the other. Rows beyond the last pair have weight 0.
        """
        rows, length = self._rows // num_shards, self._lengths[plan.bucket[k]]
        pairs = plan.examples(k)[shard * rows : (shard + 1) * rows]
        batch = {}
        for side, name in enumerate(_SIDES):
            size_B, start_B = np.zeros((2, rows), np.int64)
            size_B[: len(pairs)] = self._sizes_Px2[pairs, side]
            start_B[: len(pairs)] = self._starts_Px2[pairs, side]
            mask_BxT = np.arange(length) < size_B[:, None]
            at_BxT = np.where(mask_BxT, start_B[:, None] + np.arange(length), 0)
            ids = self._encoded.ids
            batch |= {
                f"{name}_inputs": np.where(mask_BxT, ids[at_BxT], self._pad_id).astype(np.int32),
                f"{name}_targets": np.where(mask_BxT, ids[at_BxT + 1], self._pad_id).astype(np.int32),
                f"{name}_weights": (mask_BxT & self._encoded.loss_mask[at_BxT + 1]).astype(np.float32),
            }
        return batch

    def report(self) -> dict[str, int | float]:
        """Figures of an epoch: ``unlearnable`` pairs are left out, ``cut`` ones truncated; ``efficiency`` is the share
        of tokens that are not padding."""
        plan = self.plan(None, 0)
        padded = 2 * sum(self._rows * self._lengths[bucket] for bucket in plan.bucket)
        tokens = int(self._sizes_Px2[self._used].sum())
        return {
            "pairs": len(self._used), "unlearnable": len(self._bucket_of) - len(self._used), "cut": self._truncated,
            "tokens": tokens, "batches": len(plan.bucket), "efficiency": tokens / padded,
        }

    def documents(self) -> Iterable[EncodedDocuments]:
        """All dialogues, two for each pair."""
        return (self._encoded,)

    def notes(self) -> list[str]:
        """Sentences about what is left out and what is truncated."""
        notes, (total, longest) = list(self._encoded.notes), (len(self._bucket_of), self._lengths[-1])
        if out := total - len(self._used):
            notes.append(f"{out:,} of {total:,} pairs lack a reply within {longest} tokens and are left out")
        if self._truncated:
            notes.append(
                f"{self._truncated:,} of {total:,} pairs are longer than {longest} tokens and are truncated there; "
                "raise data.seq_len to keep them whole"
            )
        return notes
