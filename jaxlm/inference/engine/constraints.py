"""Output that keeps to a JSON schema, a regular expression or a choice, over the library llguidance."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.inference.engine.requests import Constraint

__all__ = ["Grammars", "Matcher"]


class Matcher:
    """How far one text has come in its grammar."""

    def __init__(self, library, matcher, vocabulary: int):
        self._library, self._matcher = library, matcher
        self._allowed_1xW = library.allocate_token_bitmask(1, vocabulary)

    @property
    def allowed_W(self) -> np.ndarray:
        """int32: the bits of the tokens that may come next, as of the last ``prepare``."""
        return self._allowed_1xW[0]

    def prepare(self) -> None:
        """Finds out which tokens may come next. UserError as ``consume``."""
        self._library.fill_next_token_bitmask(self._matcher, self._allowed_1xW)
        self._check()

    def consume(self, token: int) -> bool:
        """Goes on by a token. Whether the text is complete, with nothing that could follow. UserError where the library
        gives up on the grammar."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if error := self._matcher.get_error():
            raise UserError(f"the constraint cannot be kept: {_line(error)}")


class Grammars:
    """Grammars over the tokens of a model. Reads the vocabulary when the first one is asked for."""

    def __init__(self, tokenizer, vocabulary: int, ends: tuple[int, ...]):
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._ends = [token for token in ends if 0 <= token < vocabulary]

    @cached_property
    def _library(self):
        try:
            return importlib.import_module("llguidance"), importlib.import_module("llguidance.numpy")
        except ModuleNotFoundError:
            raise UserError("constraints need llguidance: pip install 'jaxlm[serve]'") from None

    @cached_property
    def _tokens(self):
        library, _ = self._library
        if self._tokenizer is None:
            raise UserError("constraints need a tokenizer: put a tokenizer.json beside the model's config.json")
        if not self._ends:
            raise UserError("constraints need a token that ends a text, and the model's eos_id is none of its tokens")
        return library.LLTokenizer(
            library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocabulary, self._ends)), eos_token=self._ends
        )

    def matcher(self, constraint: Constraint) -> Matcher:
        """For a text that keeps to a constraint. UserError where it is none, or asks for what cannot be checked."""
        library, arrays = self._library
        kinds = library.LLMatcher
        if constraint.json is not None:
            # Without spaces between tokens: a small model that may write any number of them does nothing else.
            grammar = kinds.grammar_from_json_schema(_schema(constraint.json), {"whitespace_flexible": False})
        elif constraint.regex is not None:
            grammar = kinds.grammar_from_regex(constraint.regex)
        else:
            grammar = kinds.grammar_from_lark("start: " + " | ".join(map(json.dumps, constraint.choice)))
        matcher = kinds(self._tokens, grammar, log_level=0)
        if error := matcher.get_error():
            raise UserError(f"the constraint cannot be used: {_line(error)}")
        return Matcher(arrays, matcher, self._vocabulary)


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of every token."""

    def __init__(self, tokenizer, vocabulary: int, ends: list[int]):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos_id
        found = tokenizer.vocabulary.token_bytes()
        self.special_token_ids = [i for i in range(vocabulary) if i >= len(found) or found[i] is None]
        self.tokens = [
            b"<%d>" % i if i >= len(found) or found[i] is None else found[i] for i in range(vocabulary)
        ]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _schema(schema: Mapping[str, Any] | str) -> str:
    if not isinstance(schema, str):
        return json.dumps(dict(schema))
    try:
        return json.dumps(json.loads(schema))
    except json.JSONDecodeError as error:
        raise UserError(f"the JSON schema is no JSON: {error}") from None


def _line(error: str) -> str:
    return " ".join(error.split())[:300]
