"""Text to token ids and back.

A tokenizer is saved as two files that transformers' ``AutoTokenizer`` also reads: ``tokenizer.json``, and
``tokenizer_config.json``, which names the special tokens. ``data.tokenizers.files`` says which other files of Hugging
Face directories can be read.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.data.tokenizers.backends import TokenizerBackend
from jaxlm.data.tokenizers.chat_template import ChatTemplate, Messages, Tools
from jaxlm.data.tokenizers.files import read_tokenizer
from jaxlm.data.tokenizers.languages import LanguageCodes, language_convention
from jaxlm.data.tokenizers.special_tokens import ChatPrompt, SpecialTokenFinder
from jaxlm.data.tokenizers.text_encoder import TextEncoder
from jaxlm.data.tokenizers.training import train_backend
from jaxlm.data.tokenizers.translation import SentenceEncoder
from jaxlm.data.tokenizers.vocabulary import Vocabulary

# Decoded text loses the spaces before these where tokenizer_config.json says clean_up_tokenization_spaces.
_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Tokenizer:
    """Encodes and decodes text.

    ``encode`` adds no special token and recognises none in the text, so that a corpus cannot end its own documents by
    spelling the end token; so do ``encode_source`` and ``encode_target``, which add what a translation model reads
    around a sentence. ``encode_prompt`` recognises special tokens, because prompts may be written for a chat template
    or for infilling; ``encode_chat`` recognises those of the chat template and none in messages.

    Attributes:
        vocab_size: one more than the largest id.
        pad_id, bos_id, eos_id: None where the tokenizer has no such token.
        vocabulary: all tokens; answers questions about them.
        special_tokens: finds the special tokens that a text spells.
        languages: the ids of the language codes; empty in a tokenizer of one language.
        chat_template: renders conversations as prompts.
        backend: does the encoding.
        config: the content of tokenizer_config.json.
    """

    def __init__(self, backend: TokenizerBackend, config: dict[str, Any], family: str = ""):
        """
        Args:
            backend: does the encoding.
            config: the content of tokenizer_config.json; it must name the special tokens that there are.
            family: the tokenizer class in transformers, without "Fast"; it decides where language codes go.
        """
        self.backend, self.config = backend, config
        self.vocabulary = Vocabulary(backend, config)
        self.vocab_size = self.vocabulary.size
        self.pad_id, self.bos_id, self.eos_id = self.vocabulary.pad_id, self.vocabulary.bos_id, self.vocabulary.eos_id
        self.languages = LanguageCodes(language_convention(family, config), backend.special_tokens, config)
        self.chat_template = ChatTemplate(config)
        self.special_tokens = SpecialTokenFinder(backend.special_tokens)
        self._text = TextEncoder(backend, self.special_tokens)
        self._sentences = SentenceEncoder(backend, self._text, self.languages, self.eos_id)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face directory, or one tokenizer file with the configs beside it.

        The file is tokenizer.json, a SentencePiece model, or merges.txt with vocab.json (``data.tokenizers.files``).

        Raises:
            UserError: when there is no such file, or one of the files cannot be read.
        """
        return cls(*read_tokenizer(Path(path).expanduser()))

    @classmethod
    def train(cls, texts: Iterable[str], kind: Literal["bpe", "char"] = "bpe", vocab_size: int = 8192) -> Tokenizer:
        """Trains a tokenizer. The same texts give the same tokenizer. Ids 0, 1 and 2 are <pad>, <s> and </s>.

        Args:
            texts: what to train on.
            kind: "bpe" is byte-level BPE (Sennrich et al., arXiv:1508.07909; bytes as in GPT-2), which encodes every
                text and decodes it exactly; "char" has one token for each character of ``texts`` and knows no other.
            vocab_size: of "bpe"; at least 259 (256 bytes and 3 special tokens). The tokenizer has fewer tokens where
                the texts have no more pairs to merge.

        Raises:
            UserError: when ``vocab_size`` is too small.
        """
        return cls(*train_backend(texts, kind, vocab_size))

    def save(self, directory: str | Path) -> None:
        """Writes the files of the tokenizer into a directory, which is made if it does not exist: tokenizer_config.json
        with any chat template, and tokenizer.json (for Marian and M2M-100 the SentencePiece models and vocab.json)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)

    def files(self) -> dict[str, bytes]:
        """The content of the files that ``save`` writes, by name."""
        config = json.dumps(self.config, indent=2) + "\n"
        return {**self.backend.files(), "tokenizer_config.json": config.encode()}

    def fingerprint(self) -> str:
        """A hash of the files that ``save`` writes: tokenizers with the same fingerprint make the same ids."""
        found = hashlib.blake2b(digest_size=16)
        for name, content in sorted(self.files().items()):
            found.update(name.encode() + b"\0" + content + b"\0")
        return found.hexdigest()

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The ids of a text; with ``parse_special``, special tokens that it spells are recognised.

        Raises:
            UserError: when a character tokenizer does not know a character.
        """
        return self._text.encode_parsing_special(text)[0] if parse_special else self._text.encode([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As ``encode`` for many texts, on all cores."""
        ids, lengths = self.encode_flat(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(texts) else []

    def encode_flat(self, texts: Sequence[str], parse_special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """As ``encode`` for many texts, end to end, on all cores and in little memory.

        Returns:
            ids [N] of the type ``vocabulary.id_dtype``; lengths [len(texts)] int64, which sum to N.

        Raises:
            UserError: when a character tokenizer does not know a character.
        """
        return self._text.encode_flat(texts, self.vocabulary.id_dtype, parse_special)

    def encode_prompt(self, text: str, parse_special: bool = True) -> list[int]:
        """The ids of a prompt with what a decoder of this kind reads around it (Llama: <s> before it; GPT-2: nothing).

        Special tokens that the text spells are recognised, as in transformers, unless ``parse_special`` is false. What
        a text spells around itself is not added again, so that a prompt of Llama's that begins with <s> has one.
        """
        if not parse_special or (self.backend.special_tokens_are_exact and not self.special_tokens.first(text)):
            framed = self.backend.encode_framed([text])
            return self.encode(text) if framed is None else list(next(iter(framed)))
        ids, (before, after) = self.encode(text, parse_special=True), self.frame
        before = [] if ids[: len(before)] == before else before
        after = [] if ids[len(ids) - len(after) :] == after else after
        return [*before, *ids, *after]

    @functools.cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that ``encode_prompt`` adds before and after a text."""
        words = (token for token in self.backend.vocabulary if token not in self.backend.special_tokens)
        text = next(words) if self.backend.unknown_characters(["a"]) else "a"
        bare, framed = self.encode(text), self.encode_prompt(text, parse_special=False)
        begin = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        return framed[:begin], framed[begin + len(bare) :]

    @property
    def first_token(self) -> tuple[int, ...]:
        """What ``encode_prompt`` adds before a text (Gemma, Llama: <bos>; GPT-2, Qwen: nothing; GLM: two tokens). A
        model that was trained with it reads every document and every window of a text behind it."""
        return tuple(self.frame[0])

    def encode_chat(
        self, messages: Messages, *, add_generation_prompt: bool = True, tools: Tools | None = None, **variables: Any
    ) -> list[int]:
        """The ids of a conversation as ``chat_template.render`` writes it. Special tokens that the template spells are
        recognised; what messages, tools and variables spell is text.

        Raises:
            UserError: as ``chat_template.render``.
        """
        messages, tools, variables = map(self.special_tokens.protect, (messages, tools, variables))
        prompt = self.special_tokens.release(self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        ))
        return self._text.encode_parsing_special(prompt.text, prompt.literal)[0]

    def encode_spans(self, prompt: ChatPrompt) -> tuple[np.ndarray, np.ndarray]:
        """A conversation, and which of its tokens overlap its ``spans``.

        Returns:
            ids [N] int32, as those of ``encode_chat``; inside [N] bool.
        """
        ids, offsets_Nx2 = self._text.encode_parsing_special(prompt.text, prompt.literal)
        start_N, end_N = np.array(offsets_Nx2, np.int64).reshape(-1, 2).T
        inside_N = np.zeros(len(ids), bool)
        for start, end in prompt.spans:
            inside_N |= ((start <= start_N) & (start_N < end)) | ((start_N < start) & (start < end_N))
        return np.array(ids, np.int32), inside_N

    def encode_source(self, texts: Sequence[str], language: str | None = None) -> list[list[int]]:
        """What the encoder of a translation model reads for each text: the ids with the end token, and with a language
        code if the model has several languages.

        ``language`` is None for the ``src_lang`` of tokenizer_config.json, or else the code that transformers takes.

        Raises:
            UserError: when the tokenizer does not have the language, or has no end token.
        """
        return self._sentences.encode(texts, language, target=False)

    def encode_target(self, texts: Sequence[str], language: str | None = None) -> list[list[int]]:
        """The labels for each text: what the decoder is trained to produce after its start token. They have the end
        token, and a language code if the model has several languages (after the end token in mBART-cc25, whose decoder
        starts with the code).

        ``language`` is None for the ``tgt_lang`` of tokenizer_config.json.

        Raises:
            UserError: when the tokenizer does not have the language, when none is named, or without an end token.
        """
        return self._sentences.encode(texts, language, target=True)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of some ids. Bytes that are not UTF-8 become U+FFFD; special tokens are left out if
        ``skip_special``."""
        text = self.backend.decode([int(i) for i in ids], skip_special)
        if self.config.get("clean_up_tokenization_spaces") and self.backend.cleans_up_spaces:
            for spaced in _SPACED:
                text = text.replace(spaced, spaced.strip(" "))
        return text
