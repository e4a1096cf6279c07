"""Tokenizers: exact round trips, determinism, and agreement with transformers."""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import UserError
from jaxlm.data.config import DataConfig
from jaxlm.data.sources.text_chunks import text_chunks
from jaxlm.data.sources.types import Documents, Tokens
from jaxlm.data.tokenizers.from_config import tokenizer_from_config
from jaxlm.data.tokenizers.tokenizer import Tokenizer

CORPUS = [
    "the cat sat on the mat. the cat's hat, it'll do!\n\nThe  rat ran   after\tthe cat\n" * 20,
    "größe läßt 12 und 345\n" * 9,
]
BPE = Tokenizer.train(CORPUS, vocab_size=300)
CHAR = Tokenizer.train(CORPUS, "char")
TRICKY = "a<s> </s><pad>\ufeff \r\n\x00\u2028 😀 e\u0301 \u00a0the cat's"
NAMED = ("<pad>", "<s>", "</s>")
SHARED = Path(os.environ.get("JAXLM_SHARED", "shared"))


@given(st.text())
def test_bytes_round_trip(text):
    assert BPE.decode(BPE.encode(text)) == text


def test_specials_in_text_are_text():
    assert BPE.decode(BPE.encode(TRICKY)) == TRICKY
    assert min(BPE.encode(TRICKY)) > 2
    assert (BPE.pad_id, BPE.bos_id, BPE.eos_id) == (0, 1, 2)
    ids = [1, *BPE.encode("the cat"), 2, 0]
    assert BPE.decode(ids) == "the cat"
    assert BPE.decode(np.array(ids), skip_special=False) == "<s>the cat</s><pad>"


def test_vocabulary_sizes():
    assert BPE.vocab_size == 300
    assert Tokenizer.train(["aa"], vocab_size=5000).vocab_size == 260, "no more pairs to merge: smaller than asked"
    assert CHAR.vocab_size == 3 + len(set("".join(CORPUS)))
    with pytest.raises(UserError, match="a vocabulary of 258 is too small for byte-level BPE; give at least 259"):
        Tokenizer.train(CORPUS, vocab_size=258)


@given(st.text(alphabet=sorted(set("".join(CORPUS)))))
def test_characters_are_one_token_each(text):
    ids = CHAR.encode(text)
    assert len(ids) == len(text) and CHAR.decode(ids) == text
    assert min(ids, default=3) >= 3


def test_unknown_characters_are_named():
    message = r"the character tokenizer does not know 'q' \(U\+0071\), 'é' \(U\+00E9\); train it on text that has them"
    for encode in (CHAR.encode, lambda text: CHAR.encode_flat(["fine", text])):
        with pytest.raises(UserError, match=message):
            encode("the qué cat")


@settings(max_examples=200)
@given(st.text(alphabet=st.sampled_from("at'sl1. \n\r\t\u2028\u00a0\u0085é,"), max_size=80))
def test_pieces_do_not_change_tokens(text):
    """What makes encoding a large text in parallel exact."""
    for tokenizer in (BPE, Tokenizer.train([text], "char")):
        apart = [i for piece in text_chunks(text, 1) for i in tokenizer.encode(piece)]
        assert apart == tokenizer.encode(text)


def test_batches_equal_single():
    texts = ["", *CORPUS, "x", "", CORPUS[0] * 200, ""]
    expected = [BPE.encode(text) for text in texts]
    ids, lengths = BPE.encode_flat(texts)
    assert ids.dtype == np.uint16 and ids.tolist() == sum(expected, [])
    assert lengths.tolist() == list(map(len, expected))
    assert BPE.encode_batch(texts) == expected
    assert BPE.encode_batch([]) == [] and BPE.encode_batch([""]) == [[]]
    assert CHAR.encode_batch(CORPUS) == [CHAR.encode(text) for text in CORPUS]


def test_training_is_deterministic(tmp_path):
    script = (
        "import sys, json; from jaxlm.data.tokenizers.tokenizer import Tokenizer\n"
        "Tokenizer.train(json.load(sys.stdin), vocab_size=300).save(sys.argv[1])"
    )
    BPE.save(tmp_path / "here")
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "there")], input=json.dumps(CORPUS), text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


@pytest.mark.parametrize("tokenizer", [BPE, CHAR], ids=["bpe", "char"])
def test_saved_tokenizers_load_here_and_in_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path / "new" / "dir")
    again = Tokenizer.load(tmp_path / "new" / "dir")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new" / "dir")
    for text in CORPUS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids == theirs(text)["input_ids"]
        assert theirs.decode(ids) == tokenizer.decode(ids) == text
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert (again.pad_id, again.bos_id, again.eos_id, again.vocab_size) == (0, 1, 2, len(theirs))
    assert Tokenizer.load(tmp_path / "new" / "dir" / "tokenizer.json").eos_id == 2


def roles(directory, tokenizer_config=None, config=None):
    """(pad, bos, eos) of a tokenizer with <|endoftext|> beside our specials, given the files next to it."""
    Tokenizer.train(CORPUS, vocab_size=300).save(directory)
    (directory / "tokenizer_config.json").unlink()
    for name, content in (("tokenizer_config.json", tokenizer_config), ("config.json", config)):
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    loaded = Tokenizer.load(directory)
    return loaded.pad_id, loaded.bos_id, loaded.eos_id


def test_where_special_tokens_are_found(tmp_path):
    assert roles(tmp_path) == (0, 1, 2), "by their usual names"
    config = {"bos_token_id": 2, "eos_token_id": [0, 1], "pad_token_id": None}
    assert roles(tmp_path, None, config) == (None, 2, 0), "config.json has ids"
    named = {"bos_token": "</s>", "eos_token": {"content": "</s>"}, "pad_token": "<absent>"}
    assert roles(tmp_path, named, config) == (None, 2, 2), "tokenizer_config.json has names, and comes first"


def test_padding_and_truncation_in_the_file_do_not_apply(tmp_path):
    BPE.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    file.write_text(json.dumps(spec))
    assert Tokenizer.load(tmp_path).encode("the cat sat") == BPE.encode("the cat sat")


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist; name a tokenizer\.json or a directory"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json \("):
        Tokenizer.load(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be read as JSON \("):
        Tokenizer.load(tmp_path)


def change(directory, fn):
    """Rewrites the tokenizer.json of ``BPE`` with a change."""
    BPE.save(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    fn(spec)
    (directory / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize("index", [2**31, 10**6])
def test_an_id_far_above_the_number_of_tokens_is_refused(tmp_path, index):
    """Lists of all ids would fill the memory."""
    change(tmp_path, lambda spec: spec["model"]["vocab"].update({"the": index}))
    with pytest.raises(UserError, match=rf"tokenizer\.json: the tokenizer gives 'the' the id {index}, and has \d+ tok"):
        Tokenizer.load(tmp_path)
    change(tmp_path, lambda spec: spec["model"]["vocab"].update({"the": 20_000}))  # some published ones have holes
    assert Tokenizer.load(tmp_path).vocab_size == 20_001


def test_a_file_that_claims_a_large_table_is_refused(tmp_path):
    table = base64.b64encode(b"\xff\xff\xff\x7f" + bytes(100)).decode()
    part = {"type": "Precompiled", "precompiled_charsmap": table}
    for normalizer in (part, {"type": "Sequence", "normalizers": [part]}):
        change(tmp_path, lambda spec, normalizer=normalizer: spec.update(normalizer=normalizer))
        with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json \(its precompiled_charsmap is"):
            Tokenizer.load(tmp_path)


def test_an_expression_that_takes_too_long_is_an_error_of_one_line(tmp_path):
    """The library's own limit ends it."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    change(tmp_path, lambda spec: spec.update(pre_tokenizer=split))
    tokenizer = Tokenizer.load(tmp_path)
    for encode in (tokenizer.encode, tokenizer.encode_prompt, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match="^the tokenizer fails \\(.*; copy it again"):
            encode("a" * 60)


@pytest.mark.parametrize("tokenizer", [BPE, CHAR], ids=["bpe", "char"])
def test_what_models_trained_here_read(tokenizer):
    texts = ["the cat", "", "größe </s>"] if tokenizer is BPE else ["the cat", "", "rat"]
    rows = tokenizer.encode_batch(texts)
    assert tokenizer.encode_source(texts) == tokenizer.encode_target(texts) == [[*row, 2] for row in rows]
    assert [tokenizer.encode_prompt(text, parse_special=False) for text in texts] == rows
    assert tokenizer.encode_source([]) == [] and tokenizer.languages == {}
    if tokenizer is BPE:
        assert tokenizer.encode_prompt("<s>a</s>") == [1, *tokenizer.encode("a"), 2]
        assert min(tokenizer.encode("<s>a</s>")) > 2, "recognised only where asked"
    else:
        with pytest.raises(UserError, match=r"does not know 'q' \(U\+0071\)"):
            tokenizer.encode_source(["q"])


def edited(directory, edit, **config):
    """The byte-pair tokenizer with its tokenizer.json changed and a tokenizer_config.json of ``config``."""
    BPE.save(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    edit(spec)
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names | config))
    return Tokenizer.load(directory)


def template(*parts):
    """A post-processor: "A" is the text, everything else a special token."""
    ids = {"<pad>": 0, "<s>": 1, "</s>": 2}
    single = [{"Sequence" if part == "A" else "SpecialToken": {"id": part, "type_id": 0}} for part in parts]
    tokens = {part: {"id": part, "ids": [ids[part]], "tokens": [part]} for part in parts if part != "A"}
    return {"post_processor": {"type": "TemplateProcessing", "single": single, "pair": single * 2,
                               "special_tokens": tokens}}


def test_what_the_file_puts_around_a_text(tmp_path):
    ids = BPE.encode("the cat")
    decoder = edited(tmp_path / "a", lambda spec: spec.update(template("<s>", "A")), add_bos_token=False)
    assert decoder.encode_prompt("the cat") == [1, *ids], "tokenizer.json is asked first"
    assert decoder.encode("the cat") == ids
    assert decoder.encode_source(["the cat"]) == [[*ids, 2]], "a decoder's frame does not end a sentence"
    both = edited(tmp_path / "b", lambda spec: spec.update(template("<s>", "A", "</s>")))
    assert both.encode_source(["the cat", ""]) == both.encode_target(["the cat", ""]) == [[1, *ids, 2], [1, 2]]
    flags = edited(tmp_path / "c", lambda spec: None, add_bos_token=True, add_eos_token=True)
    assert flags.encode_prompt("the cat") == [1, *ids, 2], "flags count where tokenizer.json says nothing"
    flags.save(tmp_path / "d")
    assert Tokenizer.load(tmp_path / "d").encode_prompt("the cat") == [1, *ids, 2]
    endless = Tokenizer(BPE.backend, BPE.config | {"eos_token": None})
    with pytest.raises(UserError, match="the tokenizer has no eos token to end a sentence with"):
        endless.encode_source(["a"])


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "BartTokenizer"])
def test_vocabulary_and_merges(name, tmp_path):
    raw = json.loads(_saved(BPE, tmp_path / "own"))["model"]
    tokens = [*raw["vocab"], "<unk>", "<mask>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges = "\n".join(" ".join(pair) for pair in raw["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    ours = Tokenizer.load(tmp_path)
    assert ours.encode(TRICKY) == BPE.encode(TRICKY) and ours.decode(ours.encode(TRICKY)) == TRICKY
    ids = BPE.encode("the cat")
    assert ours.encode_prompt("the cat") == ([1, *ids, 2] if name == "BartTokenizer" else ids)
    assert ours.encode_source(["the cat"])[0][-1] == ours.eos_id == tokens.index("</s>")
    ours.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode_prompt("the cat") == ours.encode_prompt("the cat")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OddTokenizer"}))
    with pytest.raises(UserError, match="has no tokenizer.json, and how OddTokenizer splits text is not known here"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    transformers = pytest.importorskip("transformers")
    for directory in (tmp_path, tmp_path / "saved"):
        theirs = getattr(transformers, name).from_pretrained(directory)
        for text in (*CORPUS, TRICKY):
            ids = theirs(text, split_special_tokens=True)["input_ids"]
            assert ours.encode_prompt(text, parse_special=False) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    (tmp_path / "merges.txt").write_text("x y z\n")
    with pytest.raises(UserError, match=r"merges\.txt and vocab\.json do not make a tokenizer \("):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("named", ["model", "class"])
def test_qwen_of_vocabulary_and_merges(named, tmp_path):
    raw = json.loads(_saved(BPE, tmp_path / "own"))["model"]
    vocabulary = {token: i for i, token in enumerate(token for token in raw["vocab"] if token not in NAMED)}
    merges = [pair for pair in raw["merges"] if "".join(pair) in vocabulary]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    n = len(vocabulary)
    if named == "model":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": n + 9}))
    else:
        special = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        added = {n: "<|endoftext|>", n + 1: "<|im_start|>", n + 2: "<|im_end|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "bos_token": None,
            "added_tokens_decoder": {str(i): special | {"content": token} for i, token in added.items()},
        }))
    ours = Tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, n if named == "model" else n + 2, n)
    assert ours.encode("e\u0301") == ours.encode("é"), "as NFC"
    assert len(ours.encode("12")) == 2 and ours.decode(ours.encode("12 it'll")) == "12 it'll"
    assert ours.encode_prompt("the<|endoftext|>") == [*ours.encode("the"), n]
    ours.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode_prompt(TRICKY) == ours.encode_prompt(TRICKY)
    transformers = pytest.importorskip("transformers")
    for directory in (tmp_path, tmp_path / "saved"):
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
        for text in (*CORPUS, TRICKY, "<|endoftext|> e\u0301 <|im_end|>"):
            assert ours.encode_prompt(text) == theirs(text)["input_ids"]


def _saved(tokenizer, directory):
    tokenizer.save(directory)
    return (directory / "tokenizer.json").read_text()


def test_spaces_are_cleaned_up_where_the_config_asks(tmp_path):
    CHAR.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"clean_up_tokenization_spaces": True}))
    tokenizer = Tokenizer.load(tmp_path)
    text = "the cat 's hat , it 'll do ! a . the ' s"
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded == "the cat's hat, it 'll do! a. the's" and CHAR.decode(CHAR.encode(text)) == text
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).decode(tokenizer.encode(text)) == decoded
    with_merges = edited(tmp_path / "bpe", lambda spec: None, clean_up_tokenization_spaces=True)
    assert with_merges.decode(BPE.encode("a . b")) == "a . b", "merged bytes are exact"


def test_deepseek(shared, tmp_path):
    transformers = pytest.importorskip("transformers")
    content = gzip.decompress((shared / "models" / "tokenizers" / "deepseek_tokenizer.json.gz").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(content)
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = (shared / "data" / "tinyshakespeare.txt").read_text("utf-8").split("\n\n")[:500]
    with gzip.open(shared / "data" / "multi30k" / "val.fr.gz", "rt", encoding="utf-8") as file:
        texts += file.read().split("\n")[:-1]
    texts += [TRICKY, "日本語 テスト", "👩\u200d👧", "a\u200bb", "x" * 99]
    rows = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.encode_batch(texts) == rows
    for split in (True, False):
        framed = theirs(texts[-9:], split_special_tokens=split)["input_ids"]
        assert [ours.encode_prompt(text, parse_special=not split) for text in texts[-9:]] == framed
    assert [ours.decode(row) for row in rows] == theirs.batch_decode(rows, skip_special_tokens=True)


def test_tokenizer_for(tmp_path):
    source = Documents("text:x", CORPUS, append_eos=False)
    assert tokenizer_from_config(DataConfig(vocab_size=280), source).vocab_size == 280
    assert tokenizer_from_config(DataConfig(tokenizer_kind="char"), source).vocab_size == CHAR.vocab_size
    BPE.save(tmp_path)
    assert tokenizer_from_config(DataConfig(tokenizer=str(tmp_path)), source).vocab_size == 300
    with pytest.raises(UserError, match="'tokens:x.npy' holds ids, not text to train a tokenizer on"):
        tokenizer_from_config(DataConfig(), Tokens("tokens:x.npy", np.arange(9)))


def test_books_tokenizer_reproduces_the_given_ids():
    folder = SHARED / "models" / "books-llama"
    if not folder.is_dir():
        pytest.skip("needs JAXLM_SHARED to point at the books tokenizer and ids")
    from jaxlm.data.batches.packing import token_stream
    from jaxlm.data.sources.spec import open_source

    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 0, 0, 4096)
    given_ids = np.load(SHARED / "data" / "books" / "valid_tokens.npy")
    source = open_source(f"text:{SHARED}/data/books/valid.txt.xz[:8%]")
    ids = token_stream(source, tokenizer).ids
    n = len(given_ids)
    assert len(ids) > n and np.array_equal(ids[:n], given_ids)
