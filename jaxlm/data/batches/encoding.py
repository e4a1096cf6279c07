"""A source as token ids: documents end to end, and which of their tokens are to be learned."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.batches.dialogue_encoder import DialogueEncoder
from jaxlm.data.sources.jsonl import JsonlRows, RowError
from jaxlm.data.sources.types import Bitext, Dialogues, Documents, Mixture, Preferences, Source, Tokens
from jaxlm.data.tokenizers.tokenizer import Tokenizer

_CHARACTERS = 1 << 22  # of texts encoded at a time
_DIALOGUES = 1 << 10


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents as ids; of preferences two for each row, the preferred one first.

    Attributes:
        ids: [N], end to end, of any integer type.
        lengths: [D] of documents.
        learned: [N] bool, the tokens to be predicted; None: all.
        notes: sentences about rows that were left out.
    """

    ids: np.ndarray
    lengths: np.ndarray
    learned: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def joined(cls, parts: Iterable[EncodedDocuments], notes: Iterable[str] = ()) -> EncodedDocuments:
        parts = list(parts)
        learned = None if parts[0].learned is None else np.concatenate([part.learned for part in parts])
        ids, lengths = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "lengths"))
        return cls(ids, lengths, learned, tuple(notes))


def encode_documents(source: Source, tokenizer: Tokenizer) -> EncodedDocuments:
    """A source of a language model as ids: documents each followed by eos, a text file as the one that it is, given ids
    cut after each eos, dialogues up to their last token to be learned.

    UserError for sentence pairs, for ids outside the vocabulary, for no text at all, and for documents if the tokenizer
    has no eos.
    """
    if isinstance(source, Bitext):
        raise UserError(
            f"{source.spec!r} is sentence pairs; a language model reads text:, jsonl:, tokens:, chat: or instruct:"
        )
    if isinstance(source, Mixture):
        raise UserError(f"{source.spec!r} is a mixture; give one of its sources")
    if isinstance(source, Tokens):
        return _given(source, tokenizer)
    parts = list(encode_in_chunks(source, tokenizer))
    check_not_empty(source, parts)
    rows = source.texts if isinstance(source, Documents) else source.rows
    return EncodedDocuments.joined(parts, rows.notes() if isinstance(rows, JsonlRows) else ())


def check_not_empty(source: Documents | Dialogues | Preferences, parts: Iterable[EncodedDocuments]) -> None:
    """UserError where nothing is left of a source."""
    ends = isinstance(source, Documents) and source.ends
    if not any(len(part.ids) > ends * len(part.lengths) for part in parts):
        raise UserError(f"{source.spec!r} holds no text; name a file with documents in it")


def encode_in_chunks(source: Documents | Dialogues | Preferences, tokenizer: Tokenizer) -> Iterator[EncodedDocuments]:
    """The documents of a source in order, some at a time, in memory that does not grow with it."""
    if isinstance(source, Documents):
        return _texts(source, tokenizer)
    return _dialogues(source, tokenizer)


def _texts(source: Documents, tokenizer: Tokenizer) -> Iterator[EncodedDocuments]:
    if source.ends and tokenizer.eos_id is None:
        raise UserError(f"the tokenizer has no eos token to end the documents of {source.spec!r} with; use another")
    for texts in _batches(source.texts):
        ids, lengths = tokenizer.encode_flat(texts)
        if source.ends:
            ids, lengths = np.insert(ids, np.cumsum(lengths), tokenizer.eos_id), lengths + 1
        yield EncodedDocuments(ids, lengths)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text) + 64
        if size > _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _dialogues(source: Dialogues | Preferences, tokenizer: Tokenizer) -> Iterator[EncodedDocuments]:
    encoder, dtype = DialogueEncoder(tokenizer), tokenizer.vocabulary.id_dtype
    paired = isinstance(source, Preferences)

    def encoded() -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        for number, row in source.rows.numbered():
            try:
                yield [encoder(dialogue) for dialogue in (row if paired else (row,))]
            except RowError as error:
                source.rows.reject(number, error)

    rows = encoded()
    while some := list(itertools.chain.from_iterable(itertools.islice(rows, _DIALOGUES))):
        ids, learned = (np.concatenate(part) for part in zip(*some, strict=True))
        yield EncodedDocuments(ids.astype(dtype), np.array([len(part) for part, _ in some]), learned)


def _given(source: Tokens, tokenizer: Tokenizer) -> EncodedDocuments:
    ids = source.ids
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= tokenizer.vocab_size:
        raise UserError(
            f"{source.spec!r} holds the id {low if low < 0 else high}, and the tokenizer has "
            f"{tokenizer.vocab_size:,} tokens; name the tokenizer that made the ids"
        )
    ends = np.flatnonzero(ids == tokenizer.eos_id) + 1 if tokenizer.eos_id is not None else []
    return EncodedDocuments(ids, np.diff(np.unique([0, *ends, len(ids)])))
