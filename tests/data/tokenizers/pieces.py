"""SentencePiece models trained on a few lines, and the directories of tokenizers that each family makes of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece

from jaxlm.data.tokenizers.languages import language_convention

ENGLISH = [
    "A man in a blue shirt is standing on a ladder cleaning a window.", "Two young girls are playing in the garden.",
    "The old woman doesn't know where the station is, does she?", "It costs 12.50 at the market (or 13, on Sundays)!",
    "Three dogs run through the deep snow near the big house.", "People walk along the street: nobody is in a hurry.",
]
GERMAN = [
    "Ein Mann in einem blauen Hemd steht auf einer Leiter und putzt ein Fenster.", "Zwei Mädchen spielen im Garten.",
    "Die alte Frau weiß nicht, wo der Bahnhof ist, oder?", "Auf dem Markt kostet es 12,50 (sonntags 13)!",
    "Drei Hunde laufen durch den tiefen Schnee am großen Haus.", "Über die Straße gehen Leute: niemand hat es eilig.",
]


def trained(lines: list[str], kind: str, size: int, **options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3), model_writer=model, model_type=kind, vocab_size=size, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, **options,
    )
    return model.getvalue()


BPE = trained(ENGLISH + GERMAN, "bpe", 220)
UNIGRAM = trained(ENGLISH + GERMAN, "unigram", 180)
TARGET = trained(GERMAN, "unigram", 120)
T5 = trained(ENGLISH + GERMAN, "unigram", 180, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
LLAMA = trained(
    ENGLISH + GERMAN, "bpe", 480, byte_fallback=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
)
GEMMA = trained(
    ENGLISH + GERMAN, "bpe", 480, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
    remove_extra_whitespaces=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["<turn>", "▁▁"],
)


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def vocabulary(*models: bytes, extra: tuple[str, ...] = ()) -> bytes:
    """A vocab.json that lacks the last pieces of each model."""
    tokens = dict.fromkeys(("<s>", "<pad>", "</s>", "<unk>"))
    for model in map(processor, models):
        tokens |= dict.fromkeys(model.id_to_piece(i) for i in range(3, len(model) - 8))
    return json.dumps({token: i for i, token in enumerate((*tokens, *extra))}).encode()


def write(directory: Path, files: dict[str, bytes], **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def nllb_tokens() -> dict[str, dict]:
    first = len(processor(BPE)) + 1
    codes = language_convention("NllbTokenizer", {}).codes
    plain = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    tokens = {str(first + i): {"content": code, **plain} for i, code in enumerate(codes)}
    return tokens | {str(first + len(codes)): {"content": "<mask>", **plain, "normalized": True, "lstrip": True}}


FAMILIES = {
    "NllbTokenizer": (
        {"sentencepiece.bpe.model": BPE},
        {"src_lang": "deu_Latn", "tgt_lang": "fra_Latn", "added_tokens_decoder": nllb_tokens()},
    ),
    "MBartTokenizer": ({"sentencepiece.bpe.model": UNIGRAM}, {"src_lang": "de_DE", "tgt_lang": "fr_XX"}),
    "MBart50Tokenizer": ({"sentencepiece.bpe.model": UNIGRAM}, {"src_lang": "de_DE", "tgt_lang": "fr_XX"}),
    "M2M100Tokenizer": (
        {"sentencepiece.bpe.model": BPE, "vocab.json": vocabulary(BPE)},
        {
            "src_lang": "de", "tgt_lang": "fr",
            "additional_special_tokens": [f"__{code}__" for code in language_convention("M2M100Tokenizer", {}).codes],
        },
    ),
    "MarianTokenizer": (
        {"source.spm": UNIGRAM, "target.spm": TARGET, "vocab.json": vocabulary(UNIGRAM, TARGET, extra=(">>deu<<",))},
        {"source_lang": "en", "target_lang": "de", "clean_up_tokenization_spaces": True},
    ),
    "T5Tokenizer": ({"spiece.model": T5}, {"extra_ids": 100, "clean_up_tokenization_spaces": True}),
    "LlamaTokenizer": ({"tokenizer.model": LLAMA}, {"add_bos_token": True, "add_eos_token": False}),
}


def family(name: str, directory: Path, **config) -> Path:
    files, usual = FAMILIES[name]
    return write(directory, files, tokenizer_class=name, **usual, **config)
