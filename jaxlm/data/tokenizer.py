"""Text to token ids and back, over the Hugging Face ``tokenizers`` library.

A tokenizer is two files that transformers' ``AutoTokenizer`` also reads: ``tokenizer.json`` and
``tokenizer_config.json`` (which names the special tokens). Tokenizers made here are byte-level BPE (Sennrich et al.,
arXiv:1508.07909; bytes as in GPT-2), which encodes any text and decodes it exactly, or one token a character.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxlm.core.errors import UserError
from jaxlm.data.config import DataConfig
from jaxlm.data.sources import Source, Tokens, pieces

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
_SPECIALS = (PAD, BOS, EOS)
_CONVENTIONAL = {  # names tried when no file says which token plays which part
    "pad": (PAD, "[PAD]"),
    "bos": (BOS, "<|begin_of_text|>", "<|endoftext|>"),
    "eos": (EOS, "<|end_of_text|>", "<|endoftext|>"),
}
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_EACH_CHARACTER = r"[\s\S]"
_BATCH = 1 << 22  # characters encoded at a time: bounds the memory of tokenizers' intermediate objects


class Tokenizer:
    """Encodes without adding anything: no special token appears in ``encode(text)``, not even where the text spells one
    (so a corpus cannot end its own documents). ``pad_id``, ``bos_id`` and ``eos_id`` are None where there is none;
    ``vocab_size`` counts ids from 0 to the largest.
    """

    def __init__(self, raw: tokenizers.Tokenizer, config: dict[str, Any]):
        """``config`` is what tokenizer_config.json holds: at least the names of the special tokens there are."""
        raw.no_truncation()
        raw.no_padding()
        raw.encode_special_tokens = True
        self._raw = raw
        self._config = config
        self._splittable = _splittable(raw)
        vocabulary = raw.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.pad_id, self.bos_id, self.eos_id = (
            None if name is None else vocabulary[name] for name in map(self._special, ("pad", "bos", "eos"))
        )

    def _special(self, role: str) -> str | None:
        name = self._config.get(f"{role}_token")
        name = name.get("content") if isinstance(name, dict) else name
        return name if name is not None and self._raw.token_to_id(name) is not None else None

    def encode(self, text: str) -> list[int]:
        """The ids of a text. UserError if it holds a character that a character tokenizer lacks."""
        try:
            return self._raw.encode(text, add_special_tokens=False).ids
        except Exception as error:
            raise self._explain([text], error) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As ``encode``, of many texts, on all cores."""
        ids, lengths = self.encode_flat(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(texts) else []

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of many texts end to end, on all cores and in little memory.

        Returns:
            ids [N], uint16 where the vocabulary allows and int32 elsewhere; lengths [len(texts)] int64, summing to N.
        """
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        chunks, lengths = [np.zeros(0, dtype)], np.zeros(len(texts), np.int64)
        for batch, owners in self._batches(texts):
            try:
                encodings = self._raw.encode_batch_fast(batch, add_special_tokens=False)
            except Exception as error:
                raise self._explain(batch, error) from error
            for owner, encoding in zip(owners, encodings, strict=True):
                chunks.append(np.array(encoding.ids, dtype))
                lengths[owner] += len(chunks[-1])
        return np.concatenate(chunks), lengths

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[str], list[int]]]:
        """Groups of pieces of texts, with the number of the text that each belongs to."""
        batch: list[str] = []
        owners: list[int] = []
        size = 0
        for owner, text in enumerate(texts):
            for piece in pieces(text) if self._splittable else (text,):
                batch.append(piece)
                owners.append(owner)
                size += len(piece) + 64  # short lines have a cost of their own
                if size > _BATCH:
                    yield batch, owners
                    batch, owners, size = [], [], 0
        if batch:
            yield batch, owners

    def _explain(self, texts: Sequence[str], error: Exception) -> Exception:
        unknown = set().union(*texts) - self._raw.get_vocab().keys()
        if json.loads(self._raw.to_str())["model"]["type"] != "WordLevel" or not unknown:
            return error
        named = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in sorted(unknown)[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        return UserError(
            f"the character tokenizer does not know {named}{more}; train it on text that has them, or use bpe"
        )

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of some ids; special tokens vanish unless asked for. Bytes that are not UTF-8 become U+FFFD."""
        return self._raw.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json into a directory, made if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._raw.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(self._config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json, or the one in a directory, with the tokenizer_config.json and config.json beside it.

        UserError if there is none, or if one of the files cannot be read.
        """
        path = Path(path).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{file} does not exist; name a tokenizer.json or a directory that holds one")
        try:
            raw = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{file} is not a tokenizer.json ({error}); save it again") from None
        config = _read_json(file.with_name("tokenizer_config.json")) or {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False
        }
        model = _read_json(file.with_name("config.json"))
        for role, conventional in _CONVENTIONAL.items():
            if not config.get(f"{role}_token"):
                index = model.get(f"{role}_token_id")
                index = index[0] if isinstance(index, list) else index
                known = (name for name in conventional if not model and raw.token_to_id(name) is not None)
                config[f"{role}_token"] = next(known, None) if index is None else raw.id_to_token(index)
        return cls(raw, config)

    @classmethod
    def train(cls, texts: Iterable[str], kind: Literal["bpe", "char"] = "bpe", vocab_size: int = 8192) -> Tokenizer:
        """A tokenizer made from texts; the same texts give the same tokenizer. Ids 0, 1 and 2 are <pad>, <s>, </s>.

        Args:
            texts: what to learn from.
            kind: "bpe" merges bytes until there are ``vocab_size`` tokens (fewer if the text runs out of pairs);
                "char" has a token for each character seen and no other.
            vocab_size: of "bpe"; at least 259 (256 bytes and 3 specials).
        """
        parts = (piece for text in texts for piece in pieces(text))
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
        return cls(raw, {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "pad_token": PAD, "bos_token": BOS, "eos_token": EOS,
        })


def tokenizer_for(config: DataConfig, source: Source) -> Tokenizer:
    """The tokenizer that a configuration names, or one trained on ``source``. UserError if neither can be had."""
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer)
    if isinstance(source, Tokens):
        raise UserError(f"{source.spec!r} holds ids, not text to train a tokenizer on; name theirs in data.tokenizer")
    return Tokenizer.train(source.texts, config.tokenizer_kind, config.vocab_size)


def _splittable(raw: tokenizers.Tokenizer) -> bool:
    """Whether ``pieces`` may be encoded apart: GPT-2's pattern or single characters, and nothing that reads across."""
    spec = json.loads(raw.to_str())
    before = spec["pre_tokenizer"] or {}
    gpt2 = before.get("type") == "ByteLevel" and before["use_regex"] and not before["add_prefix_space"]
    characters = before.get("type") == "Split" and before["pattern"] == {"Regex": _EACH_CHARACTER}
    plain = spec["normalizer"] is None and all(token["special"] for token in spec["added_tokens"])
    return plain and (gpt2 or characters)


def _read_json(path: Path) -> dict[str, Any]:
    """An optional JSON file; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it") from None
