"""Long texts in chunks that can be encoded or counted one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_PIECE = 1 << 16  # characters


def text_chunks(text: str, size: int = _PIECE) -> Iterator[str]:
    """Cuts a text into consecutive pieces of at least ``size`` characters, always just before a newline that follows
    something other than white space.

    There every word ends, and so does every match of GPT-2's pre-tokenizer: its pattern takes white space only at the
    start of a word, and looks ahead only from white space. Encoding or counting piece by piece changes nothing.
    """
    start = 0
    while start < len(text):
        end = text.find("\n", start + size)
        while end > 0 and text[end - 1].isspace():
            end = text.find("\n", end + 1)
        if end < 0:
            end = len(text)
        yield text[start:end]
        start = end


def count_words_and_bytes(texts: Iterable[str]) -> tuple[int, int]:
    """(words, bytes) of some texts, for perplexity a word or byte: runs of non-white-space, and UTF-8 length."""
    words = n_bytes = 0
    for text in texts:
        for piece in text_chunks(text):
            words += len(piece.split())
            n_bytes += len(piece.encode())
    return words, n_bytes
