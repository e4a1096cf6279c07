"""Training a tokenizer on text: byte-level BPE, or one token for each character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxlm.core.errors import UserError
from jaxlm.data.sources.text_chunks import text_chunks
from jaxlm.data.tokenizers.backends import EACH_CHARACTER, FastBackend

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
_SPECIAL_TOKENS = (PAD, BOS, EOS)  # ids 0, 1 and 2
_BYTE_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
    "pad_token": PAD, "bos_token": BOS, "eos_token": EOS,
}


def train_backend(
    texts: Iterable[str], kind: Literal["bpe", "char"], vocab_size: int
) -> tuple[FastBackend, dict[str, Any]]:
    """The backend and the tokenizer_config.json of a tokenizer trained on texts. See ``Tokenizer.train``."""
    chunks = (chunk for text in texts for chunk in text_chunks(text))
    raw = _train_characters(chunks) if kind == "char" else _train_bpe(chunks, vocab_size)
    return FastBackend(raw), dict(_CONFIG)


def _train_characters(texts: Iterable[str]) -> tokenizers.Tokenizer:
    alphabet = sorted(set().union(*texts))
    vocabulary = {token: i for i, token in enumerate((*_SPECIAL_TOKENS, *alphabet))}
    raw = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(EACH_CHARACTER), "isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(list(_SPECIAL_TOKENS))
    return raw


def _train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    least = len(_BYTE_ALPHABET) + len(_SPECIAL_TOKENS)
    if vocab_size < least:
        raise UserError(f"a vocabulary of {vocab_size} is too small for byte-level BPE; give at least {least}")
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(_SPECIAL_TOKENS), initial_alphabet=_BYTE_ALPHABET,
        show_progress=False,
    ))
    return raw
