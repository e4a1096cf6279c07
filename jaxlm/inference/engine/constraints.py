"""Output that matches a JSON schema, a regular expression or a choice of texts, by the library llguidance."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.inference.engine.requests import Constraint

if TYPE_CHECKING:
    from jaxlm.data.tokenizers.tokenizer import Tokenizer

__all__ = ["GrammarCompiler", "Matcher"]


class Matcher:
    """The position of one text in its grammar."""

    def __init__(self, bitmasks: ModuleType, matcher: Any, vocab_size: int):
        self._bitmasks, self._matcher = bitmasks, matcher
        self._allowed_1xW = bitmasks.allocate_token_bitmask(1, vocab_size)

    @property
    def allowed_W(self) -> np.ndarray:
        """The tokens that may come next, a bit each, as of the last ``prepare``: int32 ``[ceil(V / 32)]``."""
        return self._allowed_1xW[0]

    def prepare(self) -> None:
        """Computes which tokens may come next.

        Raises:
            UserError: when the library gives up on the grammar.
        """
        self._bitmasks.fill_next_token_bitmask(self._matcher, self._allowed_1xW)
        self._check()

    def consume(self, token: int) -> bool:
        """Moves on by a token. Returns whether the text is complete, so that nothing can follow.

        Raises:
            UserError: when the library gives up on the grammar.
        """
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if error := self._matcher.get_error():
            raise UserError(f"the constraint cannot be followed: {_one_line(error)}")


class GrammarCompiler:
    """Compiles constraints for the tokens of a model. The vocabulary is read at the first constraint."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: tuple[int, ...]):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_ids = [token for token in eos_ids if 0 <= token < vocab_size]

    @cached_property
    def _library(self) -> tuple[ModuleType, ModuleType]:
        try:
            return importlib.import_module("llguidance"), importlib.import_module("llguidance.numpy")
        except ModuleNotFoundError:
            raise UserError("constraints need llguidance: pip install 'jaxlm[serve]'") from None

    @cached_property
    def _tokens(self) -> Any:
        library, _ = self._library
        if self._tokenizer is None:
            raise UserError("constraints need a tokenizer: put a tokenizer.json beside the model's config.json")
        if not self._eos_ids:
            raise UserError("constraints need an end token, and the model's eos_id is not in its vocabulary")
        vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)
        return library.LLTokenizer(library.TokenizerWrapper(vocabulary), eos_token=self._eos_ids)

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of a text.

        Raises:
            UserError: when the constraint is not valid, or uses what llguidance does not support.
        """
        library, bitmasks = self._library
        kinds = library.LLMatcher
        if constraint.json is not None:
            # No spaces between JSON tokens: a small model that may write any number of them writes nothing else.
            grammar = kinds.grammar_from_json_schema(_schema(constraint.json), {"whitespace_flexible": False})
        elif constraint.regex is not None:
            grammar = kinds.grammar_from_regex(constraint.regex)
        else:
            grammar = kinds.grammar_from_lark("start: " + " | ".join(map(json.dumps, constraint.choice)))
        matcher = kinds(self._tokens, grammar, log_level=0)
        if error := matcher.get_error():
            raise UserError(f"the constraint cannot be used: {_one_line(error)}")
        return Matcher(bitmasks, matcher, self._vocab_size)


class _Vocabulary:
    """The tokenizer as llguidance wants it: the bytes of every token."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int]):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos_ids[0], tokenizer.bos_id
        found = tokenizer.vocabulary.token_bytes()
        self.special_token_ids = [i for i in range(vocab_size) if i >= len(found) or found[i] is None]
        self.tokens = [
            b"<%d>" % i if i >= len(found) or found[i] is None else found[i] for i in range(vocab_size)
        ]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _schema(schema: Mapping[str, Any] | str) -> str:
    if not isinstance(schema, str):
        return json.dumps(dict(schema))
    try:
        return json.dumps(json.loads(schema))
    except json.JSONDecodeError as error:
        raise UserError(f"the JSON schema is not JSON: {error}") from None


def _one_line(error: str) -> str:
    return " ".join(error.split())[:300]
