"""Many texts to ids: long texts in chunks, in little memory, with errors that name what could not be encoded."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.sources.text_chunks import text_chunks
from jaxlm.data.tokenizers.backends import TokenizerBackend
from jaxlm.data.tokenizers.special_tokens import Spans, SpecialTokenFinder

_BATCH_CHARACTERS = 1 << 22  # encoded at a time: bounds the memory of the intermediate objects of ``tokenizers``
_TEXT_OVERHEAD = 64  # characters that a text counts for in addition to its own, because short texts also cost memory
_NAMED = 5  # unknown characters that an error names


class TextEncoder:
    """Encodes texts with a backend, without special tokens around them."""

    def __init__(self, backend: TokenizerBackend, specials: SpecialTokenFinder):
        self._backend, self._specials = backend, specials

    def encode(self, texts: Sequence[str], target: bool = False) -> list[list[int]]:
        """The ids of each text; ``target``: in the vocabulary of the language translated into.

        Raises:
            UserError: when a character tokenizer does not know a character.
        """
        try:
            return [list(ids) for ids in self._backend.encode(texts, target)]
        except Exception as error:
            raise self._explain(texts, error) from error

    def encode_flat(
        self, texts: Sequence[str], dtype: type[np.integer], parse_special: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end; ``parse_special``: with the special tokens that they spell.

        Returns:
            ids [N] of type ``dtype``; lengths [len(texts)] int64, which sum to N.

        Raises:
            UserError: when a character tokenizer does not know a character.
        """
        chunks, lengths = [np.zeros(0, dtype)], np.zeros(len(texts), np.int64)
        for batch, owners in self._batches(texts, parse_special):
            try:
                if parse_special:
                    encoded = [ids for ids, _ in self._backend.encode_parsing_special(batch)]
                else:
                    encoded = self._backend.encode(batch)
            except Exception as error:
                raise self._explain(batch, error) from error
            for owner, ids in zip(owners, encoded, strict=True):
                chunks.append(np.array(ids, dtype))
                lengths[owner] += len(chunks[-1])
        return np.concatenate(chunks), lengths

    def encode_parsing_special(self, text: str, literal: Spans = ()) -> tuple[list[int], Spans]:
        """The ids of a text with the special tokens that it spells, except in some spans, and the characters that each
        id covers.

        Raises:
            UserError: when a character tokenizer does not know a character, or the backend finds no special tokens.
        """
        try:
            if literal:
                ids, offsets = self._backend.encode_parsing_spans(text, self._specials.outside(text, literal))
            else:
                ids, offsets = next(iter(self._backend.encode_parsing_special([text])))
        except Exception as error:
            raise self._explain([text], error) from error
        return list(ids), offsets

    def _batches(self, texts: Sequence[str], parse_special: bool) -> Iterator[tuple[list[str], list[int]]]:
        """Groups of chunks, and for each chunk the index of the text it belongs to."""
        batch: list[str] = []
        owners: list[int] = []
        size = 0
        for owner, text in enumerate(texts):
            for chunk in self._chunks(text, parse_special):
                batch.append(chunk)
                owners.append(owner)
                size += len(chunk) + _TEXT_OVERHEAD
                if size > _BATCH_CHARACTERS:
                    yield batch, owners
                    batch, owners, size = [], [], 0
        if batch:
            yield batch, owners

    def _chunks(self, text: str, parse_special: bool) -> Iterable[str]:
        """A text in chunks that may be encoded one by one."""
        if not self._backend.encodes_chunks_apart or parse_special and not self._backend.special_tokens_are_exact:
            return (text,)
        if not parse_special:
            return text_chunks(text)
        return itertools.chain.from_iterable(map(text_chunks, self._specials.split(text)))

    def _explain(self, texts: Sequence[str], error: Exception) -> Exception:
        """The error to raise for texts that could not be encoded: a UserError if unknown characters are the reason."""
        unknown = self._backend.unknown_characters(texts)
        if not unknown:
            return error
        named = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in sorted(unknown)[:_NAMED])
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        return UserError(
            f"the character tokenizer does not know {named}{more}; train it on text that has them, or use bpe"
        )
