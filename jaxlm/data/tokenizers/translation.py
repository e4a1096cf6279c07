"""Sentences as the encoder and decoder of a translation model read them: with the end token and a language code."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.backends import TokenizerBackend
from jaxlm.data.tokenizers.languages import LanguageCodes
from jaxlm.data.tokenizers.text_encoder import TextEncoder


class SentenceEncoder:
    """Adds what a translation model reads around a sentence."""

    def __init__(self, backend: TokenizerBackend, text: TextEncoder, languages: LanguageCodes, eos_id: int | None):
        self._backend, self._text, self._languages, self._eos_id = backend, text, languages, eos_id

    def encode(self, texts: Sequence[str], language: str | None, *, target: bool) -> list[list[int]]:
        """The ids of each sentence with the end token, and with the code of its language where the model has several.

        Args:
            texts: the sentences.
            language: the code of their language; None: the default of ``LanguageCodes``.
            target: whether they are in the language translated into.

        Raises:
            UserError: when the tokenizer has no end token, does not have the language, or has several languages and
                none was named.
        """
        texts = list(texts)
        if not self._languages:
            if language is not None:
                self._languages.id_of(language)  # raises
            framed = self._backend.encode_framed(texts)
            rows = None if framed is None else [list(row) for row in framed]
            # A frame without the end token is that of a decoder's prompt; sources and targets end with it.
            if rows is not None and all(row and row[-1] == self._eos_id for row in rows):
                return rows
        ids = self._text.encode(texts, target)
        if self._eos_id is None:
            raise UserError("the tokenizer has no eos token to end a sentence with; use another")
        if not self._languages:
            return [[*row, self._eos_id] for row in ids]
        default = self._languages.default_target if target else self._languages.default_source
        code = self._languages.id_of(language or default)
        before = self._languages.code_before_text
        return [[code, *row, self._eos_id] if before else [*row, self._eos_id, code] for row in ids]
