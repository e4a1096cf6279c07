"""SentencePiece models as Hugging Face directories mean them: against ``sentencepiece`` and transformers' classes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.languages import language_convention
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from tests.data.tokenizers.pieces import (
    BPE,
    ENGLISH,
    FAMILIES,
    GEMMA,
    GERMAN,
    LLAMA,
    T5,
    TARGET,
    UNIGRAM,
    family,
    processor,
    trained,
    vocabulary,
    write,
)

STRANGE = [
    "", " ", "a", " a", "a ", "  two  spaces ", "a\tb", "a\nb\r\n", "\n", "ﬁ ﬀ Å A\u030a ①", "日本語 テスト 中文",
    "a\u200bb\u200d\ufeff", "\x00\x07\x1b[0m", "😀 👩\u200d👩\u200d👧 🇩🇪", "naïve größe", "e\u0301 o\u0308", "▁x ▁▁ y",
    "<0x41>", "…—“”‘’", "a\u00a0b\u3000c", "~{}|`<", "\u0e01\u0e33", "नमस्ते", "x" * 300, "12,345.67",
]
SPELLED = "<s> </s> <unk> <pad> <mask> <extra_id_0> en_XX de_DE deu_Latn __de__ >>deu<<"


def contents(file: Path):
    """What is in a file; the library changes the last digits of scores when it reads its own."""
    if file.name != "tokenizer.json":
        return file.read_bytes()
    content = json.loads(file.read_text("utf-8"))
    if content["model"]["type"] == "Unigram":
        content["model"]["vocab"] = [(piece, round(score, 9)) for piece, score in content["model"]["vocab"]]
    return content


@pytest.mark.parametrize("name", FAMILIES)
def test_families_agree_with_transformers(name, tmp_path):
    """Ids and text, what encoder and decoder read, and the same again of what ``save`` wrote, which both read."""
    transformers = pytest.importorskip("transformers")
    directory = family(name, tmp_path / "given")
    ours = Tokenizer.load(directory)
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    original = getattr(transformers, name).from_pretrained(directory)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(saved) is type(original)
    for tokenizer, theirs in ((ours, original), (again, saved)):
        for text in ENGLISH + GERMAN + STRANGE[1:]:
            ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert tokenizer.encode(text) == ids, text
            assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
            assert tokenizer.decode(ids[1:]) == theirs.decode(ids[1:], skip_special_tokens=True), text
        texts = ENGLISH + STRANGE[1:] + [">>deu<< How  are you", ">>xyz<<x", ">> <"]
        rows = theirs(texts, split_special_tokens=True)["input_ids"]
        if name == "LlamaTokenizer":
            assert [tokenizer.encode_prompt(text, parse_special=False) for text in texts] == rows
            assert rows[0][0] == tokenizer.bos_id
        else:
            assert tokenizer.encode_source(texts) == rows
            rows = theirs(text_target=GERMAN)["input_ids"]
            assert tokenizer.encode_target(GERMAN) == rows
            assert [tokenizer.decode(row) for row in rows] == theirs.batch_decode(rows, skip_special_tokens=True)
            assert tokenizer.encode_target([]) == []
        for role in ("pad", "eos"):
            assert getattr(tokenizer, f"{role}_id") == getattr(theirs, f"{role}_token_id")
    assert ours.vocab_size == again.vocab_size and ours.languages == again.languages
    again.save(tmp_path / "twice")
    for file in (tmp_path / "saved").iterdir():
        assert contents(tmp_path / "twice" / file.name) == contents(file)
    assert ours.encode_batch(ENGLISH) == [ours.encode(text) for text in ENGLISH]


@pytest.mark.parametrize("name", [name for name in FAMILIES if "src_lang" in FAMILIES[name][1]])
def test_a_language_can_be_named(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(family(name, tmp_path))
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    assert set(ours.languages) == set(language_convention(name, {}).codes)
    for language in (list(ours.languages)[0], list(ours.languages)[-1]):
        theirs.src_lang = theirs.tgt_lang = language
        assert ours.encode_source(ENGLISH, language) == theirs(ENGLISH)["input_ids"]
        assert ours.encode_target(ENGLISH, language) == theirs(text_target=ENGLISH)["input_ids"]
        assert ours.languages[language] in ours.encode_source(ENGLISH, language)[0]


def test_nllb_as_it_once_was(tmp_path):
    transformers = pytest.importorskip("transformers")
    family("NllbTokenizer", tmp_path, legacy_behaviour=True)
    theirs = transformers.NllbTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.encode_source(ENGLISH) == theirs(ENGLISH)["input_ids"]
    assert ours.encode_source(["a"])[0][-2:] == [ours.eos_id, ours.languages["deu_Latn"]]


def test_nllb_without_a_config_has_its_languages_after_the_pieces(tmp_path):
    write(tmp_path, {"sentencepiece.bpe.model": BPE, "config.json": b'{"model_type": "m2m_100", "eos_token_id": 2}'})
    tokenizer = Tokenizer.load(tmp_path)
    first = len(processor(BPE)) + 1
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.languages["ace_Arab"] == first and tokenizer.languages["zul_Latn"] == first + 201
    assert tokenizer.vocab_size == first + 203, "the mask comes last"
    assert tokenizer.encode("the") == [i + 1 for i in processor(BPE).encode("the")]
    assert tokenizer.encode_source(["a"])[0][0] == tokenizer.languages["eng_Latn"]
    with pytest.raises(UserError, match="say which language to translate into: one of ace_Arab, ace_Latn"):
        tokenizer.encode_target(["a"])


def test_marian_with_a_vocabulary_a_side(tmp_path):
    transformers = pytest.importorskip("transformers")
    files = {
        "source.spm": UNIGRAM, "target.spm": TARGET, "vocab.json": vocabulary(UNIGRAM),
        "target_vocab.json": vocabulary(TARGET),
    }
    write(tmp_path, files, tokenizer_class="MarianTokenizer", separate_vocabs=True)
    ours, theirs = Tokenizer.load(tmp_path), transformers.MarianTokenizer.from_pretrained(tmp_path)
    assert ours.encode_source(ENGLISH) == theirs(ENGLISH)["input_ids"]
    rows = theirs(text_target=GERMAN)["input_ids"]
    assert ours.encode_target(GERMAN) == rows
    assert [ours.decode(row) for row in rows] == theirs.batch_decode(rows, skip_special_tokens=True)


def test_marian_by_hand(tmp_path):
    """Without transformers: ids are vocab.json's, the two sides have models of their own, unknown pieces are <unk>."""
    tokenizer = Tokenizer.load(family("MarianTokenizer", tmp_path))
    ids = json.loads(FAMILIES["MarianTokenizer"][0]["vocab.json"])
    for model, rows in ((UNIGRAM, tokenizer.encode_source(GERMAN)), (TARGET, tokenizer.encode_target(GERMAN))):
        pieces = processor(model).encode(GERMAN, out_type=str)
        assert rows == [[*(ids.get(piece, 3) for piece in row), 2] for row in pieces]
    assert tokenizer.encode_source(GERMAN) != tokenizer.encode_target(GERMAN)
    assert tokenizer.encode(">>deu<<a")[0] == ids[">>deu<<"] and tokenizer.encode(">>fra<<a")[0] == 3
    assert tokenizer.decode(tokenizer.encode_source(["A man, in the garden."])[0]) == "A man, in the garden."
    assert tokenizer.languages == {}
    with pytest.raises(UserError, match="the tokenizer has no languages, so 'de' cannot be chosen"):
        tokenizer.encode_source(["a"], "de")


@pytest.mark.parametrize("name", FAMILIES)
def test_text_cannot_spell_special_tokens(name, tmp_path):
    tokenizer = Tokenizer.load(family(name, tmp_path))
    unknown = tokenizer.encode("\U000fffff")[-1]
    others = {*tokenizer.languages.values(), tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} - {unknown, None}
    sentinels = {tokenizer.vocab_size - 1 - i for i in range(100)} if name == "T5Tokenizer" else set()
    tokenizer.save(tmp_path / "saved")
    for each in (tokenizer, Tokenizer.load(tmp_path / "saved")):
        for text in (SPELLED, SPELLED.replace(" ", ""), SPELLED.replace(" ", "a")):
            assert not set(each.encode(text)) & (others | sentinels)


def test_unigrams_of_others_hide_their_special_tokens_too(tmp_path):
    """A tokenizer.json as transformers writes it: the model knows </s> as a piece."""
    raw = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0))
    raw.add_special_tokens(["</s>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("a</s>a") == [2, 0, 0, 2]
    assert Tokenizer.load(tmp_path).encode_prompt("a</s>a") == [2, 1, 2]


def test_t5_sentinels_descend_after_the_pieces(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path, {"spiece.model": T5}))
    pieces = len(processor(T5))
    assert tokenizer.vocab_size == pieces + 100
    ids = tokenizer.encode("<extra_id_0> a<extra_id_99>", parse_special=True)
    assert ids[0] == pieces + 99 and ids[-1] == pieces
    assert tokenizer.encode_source(["the house"]) == [[*processor(T5).encode("the house"), 1]]
    assert Tokenizer.load(write(tmp_path / "few", {"spiece.model": T5}, extra_ids=3)).vocab_size == pieces + 3
    assert Tokenizer.load(tmp_path / "few" / "spiece.model").vocab_size == pieces + 3, "the file may be named"


@pytest.mark.parametrize("model", [LLAMA, GEMMA], ids=["prefix", "no prefix"])
def test_decoders_read_as_sentencepiece_does(model, tmp_path):
    """All but a space at the start, where transformers' classes put no second one; byte fallback included."""
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": model}))
    expected = processor(model)
    assert tokenizer.vocab_size == len(expected)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (expected.bos_id(), expected.eos_id())
    assert tokenizer.encode_prompt("the house") == [expected.bos_id(), *expected.encode("the house")]
    for text in ENGLISH + GERMAN + STRANGE:
        if model is LLAMA and text.startswith((" ", "▁")):
            continue
        assert tokenizer.encode(text) == expected.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == expected.decode(expected.encode(text)), text
    if model is GEMMA:
        assert tokenizer.encode("a<turn>b") == expected.encode("a<turn>b")
        assert tokenizer.decode(tokenizer.encode("a<turn>  b")) == "a<turn>  b"


@settings(max_examples=150)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_byte_fallback_round_trips(text):
    text = text.lstrip(" ")
    assert ROUND.decode(ROUND.encode(text)) == text


@settings(max_examples=100)
@given(st.lists(st.text(sorted(set("".join(ENGLISH + GERMAN)) - {" "}), min_size=1)))
def test_words_round_trip_through_unigrams(words):
    text = " ".join(words)
    assert WORDS.decode(WORDS.encode(text)) == text


@pytest.fixture(scope="module", autouse=True)
def _loaded(tmp_path_factory):
    global ROUND, WORDS
    ROUND = Tokenizer.load(write(tmp_path_factory.mktemp("llama"), {"tokenizer.model": LLAMA}))
    WORDS = Tokenizer.load(write(tmp_path_factory.mktemp("t5"), {"spiece.model": T5}))


def test_added_tokens(tmp_path):
    size = len(processor(LLAMA))
    added = {str(size): {"content": "<pad>", "special": True}, str(size + 1): {"content": "[tag]", "special": False}}
    files = {"tokenizer.model": LLAMA}
    tokenizer = Tokenizer.load(write(tmp_path / "a", files, added_tokens_decoder=added, pad_token="<pad>"))
    assert tokenizer.pad_id == size and tokenizer.encode("[tag]")[-1] == size + 1
    assert min(tokenizer.encode("<pad>")) < size
    older = {"added_tokens.json": json.dumps({"<pad>": size, "[tag]": size + 1}).encode(),
             "special_tokens_map.json": b'{"pad_token": {"content": "<pad>", "lstrip": false}}'}
    again = Tokenizer.load(write(tmp_path / "b", files | older))
    assert again.pad_id == size and again.encode("a[tag] <pad>") == tokenizer.encode("a[tag] <pad>")
    again.save(tmp_path / "c")
    assert Tokenizer.load(tmp_path / "c").encode("a[tag] <pad>") == tokenizer.encode("a[tag] <pad>")
    added[str(size + 5)] = added.pop(str(size + 1))
    with pytest.raises(UserError, match=rf"gives '\[tag\]' the id {size + 5}, and by the vocabulary it has {size + 1}"):
        Tokenizer.load(write(tmp_path / "d", files, added_tokens_decoder=added))


def test_damaged_files_are_named(tmp_path):
    file = tmp_path / "tokenizer.model"
    half = len(LLAMA) // 2
    for content in (b"", b"{}", b"not a model", LLAMA[:half], LLAMA[:-3], LLAMA[:40], b"IQ== 0\nIg== 1\n" * 9):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.model (is|cannot be|holds)") as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)
    model = sentencepiece_model_pb2.ModelProto.FromString(UNIGRAM)
    model.normalizer_spec.precompiled_charsmap = b"\xff" * 50
    file.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"tokenizer\.model (is not|cannot)"):
        Tokenizer.load(tmp_path)
    file.write_bytes(trained(ENGLISH, "char", 60))
    with pytest.raises(UserError, match=r"tokenizer\.model is neither a BPE nor a unigram model"):
        Tokenizer.load(tmp_path)
    write(tmp_path / "nllb", {"sentencepiece.bpe.model": T5}, tokenizer_class="NllbTokenizer")
    with pytest.raises(UserError, match=r"sentencepiece\.bpe\.model cannot be used .*\(it begins with \['<pad>'"):
        Tokenizer.load(tmp_path / "nllb")


def test_damaged_vocabularies_are_named(tmp_path):
    files, _ = FAMILIES["MarianTokenizer"]
    for content, problem in (
        (b"{", r"vocab\.json cannot be read as JSON \("), (b"[1]", r"vocab\.json does not hold a JSON object"),
        (b'{"a": -1}', r"vocab\.json does not map tokens to ids"), (b'{"a": 1}', r"vocab\.json has no <unk>"),
        (b'{"<unk>": "x"}', r"vocab\.json does not map tokens to ids"),
        (b'{"<unk>": 2000000000}', r"vocab\.json: the tokenizer gives '<unk>' the id 2000000000, and has 1 tokens"),
    ):
        with pytest.raises(UserError, match=problem):
            Tokenizer.load(write(tmp_path, files | {"vocab.json": content}))
    with pytest.raises(UserError, match=r"target\.spm is not a SentencePiece model"):
        Tokenizer.load(write(tmp_path, files | {"target.spm": b"x"}))


def test_ids_are_not_guessed(tmp_path):
    write(tmp_path, {"sentencepiece.bpe.model": UNIGRAM}, tokenizer_class="XLMRobertaTokenizer")
    with pytest.raises(UserError, match="which ids XLMRobertaTokenizer gives to pieces is not known here; save the"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("config", "problem"), [
    ({"pad_token": [1]}, r"tokenizer_config\.json: pad_token is \[1\]; name a token"),
    ({"src_lang": {"a": 1}}, r"tokenizer_config\.json: src_lang is \{'a': 1\}; name a token"),
    ({"extra_ids": 10**9}, r"tokenizer_config\.json: extra_ids is 1000000000; give a number up to 10,000"),
    ({"added_tokens_decoder": {"x": {}}}, r"tokenizer\.model cannot be used|makes no sense \(ValueError"),
    ({"added_tokens_decoder": [1]}, r"tokenizer\.model cannot be used|makes no sense \(AttributeError"),
])
def test_configs_that_make_no_sense(config, problem, tmp_path):
    with pytest.raises(UserError, match=problem) as caught:
        Tokenizer.load(write(tmp_path, {"tokenizer.model": LLAMA}, **config))
    assert "\n" not in str(caught.value)


def test_unknown_languages_are_answered_with_near_ones(tmp_path):
    tokenizer = Tokenizer.load(family("NllbTokenizer", tmp_path))
    with pytest.raises(UserError, match="no language 'deu_latn'; did you mean deu_Latn or"):
        tokenizer.encode_source(["a"], "deu_latn")
    with pytest.raises(UserError, match="no language 'klingon'; did you mean"):
        tokenizer.encode_target(["a"], "klingon")


def lines(shared: Path) -> list[str]:
    """A few thousand lines of English, German and French, and of verse."""
    found = (shared / "data" / "tinyshakespeare.txt").read_text("utf-8").split("\n")[:1200]
    for language in ("en", "de", "fr"):
        with gzip.open(shared / "data" / "multi30k" / f"val.{language}.gz", "rt", encoding="utf-8") as file:
            found += file.read().split("\n")[:600]
    return [line for line in found if line]


def test_llama_2(shared, tmp_path):
    model = (shared / "models" / "tokenizers" / "llama2.model").read_bytes()
    tokenizer = Tokenizer.load(write(tmp_path / "given", {"tokenizer.model": model}))
    expected = processor(model)
    texts = [text for text in lines(shared) + STRANGE if not text.startswith((" ", "▁"))]
    ids = expected.encode(texts)
    assert tokenizer.encode_batch(texts) == ids
    assert [tokenizer.decode(row) for row in ids] == [expected.decode(row) for row in ids]
    assert tokenizer.encode_prompt("Hello") == [1, 15043]
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts += [text for text in STRANGE if text]
    rows = theirs(texts, split_special_tokens=True)["input_ids"]
    assert [tokenizer.encode_prompt(text) for text in texts] == rows
    assert [tokenizer.decode(row) for row in rows] == theirs.batch_decode(rows, skip_special_tokens=True)
    text = "<s>[INST] a [/INST] b </s><s>x"
    assert tokenizer.encode(text, parse_special=True) == theirs(text, add_special_tokens=False)["input_ids"]


def test_real_t5(shared, tmp_path):
    """This model has a <s> at 2 and its unknown piece at 3, where transformers takes 2 for unknown."""
    model = (shared / "models" / "tokenizers" / "t5_spiece.model").read_bytes()
    tokenizer = Tokenizer.load(write(tmp_path, {"spiece.model": model}, tokenizer_class="T5Tokenizer", extra_ids=0))
    expected = processor(model)
    texts = lines(shared) + STRANGE[1:]
    assert tokenizer.vocab_size == 32101 and expected.unk_id() == 3
    ids = tokenizer.encode_batch(texts)
    plain = [i for i, text in enumerate(texts) if "▁" not in text]
    assert [ids[i] for i in plain] == expected.encode([texts[i] for i in plain])
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    rows = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [[2 if i == 3 else i for i in row] for row in ids] == rows
    assert [tokenizer.decode(row) for row in rows] == theirs.batch_decode(rows, skip_special_tokens=True)
