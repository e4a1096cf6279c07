"""What a ``Tokenizer`` runs on: the ``tokenizers`` library, or SentencePiece models and ids of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import models, pre_tokenizers

from jaxlm.core.errors import UserError


class TokenizerBackend(Protocol):
    """Text to ids and back, before any question of what a model reads around the text.

    Attributes:
        vocabulary: the id of every token.
        target_vocabulary: the same, in the language translated into.
        specials: the id of every token that is not text; ``encode`` makes none of them.
        bpe: whether it merges pairs (which decides about cleaning up spaces).
    """

    vocabulary: Mapping[str, int]
    target_vocabulary: Mapping[str, int]
    specials: Mapping[str, int]
    bpe: bool

    def encode(self, texts: Sequence[str], target: bool = False) -> Iterable[Sequence[int]]:
        """Ids of each text, made on all cores; ``target``: of the language translated into."""

    def encode_framed(self, texts: Sequence[str]) -> Iterable[Sequence[int]] | None:
        """Ids of each text with what the file itself puts around it; None where the file does not say."""

    def encode_spelled(self, text: str) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
        """Ids of a text in which the tokens that are not text are recognised where it spells them; and from which
        character to which each goes."""

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of some ids."""

    def save(self, directory: Path) -> None:
        """Writes the files that it can be read from again."""


class FastBackend:
    """A ``TokenizerBackend`` over a ``tokenizers.Tokenizer``: one file, tokenizer.json."""

    def __init__(self, raw: tokenizers.Tokenizer):
        raw.no_truncation()
        raw.no_padding()
        raw.encode_special_tokens = True
        self.raw = raw
        self.vocabulary = self.target_vocabulary = raw.get_vocab(with_added_tokens=True)
        added = raw.get_added_tokens_decoder().items()
        self.specials = {token.content: index for index, token in added if token.special}
        self.bpe = isinstance(raw.model, models.BPE)
        if isinstance(raw.model, models.Unigram):
            _hide(raw, sorted(self.specials.keys() & raw.get_vocab(with_added_tokens=False).keys()))

    @cached_property
    def _recognising(self) -> tokenizers.Tokenizer:
        """A copy that finds special tokens in text: a switch on the one in use would change it under other threads."""
        return tokenizers.Tokenizer.from_str(self.raw.to_str())

    def encode(self, texts: Sequence[str], target: bool = False) -> Iterable[Sequence[int]]:
        return (encoding.ids for encoding in self.raw.encode_batch_fast(list(texts), add_special_tokens=False))

    def encode_framed(self, texts: Sequence[str]) -> Iterable[Sequence[int]] | None:
        if self.raw.post_processor is None:
            return None
        return (encoding.ids for encoding in self.raw.encode_batch_fast(list(texts)))

    def encode_spelled(self, text: str) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
        encoding = self._recognising.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self.raw.decode(list(ids), skip_special_tokens=skip_special)

    def save(self, directory: Path) -> None:
        self.raw.save(str(directory / "tokenizer.json"))


def _hide(raw: tokenizers.Tokenizer, tokens: Sequence[str]) -> None:
    """Keeps a unigram model from finding special tokens in text: they are among its pieces, with the best of scores.

    Splitting after the first character of a spelling is enough. Does nothing to a tokenizer that has been through it.
    """
    rests: dict[str, list[str]] = {}
    for token in tokens:
        rests.setdefault(token[0], []).append(re.escape(token[1:]))
    pattern = "|".join(f"{re.escape(first)}(?=(?:{'|'.join(rest)}))" for first, rest in rests.items())
    before = [raw.pre_tokenizer] if raw.pre_tokenizer else []
    done = json.dumps({"Regex": pattern}, ensure_ascii=False, separators=(",", ":"))
    if tokens and not any(done in part.__getstate__().decode() for part in before):
        guard = pre_tokenizers.Split(tokenizers.Regex(pattern), "merged_with_previous")
        raw.pre_tokenizer = pre_tokenizers.Sequence([*before, guard])


@dataclass(frozen=True)
class PieceModel:
    """One language side: a SentencePiece processor that makes pieces, and the ids of pieces."""

    processor: Any
    vocabulary: Mapping[str, int]

    @cached_property
    def tokens(self) -> dict[int, str]:
        return {index: token for token, index in self.vocabulary.items()}


class PieceBackend:
    """A ``TokenizerBackend`` for models that look pieces up in a vocabulary of their own: Marian (Junczys-Dowmunt et
    al., arXiv:1804.00344) and M2M-100. A piece that the vocabulary lacks is unknown; so is a special token spelled in
    text. ``files`` are those it was made from, by name.
    """

    bpe = False  # as far as cleaning up is concerned

    def __init__(
        self, source: PieceModel, target: PieceModel, specials: Mapping[str, int], unknown: int,
        files: Mapping[str, bytes], marian: bool,
    ):
        self.vocabulary = source.vocabulary
        self.target_vocabulary = target.vocabulary
        self.specials = specials
        self._sides = source, target
        self._unknown = unknown
        self._files = dict(files)
        self._marian = marian

    def encode(self, texts: Sequence[str], target: bool = False) -> Iterable[Sequence[int]]:
        side = self._sides[target]
        heads, bodies = [], []
        for text in texts:
            head = re.match(r">>.*?<<", text, re.DOTALL) if self._marian else None  # the language to translate into
            heads.append([head[0]] if head else [])
            bodies.append(text[head.end() :] if head else text)
        pieces = side.processor.encode(bodies, out_type=str) if bodies else []
        return ([self._id(side, piece) for piece in (*head, *body)] for head, body in zip(heads, pieces, strict=True))

    def _id(self, side: PieceModel, piece: str) -> int:
        return self._unknown if piece in self.specials else side.vocabulary.get(piece, self._unknown)

    def encode_framed(self, texts: Sequence[str]) -> None:
        return None

    def encode_spelled(self, text: str) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
        raise UserError("the tokenizer of a translation model finds no special tokens in text; give it plain text")

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        side = self._sides[1]
        # With one vocabulary for both languages, the source's model joins the pieces: what transformers does.
        processor = side.processor if side.vocabulary is not self.vocabulary else self._sides[0].processor
        unknown = next(token for token, index in self.specials.items() if index == self._unknown)
        out, run = "", []
        for token in (side.tokens.get(index, unknown) for index in ids):
            if token not in self.specials:
                run.append(token)
            elif not skip_special:
                out += processor.decode(run) + token + (" " if self._marian else "")
                run = []
        out += processor.decode(run)
        return (out.replace("▁", " ") if self._marian else out).strip()

    def save(self, directory: Path) -> None:
        for name, content in self._files.items():
            (directory / name).write_bytes(content)


def add_named_tokens(raw: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Adds the tokens whose ids tokenizer_config.json gives, lowest first. UserError where an id cannot be had."""
    for index, token in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        added = tokenizers.AddedToken(**{key: value for key, value in token.items() if key != "__type"})
        (raw.add_special_tokens if added.special else raw.add_tokens)([added])
        if raw.token_to_id(added.content) != int(index):
            raise UserError(
                f"tokenizer_config.json gives {added.content!r} the id {index}, and by the vocabulary it has "
                f"{raw.token_to_id(added.content)}; copy all files of the tokenizer again"
            )


def read_vocabulary(file: Path) -> dict[str, int]:
    """The ids of tokens from a vocab.json. UserError where it is something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(content, dict) or not all(type(i) is int and 0 <= i < 1 << 31 for i in content.values()):
        raise UserError(f"{file} does not map tokens to ids; copy it again")
    return content
