"""Turns tokens into text as they come: only text that no later token can change, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxlm.data.tokenizers.tokenizer import Tokenizer

__all__ = ["Detokenizer"]

_CONTEXT = 8  # tokens of the prompt that decide how the first new ones are written
_MAX_HELD = 8  # tokens that may wait for the rest of a character, which has four bytes at most
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """The text of one continuation.

    Each piece is decoded together with the piece before it, because that decides about the space between them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-_CONTEXT:])
        self._begin, self._end = 0, len(self._ids)  # the piece before
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became final with this token. Sets ``stopped`` when a stop string was found."""
        self._ids.append(token)
        return self._release(self._decode_new(last=False), last=False)

    def finish(self) -> str:
        """The text that was held back; no token follows."""
        return "" if self.stopped else self._release(self._decode_new(last=True), last=True)

    def _decode_new(self, last: bool) -> str:
        """The text after the piece before; empty while its last character may be incomplete."""
        if self._end == len(self._ids):
            return ""
        decode = self._tokenizer.decode
        before, whole = decode(self._ids[self._begin : self._end]), decode(self._ids[self._begin :])
        if whole.endswith(_INCOMPLETE) and not last and len(self._ids) - self._end < _MAX_HELD:
            return ""
        new = whole[len(before) :] if whole.startswith(before) else decode(self._ids[self._end :])
        if new:  # tokens without text do not become the piece before
            self._begin, self._end = self._end, len(self._ids)
            del self._ids[: self._begin]
            self._begin, self._end = 0, self._end - self._begin
        return new

    def _release(self, new: str, last: bool) -> str:
        """The text before a stop string, and before what may become one."""
        text = self._held + new
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that is a beginning of a stop string, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
