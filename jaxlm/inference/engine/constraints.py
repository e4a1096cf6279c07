"""Output that matches a JSON schema, a regular expression or a choice of texts, by the library llguidance.

A constraint is compiled once: all continuations share its grammar, and the grammars used last are kept. What one of
them may cost in a step is limited here; what compiling costs in all is limited by ``serving.grammars``.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.core.errors import UserError

if TYPE_CHECKING:
    from jaxlm.data.tokenizers.tokenizer import Tokenizer

__all__ = ["Constraint", "Grammar", "GrammarCompiler", "Matcher"]

_MAX_KEPT = 16  # grammars that are kept
_MAX_KEPT_BYTES = 1 << 17  # of their sources together; a grammar takes up to 400 times its source
MAX_FORCED = 1024  # characters of forced text that are tokenized in a step; only the first token of them is used
LIMITS = {  # of ``llguidance.LLParserLimits``: about a tenth of its own, so that no step is long
    "initial_lexer_fuel": 500_000, "step_lexer_fuel": 50_000, "step_max_items": 20_000, "max_lexer_states": 10_000,
    "max_grammar_size": 100_000, "verbose_errors": False,
}


@dataclass(frozen=True)
class Constraint:
    """A form that the text must have. Exactly one of the three fields is set.

    ``json`` is a JSON schema (``{"type": "object"}`` allows any object), ``regex`` a regular expression that the whole
    text matches, ``choice`` the texts to choose from.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises:
            UserError: unless exactly one field is set.
        """
        if sum((self.json is not None, self.regex is not None, bool(self.choice))) != 1:
            raise UserError("a constraint has either json (a schema), or regex, or choice (texts): set exactly one")


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
            raise UserError(f"the constraint cannot be followed: {one_line(error)}")


class Grammar:
    """A compiled constraint, from ``GrammarCompiler.compile``."""

    def __init__(self, bitmasks: ModuleType, matcher: Any, vocab_size: int):
        self._bitmasks, self._matcher, self._vocab_size = bitmasks, matcher, vocab_size

    def matcher(self) -> Matcher:
        """A matcher at the beginning of a text. All matchers of a grammar share its tables."""
        return Matcher(self._bitmasks, self._matcher.deep_copy(), self._vocab_size)


class GrammarCompiler:
    """Compiles constraints for the tokens of a model; any thread may call it.

    The vocabulary is read at the first constraint. The grammars that were used last are kept, at most 16 of them and
    those of 128 KiB of constraints.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: tuple[int, ...]):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_ids = [token for token in eos_ids if 0 <= token < vocab_size]
        self._kept: OrderedDict[str, Grammar] = OrderedDict()  # by source, the last used last
        self._lock = threading.Lock()

    @cached_property
    def _library(self) -> tuple[ModuleType, ModuleType]:
        try:
            return importlib.import_module("llguidance"), importlib.import_module("llguidance.numpy")
        except ModuleNotFoundError:
            raise UserError("constraints need llguidance: pip install 'jaxlm[serve]'") from None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens as llguidance wants them.

        Raises:
            UserError: when the model has no tokenizer or no end token.
        """
        if self._tokenizer is None:
            raise UserError("constraints need a tokenizer: put a tokenizer.json beside the model's config.json")
        if not self._eos_ids:
            raise UserError("constraints need an end token, and the model's eos_id is not in its vocabulary")
        return Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)

    @cached_property
    def _tokens(self) -> Any:
        library, _ = self._library
        return library.LLTokenizer(library.TokenizerWrapper(self.vocabulary), eos_token=self._eos_ids)

    def source(self, constraint: Constraint) -> str:
        """The text that llguidance compiles: equal constraints have equal ones.

        Raises:
            UserError: when the constraint is not one, or its schema is not JSON.
        """
        constraint.check()
        kinds = self._library[0].LLMatcher
        try:
            if constraint.json is not None:
                # No spaces between JSON tokens: a small model that may write any number of them writes nothing else.
                return kinds.grammar_from_json_schema(_schema(constraint.json), {"whitespace_flexible": False})
            if constraint.regex is not None:
                return kinds.grammar_from_regex(constraint.regex)
            return kinds.grammar_from_lark("start: " + " | ".join(map(json.dumps, constraint.choice)))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"the constraint cannot be used: {one_line(error)}") from None

    def kept(self, source: str) -> Grammar | None:
        """The grammar of a source if it is kept."""
        with self._lock:
            if (grammar := self._kept.get(source)) is not None:
                self._kept.move_to_end(source)
            return grammar

    def compile(self, constraint: Constraint | str) -> Grammar:
        """The grammar of a constraint, or of its ``source``.

        Raises:
            UserError: when the constraint is not valid, uses what llguidance does not support, or allows no text.
        """
        source = constraint if isinstance(constraint, str) else self.source(constraint)
        if (grammar := self.kept(source)) is not None:
            return grammar
        library, bitmasks = self._library
        matcher = library.LLMatcher(self._tokens, source, log_level=0, limits=library.LLParserLimits(**LIMITS))
        if not (error := matcher.get_error()):
            first = matcher.deep_copy()  # it remembers all text that must come; the one that is kept does not
            bitmasks.fill_next_token_bitmask(first, bitmasks.allocate_token_bitmask(1, self._vocab_size))
            error = first.get_error()
        if error:
            raise UserError(refusal(error))
        grammar = Grammar(bitmasks, matcher, self._vocab_size)
        with self._lock:
            self._kept[source] = grammar
            while len(self._kept) > _MAX_KEPT or sum(map(len, self._kept)) > _MAX_KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return grammar


class Vocabulary:
    """The tokenizer as llguidance wants it: the bytes of every token."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int]):
        self._tokenizer = tokenizer
        self.eos_token_id, self.eos_token_ids, self.bos_token_id = eos_ids[0], eos_ids, tokenizer.bos_id
        found = tokenizer.vocabulary.token_bytes()
        self.special_token_ids = [i for i in range(vocab_size) if i >= len(found) or found[i] is None]
        self.tokens = [
            b"<%d>" % i if i >= len(found) or found[i] is None else found[i] for i in range(vocab_size)
        ]

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that must come next; of a long one, of its beginning."""
        return self._tokenizer.encode(text[:MAX_FORCED])


def refusal(error: str) -> str:
    """What to say of a constraint that llguidance refuses with ``error``."""
    if "NoExtension" in error:
        return "the constraint allows no text: give a schema that something matches, and that does not contain itself"
    return f"the constraint cannot be used: {one_line(error)}"


def _schema(schema: Mapping[str, Any] | str) -> str:
    if not isinstance(schema, str):
        return json.dumps(dict(schema))
    try:
        return json.dumps(json.loads(schema))
    except json.JSONDecodeError as error:
        raise UserError(f"the JSON schema is not JSON: {error}") from None


def one_line(error: object) -> str:
    """An error of the library, without the state that it may print."""
    return " ".join(str(error).replace("<non-verbose/>", "").split())[:300]
