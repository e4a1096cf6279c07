"""Rows of tokens for language models: windows of one stream, or whole documents packed side by side.

A stream of N ids has N - 1 targets: each id but the first. Windows of ``length`` targets cover them. Every epoch
predicts each target exactly once, in windows that always hold ``length`` tokens if the stream has as many: where two
windows overlap, only one gives the target a weight. Where the tokenizer has a first token, every window begins with it,
each id is a target, and first tokens are none.

Both kinds have ``len()``, the rows of an epoch, and ``take(epoch, rows_B) -> Batch``, a pure function.
"""

from __future__ import annotations

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.batch import Batch
from jaxlm.data.batches.encoding import EncodedDocuments, encode_documents
from jaxlm.data.batches.first_token import FirstToken
from jaxlm.data.batches.shuffle import random_state
from jaxlm.data.sources.types import Dialogues, Preferences, Source
from jaxlm.data.tokenizers.tokenizer import Tokenizer

_DOCUMENTS = 1 << 16  # counted at a time


def token_stream(source: Source, tokenizer: Tokenizer) -> EncodedDocuments:
    """A source as one stream: its documents in order, each followed by eos; a text file has no eos.

    Raises:
        UserError: when the source is dialogues, and as ``encode_documents``.
    """
    if isinstance(source, Dialogues | Preferences):
        raise UserError(f"{source.spec!r} is dialogues; a stream of text is text:, jsonl: or tokens:")
    return encode_documents(source, tokenizer)


class Windows:
    """Windows of one stream.

    Without ``seed``, the first window starts at the first target, and all epochs are the same. With ``seed``, the first
    window of an epoch covers a random number of targets (one of at least about ``length / 2`` numbers), so that windows
    begin at other places in each epoch. The number of windows is the same in every epoch.
    """

    def __init__(
        self, stream: np.ndarray, length: int, seed: int | None = None, notes: tuple[str, ...] = (),
        first_token: FirstToken | None = None,
    ):
        """
        Args:
            stream: ids [N], with at least one target.
            length: tokens of a window.
            seed: of the places where windows begin.
            notes: sentences about rows that were left out of the stream.
            first_token: of the stream's documents, which begins every window; None: nothing does.

        Raises:
            UserError: when the stream is a single token, or windows have room for the first token only.
        """
        first = self._first = FirstToken((), stream) if first_token is None else first_token
        if len(stream) <= first.begin:
            raise UserError("the text is a single token; a language model needs at least two")
        self._stream, self._seed, self._notes = stream, seed, notes
        self._targets, length = len(stream) - first.begin, _num_targets(length, len(first))
        self._length = length  # targets of a window
        whole, rest = divmod(self._targets, length)
        if 2 * rest < length:  # the first and the last window share length + rest targets
            self._count, self._heads = whole + 1, (max(rest, 1), min(length, length + rest - 1))
        else:  # the first and the last window share rest targets
            self._count, self._heads = whole + 2, (1, rest - 1)
        if seed is None or whole == 0 or self._heads[0] > self._heads[1]:  # no shift is wanted, or none is possible
            self._count, self._heads = whole + (rest > 0), (length, length)

    @classmethod
    def of_documents(cls, encoded: EncodedDocuments, length: int, seed: int | None = None) -> Windows:
        """Windows of documents end to end."""
        first = FirstToken(encoded.first_token, encoded.ids, encoded.lengths)
        return cls(encoded.ids, length, seed, encoded.notes, first)

    def __len__(self) -> int:
        return self._count

    def _head(self, epoch: int) -> int:
        """Targets that the first window of an epoch covers."""
        low, high = self._heads
        return low if low == high else int(random_state(self._seed, epoch).randint(low, high + 1))

    def take(self, epoch: int, rows_B: np.ndarray) -> Batch:
        """Some windows of an epoch: ``inputs``, ``targets`` int32 and ``weights`` float32, each [B, T]. Row -1 is all
        padding."""
        head, length, targets = self._head(epoch), self._length, self._targets
        # A window covers the targets from first to last.
        first_B = np.where(rows_B > 0, head + (rows_B - 1) * length, 0)
        last_B = np.where(rows_B < 0, 0, np.minimum(head + rows_B * length, targets))
        begin = self._first.begin
        at_B = np.maximum(np.minimum(first_B, targets - length), 0)
        at_B = self._first.skip(begin + at_B) - begin  # a window has its own first token
        at_BxT = at_B[:, None] + np.arange(length)
        weights_BxT = (at_BxT >= first_B[:, None]) & (at_BxT < last_B[:, None])
        at_BxT = begin + np.minimum(at_BxT, targets - 1)
        weights_BxT &= ~self._first.holds(at_BxT)
        batch = {
            "inputs": self._stream[np.maximum(at_BxT - 1, 0)].astype(np.int32),
            "targets": self._stream[at_BxT].astype(np.int32),
            "weights": weights_BxT.astype(np.float32),
        }
        return begin_rows(batch, self._first.ids)

    def report(self) -> dict[str, int | float]:
        return {"tokens": len(self._stream) - self._first.count(), "windows": self._count}

    def notes(self) -> list[str]:
        return list(self._notes)


def begin_rows(batch: Batch, first_P: np.ndarray) -> Batch:
    """Rows ``[B, T]`` of one window each, with the first token in place of the first input, and what more it has before
    that: ``[B, T + P - 1]``, or as they are where P is 0."""
    if not len(first_P):
        return batch
    batch["inputs"][:, 0] = first_P[-1]
    lead = {"inputs": first_P[:-1], "targets": first_P[1:], "weights": np.zeros(len(first_P) - 1, np.float32)}
    return {
        name: np.concatenate([np.tile(lead[name], (len(values), 1)), values], 1) for name, values in batch.items()
    }


def _num_targets(length: int, first: int) -> int:
    """The targets of a window of ``length`` tokens. ``first`` of them stand before the text, and the last predicts it.

    Raises:
        UserError: when there are none.
    """
    if length < first:
        raise UserError(f"rows of {length} tokens have no room behind the {first} that begin each; raise seq_len")
    return length - max(first - 1, 0)


class PackedDocuments:
    """Whole documents packed side by side in rows, so that none attends to another: ``segment_ids`` numbers the
    documents of a row from 1 (0 is padding), and ``positions`` counts from 0 in each document.

    A document of n ids has n - 1 targets, or n behind a first token, which begins each piece too. One with more than
    ``length`` targets is split into pieces of ``length``; one
    without targets (an empty text) is left out. A dialogue, in which the model is trained on some tokens only, is
    truncated after ``length`` targets instead, because a piece of a dialogue would begin without the prompt; it is left
    out if no such token remains. The report counts each of these cases.

    Documents are packed once, by best fit decreasing (Krell et al., arXiv:2107.02027).
    """

    def __init__(self, encoded: EncodedDocuments, length: int, pad_id: int):
        """
        Args:
            encoded: the documents.
            length: tokens of a row.
            pad_id: fills rows up.

        Raises:
            UserError: when no document remains.
        """
        lengths, first = np.asarray(encoded.lengths), encoded.first_token
        starts = np.cumsum(lengths) - lengths
        in_front = FirstToken(first, encoded.ids, lengths).skip(starts) - starts if first else 1
        starts, targets = starts + in_front, np.maximum(lengths - in_front, 0)
        self._first, columns = np.asarray(first, np.int32), length
        length = _num_targets(length, len(first))
        truncated = np.zeros(len(lengths), bool)
        if encoded.loss_mask is not None:
            truncated, targets = targets > length, np.minimum(targets, length)
            trained = count_trained(encoded.loss_mask, starts, targets)
            targets[trained == 0] = 0
        n_pieces = -(-targets // length)
        piece = np.arange(n_pieces.sum()) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
        starts = np.repeat(starts, n_pieces) + piece * length
        sizes = np.minimum(np.repeat(targets, n_pieces) - piece * length, length)
        if not len(sizes):
            raise UserError(
                "no document has two tokens; a language model needs at least two" if encoded.loss_mask is None else
                f"no dialogue has a reply within {length} tokens; raise data.seq_len"
            )
        sizes += columns - length  # tokens of a piece, from here on
        row_of, self._count = _best_fit(sizes, columns)
        order = np.argsort(row_of, kind="stable")
        self._ids, self._loss_mask, self._notes = encoded.ids, encoded.loss_mask, encoded.notes
        self._length, self._pad_id = columns, pad_id
        self._starts, self._sizes, row_of = starts[order], sizes[order], row_of[order]
        self._first_piece = np.searchsorted(row_of, np.arange(self._count + 1))  # of a row
        before = np.cumsum(self._sizes) - self._sizes
        self._offsets = before - before[self._first_piece[row_of]]  # of a piece in its row
        dialogues = {}
        if encoded.loss_mask is not None:
            dialogues = {"cut": int((truncated & (targets > 0)).sum()), "learned": int(trained.sum())}
        self._report = {
            "documents": len(lengths), "empty": int((targets < 1).sum()), "split": int((n_pieces > 1).sum()),
            "tokens": int(np.sum(lengths)), **dialogues, "rows": self._count,
            "efficiency": float(sizes.sum() / (self._count * columns)),
        }

    def __len__(self) -> int:
        return self._count

    def take(self, epoch: int, rows_B: np.ndarray) -> Batch:
        """Some rows: ``inputs``, ``targets``, ``segment_ids``, ``positions`` int32 and ``weights`` float32, each
        [B, T]. Row -1 is all padding. All epochs have the same rows."""
        n_B = np.where(rows_B < 0, 0, self._first_piece[rows_B + 1] - self._first_piece[rows_B])
        number_P = _count_within(n_B)  # of a piece in its row
        row_P = np.repeat(np.arange(len(rows_B)), n_B)
        piece_P = self._first_piece[rows_B][row_P] + number_P
        size_P = self._sizes[piece_P]
        position_N = _count_within(size_P)
        where_N = np.repeat(row_P * self._length + self._offsets[piece_P], size_P) + position_N
        lead = max(len(self._first) - 1, 0)  # targets of a piece that are first tokens
        at_N = np.repeat(self._starts[piece_P], size_P) + position_N - lead
        inputs_N, targets_N = self._ids[np.maximum(at_N - 1, 0)], self._ids[np.maximum(at_N, 0)]
        weights_N = np.ones(len(at_N)) if self._loss_mask is None else self._loss_mask[np.maximum(at_N, 0)]
        for column, id_ in enumerate(self._first):
            inputs_N = np.where(position_N == column, id_, inputs_N)
            targets_N = np.where(position_N == column - 1, id_, targets_N)
        weights_N = np.where(position_N < lead, 0, weights_N)

        def spread(values_N: np.ndarray, fill: float = 0, dtype: type = np.int32) -> np.ndarray:
            out = np.full((len(rows_B), self._length), fill, dtype)
            out.reshape(-1)[where_N] = values_N
            return out

        return {
            "inputs": spread(inputs_N, self._pad_id), "targets": spread(targets_N, self._pad_id),
            "weights": spread(weights_N, 0, np.float32),
            "segment_ids": spread(np.repeat(number_P + 1, size_P)), "positions": spread(position_N),
        }

    def report(self) -> dict[str, int | float]:
        return dict(self._report)

    def notes(self) -> list[str]:
        notes = list(self._notes)
        if empty := self._report["empty"]:
            why = "empty" if self._loss_mask is None else f"without a reply within {self._length} tokens"
            notes.append(f"{empty:,} of {self._report['documents']:,} documents are {why} and are left out")
        if truncated := self._report.get("cut"):
            notes.append(
                f"{truncated:,} of {self._report['documents']:,} dialogues are longer than {self._length} tokens and "
                "are truncated there; raise data.seq_len to keep them whole"
            )
        if split := self._report["split"]:
            notes.append(
                f"{split:,} of {self._report['documents']:,} documents are longer than {self._length} tokens and are "
                "split into pieces; raise data.seq_len to keep them whole"
            )
        return notes


def count_trained(loss_mask_N: np.ndarray, starts_D: np.ndarray, sizes_D: np.ndarray) -> np.ndarray:
    """How many tokens of each span the model is trained on, [D]. A span is ``sizes_D`` tokens from ``starts_D`` on;
    starts ascend. A mask on disk is read a little at a time."""
    found_D = np.zeros(len(starts_D), np.int64)
    for at in range(0, len(starts_D), _DOCUMENTS):
        start, size = starts_D[at : at + _DOCUMENTS], sizes_D[at : at + _DOCUMENTS]
        at_L = np.flatnonzero(loss_mask_N[start[0] : start[-1] + max(size[-1], 0)]) + start[0]
        found_D[at : at + _DOCUMENTS] = np.searchsorted(at_L, start + size) - np.searchsorted(at_L, start)
    return found_D


def _count_within(counts: np.ndarray) -> np.ndarray:
    """Counts from 0 in each group: group sizes [2, 3] give [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best fit decreasing: the longest item first, each into the fullest row that has space for it.

    Returns:
        the row of each item [items]; the number of rows.
    """
    row_of = np.empty(len(sizes), np.int64)
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space
    spaces = 0  # bit s is set where some row has the free space s
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
