"""The bytes that each token of a ``tokenizers.Tokenizer`` stands for."""

from __future__ import annotations

import json
import re

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(raw: tokenizers.Tokenizer) -> list[bytes | None]:
    """The bytes of each token, by id; None for special tokens and for ids that have no token. The space that some
    decoders drop at the start of a text is kept."""
    decoder = json.dumps(json.loads(raw.to_str())["decoder"])
    by_byte, fallback, spaced = ('"ByteLevel"' in decoder, '"ByteFallback"' in decoder, "\\u2581" in decoder)
    added = raw.get_added_tokens_decoder()
    vocabulary = raw.get_vocab(with_added_tokens=True)
    out: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    alphabet = _alphabet()
    for token, index in vocabulary.items():
        if index in added:
            out[index] = None if added[index].special else token.encode()
        elif by_byte and all(letter in alphabet for letter in token):
            out[index] = bytes(alphabet[letter] for letter in token)
        elif fallback and (match := _BYTE.fullmatch(token)):
            out[index] = bytes([int(match[1], 16)])
        else:
            out[index] = (token.replace("\u2581", " ") if spaced else token).encode()
    return out


def _alphabet() -> dict[str, int]:
    """The byte that each letter stands for in byte-level BPE: a printing byte is its own letter, the others have the
    letters from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}
