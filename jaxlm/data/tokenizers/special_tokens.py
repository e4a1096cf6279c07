"""Special tokens that texts spell: where they are, and which of them a conversation spells in its messages.

A chat template writes special tokens around messages. A message may spell one too, and that is text: or else whoever
writes a message could end his turn and begin one of the system. So messages are protected before the template runs:
marks surround each special token that they spell. ``release`` takes the marks out again and says where they were.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxlm.core.errors import UserError

Spans = Sequence[tuple[int, int]]  # of a text: first character, end

# Code points that are no characters. A template still finds a special token between them, and splits a text there.
_BEFORE, _AFTER = "\ufdd2", "\ufdd3"


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as the chat template writes it.

    Attributes:
        text: the prompt.
        literal: the spans of special tokens that messages spell, which are text.
        spans: the spans that the caller asked about.
    """

    text: str
    literal: Spans = ()
    spans: Spans = ()


class SpecialTokenFinder:
    """Finds the special tokens of a tokenizer in texts: the leftmost first, and of those that begin at one character
    the longest."""

    def __init__(self, tokens: Iterable[str]):
        self._tokens = tuple(tokens)

    @cached_property
    def _any(self) -> str:
        return "|".join(map(re.escape, sorted(self._tokens, key=len, reverse=True))) or r"(?!)"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self._any)

    @cached_property
    def _protected(self) -> re.Pattern[str]:
        return re.compile(f"{_BEFORE}(?:{self._any}){_AFTER}")

    def first(self, text: str) -> str | None:
        """The first special token that a text spells; None if it spells none."""
        found = self._pattern.search(text)
        return None if found is None else found[0]

    def split(self, text: str) -> list[str]:
        """The stretches of a text before, between and after special tokens, and these themselves, in order."""
        parts, at = [], 0
        for found in self._pattern.finditer(text):
            parts += [text[at : found.start()], found[0]]
            at = found.end()
        return [*parts, text[at:]]

    def outside(self, text: str, literal: Spans) -> Spans:
        """The spans of the special tokens that a text spells, without those that overlap one of some spans."""
        return [
            found.span() for found in self._pattern.finditer(text)
            if not any(start < found.end() and found.start() < end for start, end in literal)
        ]

    def protect(self, value: Any) -> Any:
        """A copy of some data, such as messages, in which marks surround each special token that a string spells.

        Raises:
            UserError: when a string contains a mark.
        """
        if isinstance(value, str):
            for mark in (_BEFORE, _AFTER):
                if mark in value:
                    raise UserError(f"a message has a character that stands for none, U+{ord(mark):X}; take it out")
            return self._pattern.sub(lambda found: f"{_BEFORE}{found[0]}{_AFTER}", value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self.protect(item) for item in value]
        return value

    def release(self, text: str, spans: Spans = ()) -> ChatPrompt:
        """What a chat template wrote with protected messages, without the marks.

        Args:
            text: what it wrote.
            spans: of ``text``; the result has them where they are without the marks.
        """
        marks = [found.start() for found in re.finditer(f"[{_BEFORE}{_AFTER}]", text)]
        if not marks:
            return ChatPrompt(text, (), tuple(spans))
        literal = [(found.start() + 1, found.end() - 1) for found in self._protected.finditer(text)]

        def moved(span: tuple[int, int]) -> tuple[int, int]:
            return tuple(at - sum(mark < at for mark in marks) for at in span)

        plain = text.replace(_BEFORE, "").replace(_AFTER, "")
        return ChatPrompt(plain, tuple(map(moved, literal)), tuple(map(moved, spans)))
