"""Encodes sources as token ids: documents end to end, and which of their tokens the model is trained to predict."""

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

_BATCH_CHARACTERS = 1 << 22  # of texts encoded at a time
_TEXT_OVERHEAD = 64  # characters that a text counts for in addition to its own
_BATCH_ROWS = 1 << 10  # of dialogues encoded at a time


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents as ids. Of preferences there are two documents for each row, the preferred one first.

    Attributes:
        ids: [N] of any integer type, the documents end to end.
        lengths: [D], the number of ids of each document; they sum to N.
        loss_mask: [N] bool, the tokens that the model is trained to predict; None: all.
        notes: sentences about rows that were left out.
        first_token: what the model reads before each document and each window, and is not trained on; empty: nothing.
            Documents of text begin with it.
    """

    ids: np.ndarray
    lengths: np.ndarray
    loss_mask: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    first_token: tuple[int, ...] = ()

    @classmethod
    def concatenate(cls, parts: Iterable[EncodedDocuments], notes: Iterable[str] = ()) -> EncodedDocuments:
        """The documents of several parts, in order."""
        parts = list(parts)
        loss_mask = None if parts[0].loss_mask is None else np.concatenate([part.loss_mask for part in parts])
        ids, lengths = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "lengths"))
        return cls(ids, lengths, loss_mask, tuple(notes), parts[0].first_token)


def encode_documents(source: Source, tokenizer: Tokenizer) -> EncodedDocuments:
    """A source of a language model as ids.

    Each document begins with the first token, unless ``source.first_token`` is "never", and is followed by eos; a text
    file is one document without eos; a stream of given ids is cut after each eos; dialogues end with the last token
    that the model is trained on.

    Raises:
        UserError: when the source is sentence pairs or a mixture, when it holds no text, when given ids are outside the
            vocabulary, or when documents need an eos token that the tokenizer does not have.
    """
    if isinstance(source, Bitext):
        raise UserError(
            f"{source.spec!r} is sentence pairs; a language model reads text:, jsonl:, tokens:, chat: or instruct:"
        )
    if isinstance(source, Mixture):
        raise UserError(f"{source.spec!r} is a mixture; give one of its sources")
    if isinstance(source, Tokens):
        return _encode_tokens(source, tokenizer)
    parts = list(encode_in_chunks(source, tokenizer))
    check_not_empty(source, parts)
    rows = source.texts if isinstance(source, Documents) else source.rows
    return EncodedDocuments.concatenate(parts, rows.notes() if isinstance(rows, JsonlRows) else ())


def check_not_empty(source: Documents | Dialogues | Preferences, parts: Iterable[EncodedDocuments]) -> None:
    """Checks that documents hold anything besides eos.

    Raises:
        UserError: when they do not.
    """
    eos_tokens = 1 if isinstance(source, Documents) and source.append_eos else 0  # of each document
    if not any(len(part.ids) > eos_tokens * len(part.lengths) for part in parts):
        raise UserError(f"{source.spec!r} holds no text; name a file with documents in it")


def encode_in_chunks(source: Documents | Dialogues | Preferences, tokenizer: Tokenizer) -> Iterator[EncodedDocuments]:
    """The documents of a source in order, some at a time, in memory that does not grow with the source."""
    if isinstance(source, Documents):
        return _encode_texts(source, tokenizer)
    return _encode_dialogues(source, tokenizer)


def _encode_texts(source: Documents, tokenizer: Tokenizer) -> Iterator[EncodedDocuments]:
    if source.append_eos and tokenizer.eos_id is None:
        raise UserError(f"the tokenizer has no eos token to end the documents of {source.spec!r} with; use another")
    first = first_token_of(source, tokenizer)
    for texts in _batches(source.texts):
        ids, lengths = tokenizer.encode_flat(texts, source.parse_special)
        if source.append_eos:
            written = lengths > 0 if first else np.ones(len(lengths), bool)  # no end without a beginning
            ids, lengths = np.insert(ids, np.cumsum(lengths)[written], tokenizer.eos_id), lengths + written
        if first:
            ids, lengths = _begin_with(first, ids, lengths)
        yield EncodedDocuments(ids, lengths, first_token=first)


def first_token_of(source: Source, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What stands before each document and each window of a source. Dialogues begin as their template writes."""
    return tokenizer.first_token if getattr(source, "first_token", "never") == "auto" else ()


def _begin_with(first: tuple[int, ...], ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents with the first token before each that is not empty and does not spell it itself."""
    starts_D, size = np.cumsum(lengths) - lengths, len(first)
    at_DxP = np.minimum(starts_D[:, None] + np.arange(size), max(len(ids) - 1, 0))
    lacking = lengths > 0
    if len(ids):
        lacking &= (lengths < size) | (ids[at_DxP] != first).any(-1)
    return np.insert(ids, np.repeat(starts_D[lacking], size), np.tile(first, lacking.sum())), lengths + size * lacking


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text) + _TEXT_OVERHEAD
        if size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_dialogues(source: Dialogues | Preferences, tokenizer: Tokenizer) -> Iterator[EncodedDocuments]:
    encoder, dtype = DialogueEncoder(tokenizer, source.parse_special), tokenizer.vocabulary.id_dtype
    paired = isinstance(source, Preferences)

    def encoded() -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        for number, row in source.rows.numbered():
            try:
                yield [encoder(dialogue) for dialogue in (row if paired else (row,))]
            except RowError as error:
                source.rows.reject(number, error)

    rows = encoded()
    while batch := list(itertools.chain.from_iterable(itertools.islice(rows, _BATCH_ROWS))):
        ids, loss_mask = map(np.concatenate, zip(*batch, strict=True))
        yield EncodedDocuments(ids.astype(dtype), np.array([len(ids) for ids, _ in batch]), loss_mask)


def _encode_tokens(source: Tokens, tokenizer: Tokenizer) -> EncodedDocuments:
    ids = source.ids
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= tokenizer.vocab_size:
        raise UserError(
            f"{source.spec!r} holds the id {low if low < 0 else high}, and the tokenizer has "
            f"{tokenizer.vocab_size:,} tokens; name the tokenizer that made the ids"
        )
    ends = np.flatnonzero(ids == tokenizer.eos_id) + 1 if tokenizer.eos_id is not None else []
    lengths = np.diff(np.unique([0, *ends, len(ids)]))
    return EncodedDocuments(ids, lengths, first_token=first_token_of(source, tokenizer))
