"""The text of tokens as they come: only what no later token can change, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

_CONTEXT = 8  # tokens of the prompt that decide how the first of the text are written
_MOST_HELD = 8  # tokens that may wait for the rest of a character: one has four bytes at most
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """One text. Each piece is decoded together with the one before it, which decides about spaces between them."""

    def __init__(self, tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-_CONTEXT:])
        self._begin, self._end = 0, len(self._ids)  # of the piece before
        self._held = ""  # what may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """What is certain of the text now and was not before. Sets ``stopped`` where a stop string was found."""
        self._ids.append(token)
        return self._cut(self._decoded(last=False), last=False)

    def finish(self) -> str:
        """What was held back."""
        return "" if self.stopped else self._cut(self._decoded(last=True), last=True)

    def _decoded(self, last: bool) -> str:
        if self._end == len(self._ids):
            return ""
        decode = self._tokenizer.decode
        before, whole = decode(self._ids[self._begin : self._end]), decode(self._ids[self._begin :])
        if whole.endswith(_INCOMPLETE) and not last and len(self._ids) - self._end < _MOST_HELD:
            return ""
        new = whole[len(before) :] if whole.startswith(before) else decode(self._ids[self._end :])
        if new:  # tokens that are not text decide nothing
            self._begin, self._end = self._end, len(self._ids)
            del self._ids[: self._begin]
            self._begin, self._end = 0, self._end - self._begin
        return new

    def _cut(self, new: str, last: bool) -> str:
        text = self._held + new
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning, and not all, of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
