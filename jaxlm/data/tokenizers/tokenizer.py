"""Text to token ids and back, over the Hugging Face ``tokenizers`` library.

A tokenizer is two files that transformers' ``AutoTokenizer`` also reads: ``tokenizer.json`` and
``tokenizer_config.json`` (which names the special tokens); whatever else Hugging Face directories keep one in is read
too. Tokenizers made here are byte-level BPE (Sennrich et al., arXiv:1508.07909; bytes as in GPT-2), which encodes any
text and decodes it exactly, or one token a character.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxlm.core.errors import UserError
from jaxlm.data.sources.text_chunks import text_chunks
from jaxlm.data.tokenizers.backends import FastBackend, TokenizerBackend
from jaxlm.data.tokenizers.chat_template import choose, marked_spans, render
from jaxlm.data.tokenizers.files import read_tokenizer
from jaxlm.data.tokenizers.languages import language_convention
from jaxlm.data.tokenizers.token_bytes import token_bytes

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
_SPECIALS = (PAD, BOS, EOS)
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_EACH_CHARACTER = r"[\s\S]"
_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # what cleaning up takes spaces from
_BATCH = 1 << 22  # characters encoded at a time: bounds the memory of tokenizers' intermediate objects


class Tokenizer:
    """Encodes without adding anything: no special token appears in ``encode(text)``, not even where the text spells one
    (so a corpus cannot end its own documents). What a model reads around its text is added by ``encode_prompt``,
    ``encode_source`` and ``encode_target``. ``pad_id``, ``bos_id`` and ``eos_id`` are None where there is none;
    ``vocab_size`` counts ids from 0 to the largest, and ``languages`` has the ids of the language codes, if any.
    """

    def __init__(self, engine: TokenizerBackend, config: dict[str, Any], family: str = ""):
        """``config`` is what tokenizer_config.json holds: at least the names of the special tokens there are.
        ``family`` is the class it is for (without "Fast"), which decides where language codes go."""
        self._engine = engine
        self._config = config
        self._splittable = isinstance(engine, FastBackend) and _splittable(engine.raw)
        vocabulary = engine.vocabulary
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.pad_id, self.bos_id, self.eos_id = (
            None if name is None else vocabulary[name] for name in map(self._special, ("pad", "bos", "eos"))
        )
        self._convention = language_convention(family, config)
        self.languages: Mapping[str, int] = self._convention.of(engine.specials) if self._convention else {}

    def _special(self, role: str) -> str | None:
        name = self._config.get(f"{role}_token")
        name = name.get("content") if isinstance(name, dict) else name
        return name if name in self._engine.vocabulary else None

    def fingerprint(self) -> str:
        """A digest of the files that it is saved as: equal where it makes the same ids."""
        found = hashlib.blake2b(digest_size=16)
        with tempfile.TemporaryDirectory() as directory:
            self.save(directory)
            for file in sorted(Path(directory).iterdir()):
                found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        return found.hexdigest()

    @property
    def dtype(self) -> type[np.integer]:
        """The smallest integer type that ids of many texts are kept in: uint16 where it suffices, else int32."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.int32

    def check_rows(self, rows: int, target_rows: int) -> None:
        """UserError where a token has an id that embeddings of so many rows have not, of the source or the target.

        A token that stands for an image is none of text: Gemma 3 has one in the tokenizer of models without a row for
        it.
        """
        image = self._config.get("image_token")
        image = image.get("content") if isinstance(image, dict) else image
        for vocabulary, count in ((self._engine.vocabulary, rows), (self._engine.target_vocabulary, target_rows)):
            if max(vocabulary.values()) >= count:
                index, token = max((index, token) for token, index in vocabulary.items() if token != image)
                if index >= count:
                    raise UserError(
                        f"the tokenizer gives {token!r} the id {index}, and the model has {count} rows of embeddings; "
                        "copy the tokenizer that belongs to it"
                    )

    def encode(self, text: str) -> list[int]:
        """The ids of a text. UserError if it holds a character that a character tokenizer lacks."""
        return self._ids([text])[0]

    def _ids(self, texts: Sequence[str], target: bool = False) -> list[list[int]]:
        try:
            return [list(ids) for ids in self._engine.encode(texts, target)]
        except Exception as error:
            raise self._explain(texts, error) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As ``encode``, of many texts, on all cores."""
        ids, lengths = self.encode_flat(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(texts) else []

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of many texts end to end, on all cores and in little memory.

        Returns:
            ids [N] of the type ``dtype``; lengths [len(texts)] int64, summing to N.
        """
        dtype = self.dtype
        chunks, lengths = [np.zeros(0, dtype)], np.zeros(len(texts), np.int64)
        for batch, owners in self._batches(texts):
            try:
                encoded = self._engine.encode(batch)
            except Exception as error:
                raise self._explain(batch, error) from error
            for owner, ids in zip(owners, encoded, strict=True):
                chunks.append(np.array(ids, dtype))
                lengths[owner] += len(chunks[-1])
        return np.concatenate(chunks), lengths

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[str], list[int]]]:
        """Groups of pieces of texts, with the number of the text that each belongs to."""
        batch: list[str] = []
        owners: list[int] = []
        size = 0
        for owner, text in enumerate(texts):
            for piece in text_chunks(text) if self._splittable else (text,):
                batch.append(piece)
                owners.append(owner)
                size += len(piece) + 64  # short lines have a cost of their own
                if size > _BATCH:
                    yield batch, owners
                    batch, owners, size = [], [], 0
        if batch:
            yield batch, owners

    def _explain(self, texts: Sequence[str], error: Exception) -> Exception:
        unknown = set().union(*texts) - self._engine.vocabulary.keys()
        if not self._is_character_level() or not unknown:
            return error
        named = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in sorted(unknown)[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        return UserError(
            f"the character tokenizer does not know {named}{more}; train it on text that has them, or use bpe"
        )

    def _is_character_level(self) -> bool:
        return isinstance(self._engine, FastBackend) and isinstance(self._engine.raw.model, models.WordLevel)

    def encode_prompt(self, text: str, specials: bool = False) -> list[int]:
        """The ids of a prompt, with what a decoder of this kind reads around it (Llama's <s>; GPT-2: nothing).

        ``specials``: the text spells its special tokens, as a prompt made by ``chat`` does, the first one included.
        They are recognised, and nothing is added.
        """
        if specials:
            return list(self._spelled(text)[0])
        framed = self._engine.encode_framed([text])
        return self.encode(text) if framed is None else list(next(iter(framed)))

    def _spelled(self, text: str) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
        try:
            return self._engine.encode_spelled(text)
        except Exception as error:
            raise self._explain([text], error) from error

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """``encode_prompt(text, specials=True)`` as int32 [N], and which of its ids lie in some spans of characters,
        bool [N]; one that reaches into a span lies in it."""
        ids, offsets_Nx2 = self._spelled(text)
        start_N, end_N = np.array(offsets_Nx2, np.int64).reshape(-1, 2).T
        inside_N = np.zeros(len(ids), bool)
        for start, end in spans:
            inside_N |= ((start <= start_N) & (start_N < end)) | ((start_N < start) & (start < end_N))
        return np.array(ids, np.int32), inside_N

    def encode_source(self, texts: Sequence[str], language: str | None = None) -> list[list[int]]:
        """What an encoder reads of each text: its ids with the end token, and with a language code where such models
        have one. Without ``language`` it is the ``src_lang`` of tokenizer_config.json, or the code that transformers
        takes there. UserError for a language that the tokenizer lacks."""
        default = self._config.get("src_lang") or (self._convention.default if self._convention else None)
        return self._framed(texts, language, default, target=False)

    def encode_target(self, texts: Sequence[str], language: str | None = None) -> list[list[int]]:
        """The labels of each text: what a decoder is trained to produce after its start token, with the end token, and
        with a language code where such models have one (mBART-cc25, whose decoder starts with the code: after the end
        token). Without ``language`` it is the ``tgt_lang`` of tokenizer_config.json. UserError where that is missing,
        or the tokenizer lacks the language."""
        return self._framed(texts, language, self.target_language, target=True)

    def _framed(self, texts: Sequence[str], language: str | None, default: str | None, target: bool) -> list[list[int]]:
        texts = list(texts)
        if not self.languages:
            if language is not None:
                self.language_id(language)
            framed = self._engine.encode_framed(texts)
            rows = None if framed is None else [list(row) for row in framed]
            # A frame without the end token is a decoder's; encoders and targets end.
            if rows is not None and all(row and row[-1] == self.eos_id for row in rows):
                return rows
        ids = self._ids(texts, target)
        if self.eos_id is None:
            raise UserError("the tokenizer has no eos token to end a sentence with; use another")
        if not self.languages:
            return [[*row, self.eos_id] for row in ids]
        code = self.language_id(language or default)
        first = self._convention.first
        return [[code, *row, self.eos_id] if first else [*row, self.eos_id, code] for row in ids]

    @property
    def target_language(self) -> str | None:
        """The language that tokenizer_config.json says the model translates into."""
        return self._config.get("tgt_lang")

    @property
    def starts_with_language(self) -> bool:
        """Whether a decoder starts with the code of its language, instead of saying it first."""
        return self._convention is not None and self._convention.starts

    def language_id(self, language: str | None) -> int:
        """The id of a language's code. UserError, naming the nearest codes, where there is no such language."""
        if language in self.languages:
            return self.languages[language]
        if not self.languages:
            raise UserError(f"the tokenizer has no languages, so {language!r} cannot be chosen; leave it out")
        if language is None:
            raise UserError(f"say which language to translate into: one of {', '.join(list(self.languages)[:8])}, …")
        near = difflib.get_close_matches(language, self.languages, n=3, cutoff=0.0)
        raise UserError(f"the model has no language {language!r}; did you mean {' or '.join(near)}?")

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of some ids; special tokens vanish unless asked for. Bytes that are not UTF-8 become U+FFFD."""
        text = self._engine.decode([int(i) for i in ids], skip_special)
        if self._config.get("clean_up_tokenization_spaces") and not self._engine.bpe:
            for spaced in _SPACED:
                text = text.replace(spaced, spaced.strip(" "))
        return text

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each token stands for, by id; None for those that are no text. UserError where tokens are
        pieces of SentencePiece, of which that cannot be said."""
        if not isinstance(self._engine, FastBackend):
            raise UserError("what the tokens of this tokenizer stand for depends on their neighbours; use another")
        return token_bytes(self._engine.raw)

    @property
    def specials(self) -> list[str]:
        """The tokens that are not text."""
        return list(self._engine.specials)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._config.get("chat_template"))

    @property
    def chat_template(self) -> str:
        """The program that ``chat`` runs. UserError if there is none."""
        return choose(self._config.get("chat_template"), False)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any,
    ) -> str:
        """A conversation as the prompt that the model was trained with: its chat template, filled in.

        Encode it with ``encode_prompt(prompt, specials=True)``.

        Args:
            messages: each with a "role" and, mostly, a "content".
            add_generation_prompt: whether the prompt ends where the model's answer begins.
            tools: JSON schemas of functions that the model may call.
            **variables: whatever else the template reads.

        Raises:
            UserError: there is no template, or it fails, refuses the conversation, or does what it may not.
        """
        return self._render(messages, tools, {**variables, "add_generation_prompt": add_generation_prompt})

    def chat_spans(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """A whole conversation as ``chat`` writes it, and the spans of characters that the template marks as written by
        the model, in {% generation %} blocks."""
        return marked_spans(self._render(messages, tools, {"add_generation_prompt": False}, marked=True))

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any], marked: bool = False,
    ) -> str:
        template = choose(self._config.get("chat_template"), tools is not None)
        if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
            raise UserError('a chat is a list of messages such as {"role": "user", "content": "Hello"}')
        tokens = {key: value for key, value in self._config.items() if key.endswith("_token")}
        tokens = {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()}
        tokens = {key: value for key, value in tokens.items() if isinstance(value, str)}
        return render(
            template, {**tokens, "documents": None, **variables, "messages": messages, "tools": tools}, marked=marked
        )

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's files into a directory, made if need be: tokenizer.json (the SentencePiece models and
        the vocabulary where Marian and M2M-100 need them instead) and tokenizer_config.json, with any chat template."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._engine.save(directory)
        (directory / "tokenizer_config.json").write_text(json.dumps(self._config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face directory, or one of its files with the configs beside it.

        That is tokenizer.json, a SentencePiece model, or vocab.json and merges.txt (``tokenizer_files``). UserError if
        there is none, or if one of the files cannot be read.
        """
        return cls(*read_tokenizer(Path(path).expanduser()))

    @classmethod
    def train(cls, texts: Iterable[str], kind: Literal["bpe", "char"] = "bpe", vocab_size: int = 8192) -> Tokenizer:
        """A tokenizer made from texts; the same texts give the same tokenizer. Ids 0, 1 and 2 are <pad>, <s>, </s>.

        Args:
            texts: what to learn from.
            kind: "bpe" merges bytes until there are ``vocab_size`` tokens (fewer if the text runs out of pairs);
                "char" has a token for each character seen and no other.
            vocab_size: of "bpe"; at least 259 (256 bytes and 3 specials).
        """
        parts = (piece for text in texts for piece in text_chunks(text))
        if kind == "char":
            alphabet = sorted(set().union(*parts))
            vocabulary = {token: i for i, token in enumerate((*_SPECIALS, *alphabet))}
            raw = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=None))
            raw.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_EACH_CHARACTER), "isolated")
            raw.decoder = decoders.Fuse()
            raw.add_special_tokens(list(_SPECIALS))
        else:
            least = len(_ALPHABET) + len(_SPECIALS)
            if vocab_size < least:
                raise UserError(f"a vocabulary of {vocab_size} is too small for byte-level BPE; give at least {least}")
            raw = tokenizers.Tokenizer(models.BPE())
            raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            raw.decoder = decoders.ByteLevel()
            raw.train_from_iterator(parts, trainers.BpeTrainer(
                vocab_size=vocab_size, special_tokens=list(_SPECIALS), initial_alphabet=_ALPHABET, show_progress=False,
            ))
        return cls(FastBackend(raw), {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "pad_token": PAD, "bos_token": BOS, "eos_token": EOS,
        })


def _splittable(raw: tokenizers.Tokenizer) -> bool:
    """Whether ``pieces`` may be encoded apart: GPT-2's pattern or single characters, and nothing that reads across."""
    spec = json.loads(raw.to_str())
    before = spec["pre_tokenizer"] or {}
    gpt2 = before.get("type") == "ByteLevel" and before["use_regex"] and not before["add_prefix_space"]
    characters = before.get("type") == "Split" and before["pattern"] == {"Regex": _EACH_CHARACTER}
    plain = spec["normalizer"] is None and all(token["special"] for token in spec["added_tokens"])
    return plain and (gpt2 or characters)
