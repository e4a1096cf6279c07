"""Loaders make the batches of training and evaluation: random access by batch number, and a grain pipeline with a
prefetching thread.

Batch i is a pure function of (data, configuration, seed, i). Training repeats its data without end. Its position is one
number, the examples (windows, rows of documents, or pairs) that all processes together have consumed, so that a run can
be resumed with another number of processes. Evaluation is one pass in order that counts every example exactly once.
"""

from __future__ import annotations

import abc
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence

import grain
import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.batch import Batch
from jaxlm.data.batches.bitext import SentencePairs
from jaxlm.data.batches.buckets import BucketShapes, EpochPlan
from jaxlm.data.batches.encoding import EncodedDocuments
from jaxlm.data.batches.mixture import MixedRows
from jaxlm.data.batches.packing import PackedDocuments, Windows
from jaxlm.data.batches.preferences import PreferencePairs
from jaxlm.data.batches.shuffle import ShuffledOrder
from jaxlm.data.batches.token_cache import encode_cached
from jaxlm.data.config import DataConfig
from jaxlm.data.sources.types import Bitext, Dialogues, Mixture, Preferences, Source
from jaxlm.data.tokenizers.tokenizer import Tokenizer


def make_loader(
    config: DataConfig, source: Source, tokenizer: Tokenizer, *, train: bool,
    process_index: int = 0, process_count: int = 1, row_multiple: int = 1,
) -> Loader:
    """The loader of a source: sentence pairs for translation, rows of tokens for language modelling (in which dialogues
    are packed as documents are), and pairs of replies for preferences.

    Args:
        config: batch shape, packing, prefetch and seed.
        source: what to read.
        tokenizer: encodes the source.
        train: whether batches are shuffled and endless; otherwise they are one pass in order.
        process_index: which shard of the rows of each batch this process gets.
        process_count: the number of shards.
        row_multiple: the rows of every batch are a multiple of it: the devices and micro-batches that share them.

    Raises:
        UserError: when sizes are not positive, when ``batch_size`` cannot be shared evenly, or when the source or the
            tokenizer is of the wrong kind.
    """
    if config.seed < 0:
        raise UserError(f"data.seed is {config.seed}; it must not be negative")
    seed = config.seed if train else None
    shard = (process_index, process_count)
    multiple = math.lcm(row_multiple, process_count)
    if isinstance(source, Bitext):
        shapes = BucketShapes(config.buckets, config.batch_tokens, extend=not train, multiple=multiple)
        pairs = SentencePairs(source, tokenizer, shapes, cache=config.cache)
        return PairLoader(pairs, seed, config.prefetch, *shard)
    if config.seq_len < 1 or config.batch_size < 1:
        raise UserError(f"data.seq_len {config.seq_len} and data.batch_size {config.batch_size} must both be positive")
    if config.batch_size % multiple:
        raise UserError(
            f"data.batch_size {config.batch_size} cannot be shared evenly by {multiple} devices, micro-batches or "
            "processes; make it a multiple"
        )
    sources = source.sources if isinstance(source, Mixture) else (source,)
    encoded, pad = [encode_cached(each, tokenizer, config.cache) for each in sources], tokenizer.pad_id or 0
    if isinstance(source, Preferences):
        preferences = PreferencePairs(encoded[0], config.seq_len, config.batch_size, pad)
        return PairLoader(preferences, seed, config.prefetch, *shard)
    if config.packing == "documents" or any(isinstance(each, Dialogues) for each in sources):
        parts = [PackedDocuments(each, config.seq_len, pad) for each in encoded]
    else:
        parts = [Windows.of_documents(each, config.seq_len, seed) for each in encoded]
    rows = MixedRows(parts, source, seed) if isinstance(source, Mixture) else parts[0]
    return RowLoader(rows, encoded, config.batch_size, config.seq_len, seed, config.prefetch, *shard)


class Loader(abc.ABC):
    """``batch(i)`` is batch i of this process; ``iterate`` prefetches batches in order.

    Attributes:
        shapes: the shapes (rows, length) of global batches that occur, shortest first.
        examples_per_epoch: of all processes together.
        batches_per_epoch: rounded up.
        train: whether batches are shuffled and endless; otherwise they are one pass in order.
    """

    shapes: list[tuple[int, int]]
    examples_per_epoch: int
    batches_per_epoch: int

    def __init__(self, seed: int | None, prefetch: int, process_index: int, process_count: int):
        self.train = seed is not None
        self._seed, self._prefetch = seed, prefetch
        self._shard, self._num_shards = process_index, process_count

    @abc.abstractmethod
    def batch(self, index: int) -> Batch:
        """This process's rows of global batch ``index``."""

    @abc.abstractmethod
    def examples_before(self, index: int) -> int:
        """The number of examples in all batches before ``index``, of all processes together."""

    @abc.abstractmethod
    def report(self) -> dict[str, int | float]:
        """Figures about the data: how much there is and how much is left out."""

    @abc.abstractmethod
    def notes(self) -> list[str]:
        """Sentences about the data that the user should see: what is left out, truncated or split."""

    @abc.abstractmethod
    def documents(self) -> Iterable[EncodedDocuments]:
        """All documents that batches are made of, for ``find_contamination``."""

    @abc.abstractmethod
    def _batch_near(self, examples: int) -> int:
        """The batch that follows ``examples`` examples, if a batch starts there."""

    def state(self, index: int) -> dict[str, int]:
        """The position to save in order to resume with batch ``index``."""
        return {"examples": self.examples_before(index)}

    def batch_at_examples(self, examples: int) -> int:
        """The batch that follows ``examples`` examples.

        Raises:
            UserError: when no batch starts there, because the data or the batch size has changed.
        """
        index = self._batch_near(examples)
        if self.examples_before(index) != examples:
            raise UserError(
                f"no batch starts after {examples:,} examples, where training stopped; keep its data and batch size"
            )
        return index

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Batches from ``start`` on: without end in training, to the end of the pass otherwise. The prefetching thread
        ends when the iterator is closed or garbage-collected."""
        stop = sys.maxsize if self.train else self.batches_per_epoch
        ahead = max(self._prefetch, 0)
        batches = iter(
            grain.MapDataset.range(start, stop)
            .map(self.batch)
            .to_iter_dataset(grain.ReadOptions(num_threads=min(ahead, 1), prefetch_buffer_size=ahead))
        )
        try:
            yield from batches
        finally:
            batches.close()


class RowLoader(Loader):
    """Batches of a fixed number of rows. In training, a batch may contain the end of an epoch and the start of the
    next; in evaluation, the last batch is filled up with rows of weight 0."""

    def __init__(
        self, rows: Windows | PackedDocuments | MixedRows, encoded: Sequence[EncodedDocuments], batch_size: int,
        length: int, seed: int | None, prefetch: int, process_index: int = 0, process_count: int = 1,
    ):
        super().__init__(seed, prefetch, process_index, process_count)
        self._rows, self._encoded, self._size = rows, encoded, batch_size
        self.shapes = [(batch_size, length)]
        self.examples_per_epoch = len(rows)
        self.batches_per_epoch = -(-len(rows) // batch_size)
        self._order = ShuffledOrder(len(rows), seed) if self.train else None

    def batch(self, index: int) -> Batch:
        rows = self._size // self._num_shards
        first = index * self._size + self._shard * rows
        example_B = np.arange(first, first + rows)
        if not self.train:
            return self._rows.take(0, np.where(example_B < len(self._rows), example_B, -1))
        epoch_B, place_B = np.divmod(example_B, len(self._rows))
        parts = [
            self._rows.take(epoch, self._order(epoch, place_B[epoch_B == epoch]))
            for epoch in range(epoch_B[0], epoch_B[-1] + 1)
        ]
        return parts[0] if len(parts) == 1 else {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def examples_before(self, index: int) -> int:
        return index * self._size if self.train else min(index * self._size, len(self._rows))

    def _batch_near(self, examples: int) -> int:
        return -(-examples // self._size)

    def report(self) -> dict[str, int | float]:
        return self._rows.report()

    def notes(self) -> list[str]:
        return self._rows.notes()

    def documents(self) -> Iterable[EncodedDocuments]:
        return self._encoded


class PairLoader(Loader):
    """Batches of sentence pairs, or of pairs of replies, in buckets of lengths."""

    def __init__(
        self, pairs: SentencePairs | PreferencePairs, seed: int | None, prefetch: int, process_index: int = 0,
        process_count: int = 1,
    ):
        super().__init__(seed, prefetch, process_index, process_count)
        self._pairs = pairs
        self.shapes = pairs.shapes
        self.examples_per_epoch = len(pairs)
        self._plan = functools.lru_cache(maxsize=2)(self._plan)
        self.batches_per_epoch = len(self._plan(0).bucket)

    def _plan(self, epoch: int) -> EpochPlan:
        return self._pairs.plan(self._seed, epoch)

    def batch(self, index: int) -> Batch:
        epoch, k = divmod(index, self.batches_per_epoch)
        return self._pairs.batch(self._plan(epoch), k, self._shard, self._num_shards)

    def examples_before(self, index: int) -> int:
        epoch, k = divmod(index, self.batches_per_epoch)
        return epoch * self.examples_per_epoch + int(self._plan(epoch).starts[k])

    def _batch_near(self, examples: int) -> int:
        epoch, rest = divmod(examples, self.examples_per_epoch)
        return epoch * self.batches_per_epoch + int(np.searchsorted(self._plan(epoch).starts, rest))

    def report(self) -> dict[str, int | float]:
        return self._pairs.report()

    def notes(self) -> list[str]:
        return self._pairs.notes()

    def documents(self) -> Iterable[EncodedDocuments]:
        return self._pairs.documents()
