"""Rows of tokens for language models: windows of one stream, or whole documents packed side by side.

A stream of N ids has N - 1 targets (each id but the first). Windows of ``length`` targets cover them; every epoch
predicts each target exactly once, in windows that always hold ``length`` tokens where the stream has them: where two
overlap, all but one give the target no weight.

Both kinds of rows have ``len()``, the rows of an epoch, and ``take(epoch, rows_B) -> Batch``, a pure function.
"""

from __future__ import annotations

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.batch import Batch
from jaxlm.data.batches.encoding import EncodedDocuments, encode_documents
from jaxlm.data.batches.shuffle import random_state
from jaxlm.data.sources.types import Dialogues, Preferences, Source
from jaxlm.data.tokenizers.tokenizer import Tokenizer

_AT_A_TIME = 1 << 16  # documents


def token_stream(source: Source, tokenizer: Tokenizer) -> np.ndarray:
    """All of a source as one run of ids [N]: documents in order, each followed by eos; a text file has no end.

    UserError for dialogues, which are no stream, and what ``encode`` refuses.
    """
    if isinstance(source, Dialogues | Preferences):
        raise UserError(f"{source.spec!r} is dialogues; a stream of text is text:, jsonl: or tokens:")
    return encode_documents(source, tokenizer).ids


class Windows:
    """Windows of one stream.

    Without ``seed`` the grid starts at the first target and every epoch is the same. With it, the first window of an
    epoch brings a random number of new targets (from at least about ``length / 2`` choices), so that windows begin
    elsewhere each time; the number of windows is the same in every epoch.
    """

    def __init__(self, stream: np.ndarray, length: int, seed: int | None = None, notes: tuple[str, ...] = ()):
        """``stream``: ids [N], N >= 2. ``length``: tokens in a window."""
        if len(stream) < 2:
            raise UserError("the text is a single token; a language model needs at least two")
        self._stream, self._length, self._seed, self._notes = stream, length, seed, notes
        self._targets = len(stream) - 1
        whole, rest = divmod(self._targets, length)
        if 2 * rest < length:  # head and tail share length + rest targets
            self._count, self._heads = whole + 1, (max(rest, 1), min(length, length + rest - 1))
        else:  # head and tail share rest targets
            self._count, self._heads = whole + 2, (1, rest - 1)
        if seed is None or whole == 0 or self._heads[0] > self._heads[1]:  # no shift wanted, or possible
            self._count, self._heads = whole + (rest > 0), (length, length)

    def __len__(self) -> int:
        return self._count

    def _head(self, epoch: int) -> int:
        """New targets in the first window of an epoch."""
        low, high = self._heads
        return low if low == high else int(random_state(self._seed, epoch).randint(low, high + 1))

    def take(self, epoch: int, rows_B: np.ndarray) -> Batch:
        """``inputs``, ``targets`` [B, T] int32 and ``weights`` [B, T] float32 of some rows; row -1 is all padding."""
        head, length, targets = self._head(epoch), self._length, self._targets
        first_B = np.where(rows_B > 0, head + (rows_B - 1) * length, 0)  # new targets of a window: first to last
        last_B = np.where(rows_B < 0, 0, np.minimum(head + rows_B * length, targets))
        at_BxT = np.maximum(np.minimum(first_B, targets - length), 0)[:, None] + np.arange(length)
        weights_BxT = (at_BxT >= first_B[:, None]) & (at_BxT < last_B[:, None])
        np.minimum(at_BxT, targets - 1, out=at_BxT)
        return {
            "inputs": self._stream[at_BxT].astype(np.int32),
            "targets": self._stream[at_BxT + 1].astype(np.int32),
            "weights": weights_BxT.astype(np.float32),
        }

    def report(self) -> dict[str, int | float]:
        return {"tokens": self._targets + 1, "windows": self._count}

    def notes(self) -> list[str]:
        return list(self._notes)


class PackedDocuments:
    """Whole documents side by side in rows, none seeing another: ``segment_ids`` numbers them from 1 in each row (0 is
    padding), ``positions`` counts from 0 in each.

    A document of n ids has n - 1 targets; one with more than ``length`` goes in pieces of ``length`` (counted as
    split), one with no target (an empty text) is left out and counted. Dialogues, of which only some tokens are
    learned, end after ``length`` instead (counted as cut), for a piece of one would begin without what it answers, and
    are left out where that leaves nothing to learn. Packed once, best fit of the longest first (Krell et al.,
    arXiv:2107.02027).
    """

    def __init__(self, encoded: EncodedDocuments, length: int, pad_id: int):
        """``length``: tokens in a row."""
        lengths = np.asarray(encoded.lengths)
        starts, targets = np.cumsum(lengths) - lengths, lengths - 1
        cut = np.zeros(len(lengths), bool)
        if encoded.learned is not None:
            cut, targets = targets > length, np.minimum(targets, length)
            learned = count_learned(encoded.learned, starts + 1, targets)
            targets[learned == 0] = 0
        n_pieces = -(-targets // length)
        piece = np.arange(n_pieces.sum()) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
        starts = np.repeat(starts, n_pieces) + piece * length
        sizes = np.minimum(np.repeat(targets, n_pieces) - piece * length, length)
        if not len(sizes):
            raise UserError(
                "no document has two tokens; a language model needs at least two" if encoded.learned is None else
                f"no dialogue has a reply within {length} tokens; raise data.seq_len"
            )
        row_of, self._count = _best_fit(sizes, length)
        order = np.argsort(row_of, kind="stable")
        self._ids, self._learned, self._notes = encoded.ids, encoded.learned, encoded.notes
        self._length, self._pad_id = length, pad_id
        self._starts, self._sizes, row_of = starts[order], sizes[order], row_of[order]
        self._first = np.searchsorted(row_of, np.arange(self._count + 1))  # of the pieces of a row
        before = np.cumsum(self._sizes) - self._sizes
        self._offsets = before - before[self._first[row_of]]  # of a piece in its row
        kind = {}
        if encoded.learned is not None:
            kind = {"cut": int((cut & (targets > 0)).sum()), "learned": int(learned.sum())}
        self._report = {
            "documents": len(lengths), "empty": int((targets < 1).sum()), "split": int((n_pieces > 1).sum()),
            "tokens": int(np.sum(lengths)), **kind, "rows": self._count,
            "efficiency": float(sizes.sum() / (self._count * length)),
        }

    def __len__(self) -> int:
        return self._count

    def take(self, epoch: int, rows_B: np.ndarray) -> Batch:
        """``inputs``, ``targets``, ``segment_ids``, ``positions`` [B, T] int32 and ``weights`` [B, T] float32 of some
        rows; row -1 is all padding. Every epoch has the same rows."""
        n_B = np.where(rows_B < 0, 0, self._first[rows_B + 1] - self._first[rows_B])
        number_P = _within(n_B)  # of a piece in its row
        row_P = np.repeat(np.arange(len(rows_B)), n_B)
        piece_P = self._first[rows_B][row_P] + number_P
        size_P = self._sizes[piece_P]
        position_N = _within(size_P)
        where_N = np.repeat(row_P * self._length + self._offsets[piece_P], size_P) + position_N
        at_N = np.repeat(self._starts[piece_P], size_P) + position_N

        def spread(values_N: np.ndarray | float, fill: float = 0, dtype: type = np.int32) -> np.ndarray:
            out = np.full((len(rows_B), self._length), fill, dtype)
            out.reshape(-1)[where_N] = values_N
            return out

        return {
            "inputs": spread(self._ids[at_N], self._pad_id), "targets": spread(self._ids[at_N + 1], self._pad_id),
            "weights": spread(1 if self._learned is None else self._learned[at_N + 1], 0, np.float32),
            "segment_ids": spread(np.repeat(number_P + 1, size_P)), "positions": spread(position_N),
        }

    def report(self) -> dict[str, int | float]:
        return dict(self._report)

    def notes(self) -> list[str]:
        notes = list(self._notes)
        if empty := self._report["empty"]:
            why = "empty" if self._learned is None else f"without a reply within {self._length} tokens"
            notes.append(f"{empty:,} of {self._report['documents']:,} documents are {why} and are left out")
        if cut := self._report.get("cut"):
            notes.append(
                f"{cut:,} of {self._report['documents']:,} dialogues are longer than {self._length} tokens and are cut "
                "there; raise data.seq_len to keep them whole"
            )
        if split := self._report["split"]:
            notes.append(
                f"{split:,} of {self._report['documents']:,} documents are longer than {self._length} tokens and go in "
                "pieces; raise data.seq_len to keep them whole"
            )
        return notes


def count_learned(learned_N: np.ndarray, starts_D: np.ndarray, sizes_D: np.ndarray) -> np.ndarray:
    """How many tokens are learned among ``sizes_D`` of them from ``starts_D`` on, [D]. Starts ascend; what is on disk
    is read a little at a time."""
    found_D = np.zeros(len(starts_D), np.int64)
    for at in range(0, len(starts_D), _AT_A_TIME):
        start, size = starts_D[at : at + _AT_A_TIME], sizes_D[at : at + _AT_A_TIME]
        at_L = np.flatnonzero(learned_N[start[0] : start[-1] + max(size[-1], 0)]) + start[0]
        found_D[at : at + _AT_A_TIME] = np.searchsorted(at_L, start + size) - np.searchsorted(at_L, start)
    return found_D


def _within(counts: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]"""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each item, longest items first, each into the fullest row that can take it; and the number of rows."""
    row_of = np.empty(len(sizes), np.int64)
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space
    spaces = 0  # bit s: some row has s free
    n_rows = 0
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces ^= 1 << space
        else:
            space, row, n_rows = capacity, n_rows, n_rows + 1
        row_of[item] = row
        if space > size:
            rows_with[space - size].append(row)
            spaces |= 1 << (space - size)
    return row_of, n_rows
