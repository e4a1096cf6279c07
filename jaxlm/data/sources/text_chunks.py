"""Long texts in chunks that can be encoded or counted one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_CHUNK = 1 << 16  # characters


def text_chunks(text: str, size: int = _CHUNK) -> Iterator[str]:
    """Cuts a text into consecutive chunks of at least ``size`` characters, each time before a newline that does not
    follow white space.

    Every word ends there, and so does every match of GPT-2's pre-tokenizer, whose pattern takes white space only at the
    start of a word and looks ahead only from white space. So the tokens and the words of the chunks are those of the
    text.
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
    """(words, bytes) of some texts, for perplexity per word or byte. Words are runs of characters that are not white
    space; bytes are those of UTF-8."""
    words = n_bytes = 0
    for text in texts:
        for chunk in text_chunks(text):
            words += len(chunk.split())
            n_bytes += len(chunk.encode())
    return words, n_bytes
