"""The two implementations behind ``Tokenizer``: the library ``tokenizers``, and SentencePiece models with a vocabulary
of their own."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from jaxlm.core.errors import UserError
from jaxlm.core.untrusted import read_json
from jaxlm.data.tokenizers.limits import check_ids, library_errors
from jaxlm.data.tokenizers.token_bytes import token_bytes

EACH_CHARACTER = r"[\s\S]"  # splits a text into characters
Offsets = Sequence[tuple[int, int]]  # of tokens in a text: first character, end
_MARK = "\ufdd4"  # a code point that is no character


class TokenizerBackend(Protocol):
    """Text to ids and back, without what a model reads around the text.

    Attributes:
        vocabulary: the id of every token.
        target_vocabulary: the same, in the language translated into.
        special_tokens: the id of every token that is not text; ``encode`` makes none of them.
        special_tokens_are_exact: whether a text has special tokens exactly where it spells them, and what stands around
            them does not matter.
        encodes_chunks_apart: whether the chunks that ``text_chunks`` cuts may be encoded one by one.
        cleans_up_spaces: whether clean_up_tokenization_spaces of tokenizer_config.json applies to decoded text.
    """

    vocabulary: Mapping[str, int]
    target_vocabulary: Mapping[str, int]
    special_tokens: Mapping[str, int]
    special_tokens_are_exact: bool
    encodes_chunks_apart: bool
    cleans_up_spaces: bool

    def encode(self, texts: Sequence[str], target: bool = False) -> Iterable[Sequence[int]]:
        """The ids of each text, made on all cores; ``target``: in the vocabulary of the language translated into."""

    def encode_framed(self, texts: Sequence[str]) -> Iterable[Sequence[int]] | None:
        """The ids of each text with the special tokens that the file's post-processor puts around it; None where the
        file has no post-processor."""

    def encode_parsing_special(self, texts: Sequence[str]) -> Iterable[tuple[Sequence[int], Offsets]]:
        """For each text in which spelled special tokens are recognised: its ids, and the characters that each covers.

        Raises:
            UserError: when the backend cannot do that.
        """

    def encode_parsing_spans(self, text: str, spans: Offsets) -> tuple[Sequence[int], Offsets]:
        """As ``encode_parsing_special`` for a text with special tokens in these spans of characters and nowhere else.

        Raises:
            UserError: when the backend cannot do that.
        """

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of some ids."""

    def unknown_characters(self, texts: Sequence[str]) -> set[str]:
        """The characters that cannot be encoded; empty where every text can be."""

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each token stands for, by id; None for special tokens and for ids that have no token.

        Raises:
            UserError: when the bytes of a token depend on its neighbours.
        """

    def files(self) -> Mapping[str, bytes]:
        """The content of the files from which the backend can be read again, by name."""


class FastBackend:
    """A ``TokenizerBackend`` over a ``tokenizers.Tokenizer``, which one file holds: tokenizer.json."""

    def __init__(self, raw: tokenizers.Tokenizer):
        raw.no_truncation()
        raw.no_padding()
        raw.encode_special_tokens = True
        self.raw = raw
        self.vocabulary = self.target_vocabulary = raw.get_vocab(with_added_tokens=True)
        check_ids(self.vocabulary)
        self._added = raw.get_added_tokens_decoder()
        special = [(index, token) for index, token in self._added.items() if token.special]
        self.special_tokens = {token.content: index for index, token in special}
        self.special_tokens_are_exact = not any(
            token.lstrip or token.rstrip or token.single_word or token.normalized and raw.normalizer
            for _, token in special
        )
        self.encodes_chunks_apart = _encodes_chunks_apart(raw)
        self.cleans_up_spaces = not isinstance(raw.model, models.BPE)
        if isinstance(raw.model, models.Unigram):
            _hide_special_tokens(
                raw, sorted(self.special_tokens.keys() & raw.get_vocab(with_added_tokens=False).keys())
            )

    @cached_property
    def _parsing_special(self) -> tokenizers.Tokenizer:
        """A copy that finds special tokens in text: a switch on the one in use would change it under other threads."""
        return tokenizers.Tokenizer.from_str(self.raw.to_str())

    @cached_property
    def _parsing_marks(self) -> tuple[tokenizers.Tokenizer, dict[int, str], dict[int, int]]:
        """A copy that finds no special tokens but a mark for each of them; the marks by the ids of the special tokens,
        and these ids by the ids of the marks. The marks are random, so that nobody can spell one."""
        raw, marks = tokenizers.Tokenizer.from_str(self.raw.to_str()), {}
        raw.encode_special_tokens = True
        nonce = secrets.token_hex(8)
        for index in self.special_tokens.values():
            like, marks[index] = self._added[index], f"{_MARK}{nonce}{index}{_MARK}"
            raw.add_tokens([AddedToken(
                marks[index], lstrip=like.lstrip, rstrip=like.rstrip, single_word=like.single_word,
                normalized=like.normalized, special=False,
            )])
        return raw, marks, {raw.token_to_id(mark): index for index, mark in marks.items()}

    def encode(self, texts: Sequence[str], target: bool = False) -> Iterable[Sequence[int]]:
        with library_errors():
            encodings = self.raw.encode_batch_fast(list(texts), add_special_tokens=False)
        return (encoding.ids for encoding in encodings)

    def encode_framed(self, texts: Sequence[str]) -> Iterable[Sequence[int]] | None:
        if self.raw.post_processor is None:
            return None
        with library_errors():
            encodings = self.raw.encode_batch_fast(list(texts))
        return (encoding.ids for encoding in encodings)

    def encode_parsing_special(self, texts: Sequence[str]) -> Iterable[tuple[Sequence[int], Offsets]]:
        with library_errors():
            encodings = self._parsing_special.encode_batch(list(texts), add_special_tokens=False)
        return ((encoding.ids, encoding.offsets) for encoding in encodings)

    def encode_parsing_spans(self, text: str, spans: Offsets) -> tuple[Sequence[int], Offsets]:
        raw, marks, index_of = self._parsing_marks
        parts, at, marked = [], 0, 0
        bounds = [(0, 0)]  # places in the marked text, and the same places in ``text``
        for start, end in spans:
            mark = marks[self.special_tokens[text[start:end]]]
            parts += [text[at:start], mark]
            marked += start - at
            bounds += [(marked, start), (marked := marked + len(mark), end)]
            at = end
        with library_errors():
            encoding = raw.encode("".join([*parts, text[at:]]), add_special_tokens=False)
        bounds.append((marked + len(text) - at, len(text)))
        places = np.interp(np.array(encoding.offsets).reshape(-1), *zip(*bounds, strict=True)).astype(int)
        return [index_of.get(i, i) for i in encoding.ids], list(map(tuple, places.reshape(-1, 2).tolist()))

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        with library_errors():
            return self.raw.decode(list(ids), skip_special_tokens=skip_special)

    def unknown_characters(self, texts: Sequence[str]) -> set[str]:
        return set().union(*texts) - self.vocabulary.keys() if isinstance(self.raw.model, models.WordLevel) else set()

    def token_bytes(self) -> list[bytes | None]:
        return token_bytes(self.raw)

    def files(self) -> Mapping[str, bytes]:
        return {"tokenizer.json": self.raw.to_str(pretty=True).encode()}


def _encodes_chunks_apart(raw: tokenizers.Tokenizer) -> bool:
    """Whether texts are split by GPT-2's pattern or into characters, and nothing reads across the splits."""
    pre_tokenizer = json.loads(raw.pre_tokenizer.__getstate__()) if raw.pre_tokenizer else {}
    gpt2 = (
        pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer["use_regex"]
        and not pre_tokenizer["add_prefix_space"]
    )
    characters = pre_tokenizer.get("type") == "Split" and pre_tokenizer["pattern"] == {"Regex": EACH_CHARACTER}
    local = raw.normalizer is None and all(token.special for token in raw.get_added_tokens_decoder().values())
    return local and (gpt2 or characters)


def _hide_special_tokens(raw: tokenizers.Tokenizer, tokens: Sequence[str]) -> None:
    """Keeps a unigram model from finding special tokens in text: they are among its pieces, with the best scores.

    Splitting each spelling after its first character is enough. A tokenizer that has the split already stays as it is.
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
    """One language side of a ``PieceBackend``: a SentencePiece processor, which cuts text into pieces, and the ids of
    pieces."""

    processor: Any  # a sentencepiece.SentencePieceProcessor
    vocabulary: Mapping[str, int]

    @cached_property
    def tokens(self) -> dict[int, str]:
        return {index: token for token, index in self.vocabulary.items()}


class PieceBackend:
    """A ``TokenizerBackend`` for models that look up the pieces of SentencePiece in a vocabulary of their own: Marian
    (Junczys-Dowmunt et al., arXiv:1804.00344) and M2M-100. A piece that the vocabulary lacks becomes the unknown token,
    and so does a special token that a text spells."""

    special_tokens_are_exact = True
    encodes_chunks_apart = False
    cleans_up_spaces = True

    def __init__(
        self, source: PieceModel, target: PieceModel, special_tokens: Mapping[str, int], unknown: int,
        files: Mapping[str, bytes], marian: bool,
    ):
        """
        Args:
            source, target: the language translated from, and the language translated into.
            special_tokens: their ids.
            unknown: the id of the unknown token.
            files: the content of the files that the backend was read from, by name.
            marian: whether texts may begin with a language token such as ``>>de<<``, and texts are joined as in Marian.
        """
        self.vocabulary = source.vocabulary
        self.target_vocabulary = target.vocabulary
        self.special_tokens = special_tokens
        self._source, self._target = source, target
        self._unknown = unknown
        self._files = dict(files)
        self._marian = marian

    def encode(self, texts: Sequence[str], target: bool = False) -> Iterable[Sequence[int]]:
        model = self._target if target else self._source
        heads, bodies = [], []
        for text in texts:
            head = re.match(r">>.*?<<", text, re.DOTALL) if self._marian else None  # the language to translate into
            heads.append([head[0]] if head else [])
            bodies.append(text[head.end() :] if head else text)
        pieces = model.processor.encode(bodies, out_type=str) if bodies else []
        return ([self._id(model, piece) for piece in (*head, *body)] for head, body in zip(heads, pieces, strict=True))

    def _id(self, model: PieceModel, piece: str) -> int:
        return self._unknown if piece in self.special_tokens else model.vocabulary.get(piece, self._unknown)

    def encode_framed(self, texts: Sequence[str]) -> None:
        return None

    def encode_parsing_special(self, texts: Sequence[str]) -> Iterable[tuple[Sequence[int], Offsets]]:
        raise UserError("the tokenizer of a translation model finds no special tokens in text; give it plain text")

    def encode_parsing_spans(self, text: str, spans: Offsets) -> tuple[Sequence[int], Offsets]:
        return next(iter(self.encode_parsing_special([text])))  # raises

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        # As in transformers, the source's model joins the pieces where both languages share a vocabulary.
        shared = self._target.vocabulary is self.vocabulary
        processor = (self._source if shared else self._target).processor
        unknown = next(token for token, index in self.special_tokens.items() if index == self._unknown)
        out, run = "", []
        for token in (self._target.tokens.get(index, unknown) for index in ids):
            if token not in self.special_tokens:
                run.append(token)
            elif not skip_special:
                out += processor.decode(run) + token + (" " if self._marian else "")
                run = []
        out += processor.decode(run)
        return (out.replace("▁", " ") if self._marian else out).strip()

    def unknown_characters(self, texts: Sequence[str]) -> set[str]:
        return set()

    def token_bytes(self) -> list[bytes | None]:
        raise UserError("what the tokens of this tokenizer stand for depends on their neighbours; use another")

    def files(self) -> Mapping[str, bytes]:
        return self._files


def add_named_tokens(raw: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Adds the tokens whose ids tokenizer_config.json gives (``added_tokens_decoder``), lowest id first.

    Raises:
        UserError: when a token cannot have its id.
    """
    for index, token in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        added = _added_token(token)
        (raw.add_special_tokens if added.special else raw.add_tokens)([added])
        if raw.token_to_id(added.content) != int(index):
            raise UserError(_wrong_id(added.content, index, raw))


def _wrong_id(token: str, index: int | str, raw: tokenizers.Tokenizer) -> str:
    return (
        f"tokenizer_config.json gives {token!r} the id {index}, and by the vocabulary it has {raw.token_to_id(token)}; "
        "copy all files of the tokenizer again"
    )


def role_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens of a tokenizer_config.json that have a name, such as ``eos_token``: strings, or mappings with
    their ``content``. A mapping in ``extra_special_tokens`` names more."""
    found = {key: value for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    found |= extra if isinstance(extra, dict) else {}
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in found.items()}
    return {key: value for key, value in found.items() if contents[key] and isinstance(contents[key], str)}


def named_tokens(config: Mapping[str, Any]) -> list[str]:
    """All special tokens that a tokenizer_config.json gives: those with a name, and those that are only listed."""
    values = [*role_tokens(config).values(), *_listed_tokens(config)]
    return [value["content"] if isinstance(value, dict) else value for value in values]


def _listed_tokens(config: Mapping[str, Any]) -> Sequence[Any]:
    extra = config.get("extra_special_tokens") or ()
    return ([] if isinstance(extra, dict) else extra) or config.get("additional_special_tokens") or ()


def add_config_tokens(raw: tokenizers.Tokenizer, config: Mapping[str, Any], most: int | None) -> None:
    """Adds the tokens that tokenizer_config.json has and tokenizer.json lacks, and makes its special tokens special, in
    the order of transformers.

    Args:
        raw: what tokenizer.json holds.
        config: tokenizer_config.json.
        most: special tokens without an id of their own are left out where they would get this id or a higher one: the
            model has no row for them. None: nothing is known of the model.

    Raises:
        UserError: when a token of ``added_tokens_decoder`` cannot have its id.
    """
    known = {token.content: token for token in raw.get_added_tokens_decoder().values()}
    decoder = {int(index): _added_token(token) for index, token in (config.get("added_tokens_decoder") or {}).items()}
    roles = {_added_token(token).content for token in role_tokens(config).values()}
    for index, token in sorted(decoder.items()):
        token.special = token.special or token.content in roles
        if token.content in known and repr(known[token.content]) == repr(token):
            continue
        is_new = raw.token_to_id(token.content) is None
        raw.add_tokens([token])
        if is_new and raw.token_to_id(token.content) != index:
            raise UserError(_wrong_id(token.content, index, raw))
    by_content = {token.content: token for token in decoder.values()} or known
    for token in role_tokens(config).values():
        given = _added_token(token)
        _add_special(raw, by_content.get(given.content, given), most)
    for token in _listed_tokens(config):
        _add_special(raw, _added_token(token), most)


def _added_token(token: Any) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    return AddedToken(**{key: value for key, value in token.items() if key != "__type"})


def _add_special(raw: tokenizers.Tokenizer, token: AddedToken, most: int | None) -> None:
    if most is None or raw.token_to_id(token.content) is not None or raw.get_vocab_size() < most:
        raw.add_special_tokens([token])


def read_vocabulary(file: Path) -> dict[str, int]:
    """The ids of tokens from a vocab.json.

    Raises:
        UserError: when the file does not map tokens to ids.
    """
    content = read_json(file)
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in content.values()):
        raise UserError(f"{file} does not map tokens to ids; copy it again")
    try:
        check_ids(content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return content
