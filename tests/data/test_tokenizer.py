"""Tokenizers: exact round trips, determinism, and agreement with transformers."""

from __future__ import annotations

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
from jaxlm.data.sources import Documents, Tokens, pieces
from jaxlm.data.tokenizer import Tokenizer, tokenizer_for

CORPUS = [
    "the cat sat on the mat. the cat's hat, it'll do!\n\nThe  rat ran   after\tthe cat\n" * 20,
    "größe läßt 12 und 345\n" * 9,
]
BPE = Tokenizer.train(CORPUS, vocab_size=300)
CHAR = Tokenizer.train(CORPUS, "char")
TRICKY = "a<s> </s><pad>\ufeff \r\n\x00\u2028 😀 e\u0301 \u00a0the cat's"
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
        apart = [i for piece in pieces(text, 1) for i in tokenizer.encode(piece)]
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
        "import sys, json; from jaxlm.data.tokenizer import Tokenizer\n"
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
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON \("):
        Tokenizer.load(tmp_path)


def test_tokenizer_for(tmp_path):
    source = Documents("text:x", CORPUS, ends=False)
    assert tokenizer_for(DataConfig(vocab_size=280), source).vocab_size == 280
    assert tokenizer_for(DataConfig(tokenizer_kind="char"), source).vocab_size == CHAR.vocab_size
    BPE.save(tmp_path)
    assert tokenizer_for(DataConfig(tokenizer=str(tmp_path)), source).vocab_size == 300
    with pytest.raises(UserError, match="'tokens:x.npy' holds ids, not text to train a tokenizer on"):
        tokenizer_for(DataConfig(), Tokens("tokens:x.npy", np.arange(9)))


def test_books_tokenizer_reproduces_the_given_ids():
    folder = SHARED / "models" / "books-llama"
    if not folder.is_dir():
        pytest.skip("needs JAXLM_SHARED to point at the books tokenizer and ids")
    from jaxlm.data.packing import token_stream
    from jaxlm.data.sources import open_source

    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 0, 0, 4096)
    given_ids = np.load(SHARED / "data" / "books" / "valid_tokens.npy")
    source = open_source(f"text:{SHARED}/data/books/valid.txt.xz[:8%]")
    ids = token_stream(source, tokenizer)
    n = len(given_ids)
    assert len(ids) > n and np.array_equal(ids[:n], given_ids)
