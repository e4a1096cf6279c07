"""Reads SentencePiece models (Kudo and Richardson, arXiv:1808.06226) as the tokenizers of Hugging Face directories.

A model file holds pieces with scores, and the rules that normalise text. How a directory uses it depends on the class
that tokenizer_config.json names: T5 appends sentinels, the fairseq models (NLLB, mBART) move every id and append
languages, Marian and M2M-100 look up pieces in a vocab.json. Where a class of transformers 5 normalises or splits text
differently from SentencePiece (mostly white space), this module follows the class; pieces, scores, merges and the
unknown piece come from the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.backends import (
    FastBackend,
    PieceBackend,
    PieceModel,
    add_named_tokens,
    named_tokens,
    read_vocabulary,
)
from jaxlm.data.tokenizers.languages import language_convention
from jaxlm.data.tokenizers.limits import library_errors

_SPACE = "▁"  # stands for a space in pieces
_BPE, _UNIGRAM = 2, 1  # trainer_spec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of pieces
_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
_FAIRSEQ_FAMILIES = ("NllbTokenizer", "MBartTokenizer", "MBart50Tokenizer")
_SENTINELS = 100  # of T5, if extra_ids is not given


def convert(file: Path, family: str, config: Mapping[str, Any]) -> FastBackend:
    """A tokenizer from a SentencePiece model.

    Args:
        file: the model.
        family: the tokenizer class, without "Fast". The ids of a tokenizer.model of an unknown class are those of the
            model.
        config: tokenizer_config.json.

    Raises:
        UserError: when the file is damaged or no SentencePiece model, when it does not suit the class, or when the
            class is unknown and the file is no tokenizer.model.
    """
    if file.name != "tokenizer.model" and family not in ("T5Tokenizer", *_FAIRSEQ_FAMILIES):
        raise UserError(
            f"{file}: which ids {family or 'a class that no file names'} gives to pieces is not known here; save the "
            "tokenizer with transformers, which writes a tokenizer.json"
        )
    with library_errors(f"{file} cannot be used as a SentencePiece model"):  # protobuf's errors are of all kinds too
        return FastBackend(_convert(read_model(file), family, config))


def read_model(file: Path) -> Any:
    """The ``ModelProto`` in a file.

    Raises:
        UserError: when the file holds no complete BPE or unigram model.
    """
    from sentencepiece import sentencepiece_model_pb2

    processor(file)  # checks what parsing does not check: the table of the normaliser, duplicate pieces
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    if not model.HasField("trainer_spec") or not model.HasField("normalizer_spec"):
        raise UserError(f"{file} is cut off; copy it again")
    if model.trainer_spec.model_type not in (_BPE, _UNIGRAM):
        raise UserError(f"{file} is neither a BPE nor a unigram model; use one of these")
    return model


def processor(file: Path) -> Any:
    """A ``SentencePieceProcessor``.

    Raises:
        UserError: when the file is not a SentencePiece model.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        made = SentencePieceProcessor()
        made.LoadFromSerializedProto(file.read_bytes())
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{file} is not a SentencePiece model ({line}); copy it again") from None
    return made


def _convert(model: Any, family: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    fairseq = family in _FAIRSEQ_FAMILIES
    languages = language_convention(family, config)
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    if fairseq:
        if kinds[:3] != [_UNKNOWN, _CONTROL, _CONTROL]:
            raise ValueError(f"it begins with {[piece for piece, _ in pieces[:3]]}, not <unk>, <s> and </s>")
        pieces = [*((token, 0.0) for token in _FAIRSEQ), *pieces[3:]]
        kinds = [_CONTROL, _CONTROL, _CONTROL, _UNKNOWN, *kinds[3:]]
    specials = [
        AddedToken(piece, special=True, normalized=False)
        for (piece, _), kind in zip(pieces, kinds, strict=True) if kind in (_UNKNOWN, _CONTROL)
    ]
    appended: list[AddedToken] = []
    if family == "T5Tokenizer" and not any("<extra_id_0>" in piece for piece, _ in pieces[-_SENTINELS:]):
        count = _SENTINELS if config.get("extra_ids") is None else config["extra_ids"]
        appended = [AddedToken(f"<extra_id_{i}>", special=True, normalized=False) for i in range(count - 1, -1, -1)]
    elif fairseq and languages:
        appended = [AddedToken(code, special=True, normalized=False) for code in languages.codes]
        appended.append(AddedToken("<mask>", special=True, normalized=False, lstrip=True))

    unknown = kinds.index(_UNKNOWN)
    fallback = model.trainer_spec.byte_fallback
    if model.trainer_spec.model_type == _BPE:
        ids = {piece: index for index, (piece, _) in enumerate(pieces)}
        normal = {piece: (-score, ids[piece]) for (piece, score), kind in zip(pieces, kinds, strict=True)
                  if kind == _NORMAL}
        raw = tokenizers.Tokenizer(models.BPE(
            ids, _merges(normal), unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=fallback
        ))
    else:
        # transformers' classes look for these among the pieces of a unigram model
        pieces += [(token.content, 0.0) for token in appended]
        raw = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=fallback))
    add_named_tokens(raw, config)
    escaped = not _prefixed(model.normalizer_spec, config)  # the normaliser has replaced spaces by _SPACE
    described = {token.content for token in raw.get_added_tokens_decoder().values()}
    raw.add_special_tokens([token for token in (*specials, *appended) if token.content not in described])
    raw.add_tokens([
        AddedToken(piece, special=False, normalized=escaped and _SPACE in piece)
        for (piece, _), kind in zip(pieces, kinds, strict=False) if kind == _USER_DEFINED
    ])
    _add_pipeline(raw, model.normalizer_spec, family, config)
    return raw


def _merges(normal: Mapping[str, tuple[float, int]]) -> list[tuple[str, str]]:
    """The pairs of pieces in the order in which BPE merges them: the pair with the best score of its result first.
    ``normal`` has the rank of each piece that can take part."""
    ranked = []
    for piece, rank in normal.items():
        for split in range(1, len(piece)):
            left, right = piece[:split], piece[split:]
            if left in normal and right in normal:
                ranked.append((rank, len(left), (left, right)))
    return [pair for _, _, pair in sorted(ranked)]


def _add_pipeline(raw: tokenizers.Tokenizer, spec: Any, family: str, config: Mapping[str, Any]) -> None:
    """Adds the normaliser, the pre-tokenizer and the decoder, and T5's end token."""
    charsmap = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    single = normalizers.Replace(Regex(" {2,}"), " ")
    whole = family not in (*_FAIRSEQ_FAMILIES, "T5Tokenizer")
    prefix = _prefixed(spec, config)
    before: list[Any] = []
    if whole:  # text is one run of pieces
        trim = [normalizers.Strip(), single] if spec.remove_extra_whitespaces else []
        steps = [*charsmap, *trim]
        if prefix:
            scheme = "always" if config.get("legacy") else "first"
            before = [pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)]
        else:
            steps.append(normalizers.Replace(" ", _SPACE))
        decoder = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        raw.decoder = decoders.Sequence([*decoder, decoders.Strip(" ", 1, 0)] if prefix else decoder)
    else:  # text is words
        steps = {
            "T5Tokenizer": charsmap, "MBartTokenizer": [], "MBart50Tokenizer": [*charsmap, single],
        }.get(family, [*charsmap, single] if charsmap else [])
        if family in ("T5Tokenizer", "MBartTokenizer"):
            before.append(pre_tokenizers.WhitespaceSplit())
        before.append(pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always", split=True))
        raw.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always", split=True)
    if steps:
        raw.normalizer = normalizers.Sequence(steps)
    if before:
        raw.pre_tokenizer = pre_tokenizers.Sequence(before)
    if family == "T5Tokenizer":
        raw.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", raw.token_to_id("</s>"))]
        )


def _prefixed(spec: Any, config: Mapping[str, Any]) -> bool:
    prefix = config.get("add_prefix_space")
    return spec.add_dummy_prefix if prefix is None else prefix


def read_marian(directory: Path, config: Mapping[str, Any]) -> PieceBackend:
    """Marian's tokenizer, from source.spm, target.spm and vocab.json (and target_vocab.json with separate
    vocabularies)."""
    names = ["source.spm", "target.spm", "vocab.json"]
    separate = bool(config.get("separate_vocabs"))
    vocabulary = read_vocabulary(directory / "vocab.json")
    target_vocabulary = vocabulary
    if separate:
        names.append("target_vocab.json")
        target_vocabulary = read_vocabulary(directory / "target_vocab.json")
    source = PieceModel(processor(directory / "source.spm"), vocabulary)
    target = PieceModel(processor(directory / "target.spm"), target_vocabulary)
    return _piece_backend(directory, names, source, target, config, marian=True)


def read_m2m(directory: Path, config: Mapping[str, Any]) -> PieceBackend:
    """M2M-100's tokenizer, from sentencepiece.bpe.model and vocab.json. The ids of languages follow those of
    vocab.json."""
    vocabulary = read_vocabulary(directory / "vocab.json")
    first = len(vocabulary)
    codes = [f"__{code}__" for code in language_convention("M2M100Tokenizer", config).codes]
    side = PieceModel(
        processor(directory / "sentencepiece.bpe.model"),
        vocabulary | {code: first + i for i, code in enumerate(codes)},
    )
    return _piece_backend(directory, ["sentencepiece.bpe.model", "vocab.json"], side, side, config, codes=codes)


def _piece_backend(
    directory: Path, names: Sequence[str], source: PieceModel, target: PieceModel, config: Mapping[str, Any],
    codes: Sequence[str] = (), marian: bool = False,
) -> PieceBackend:
    tokens = named_tokens(config)
    vocabulary = source.vocabulary
    for token in ("<unk>", "</s>", "<pad>"):
        if token not in vocabulary:
            raise UserError(f"{directory / 'vocab.json'} has no {token}; copy it again")
    tokens += ["<unk>", "</s>", "<pad>", *codes]
    specials = {token: vocabulary[token] for token in tokens if token in vocabulary}
    files = {name: (directory / name).read_bytes() for name in names}
    return PieceBackend(source, target, specials, vocabulary["<unk>"], files, marian)
