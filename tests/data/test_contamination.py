"""Contamination of evaluation data: planted ones are found, whatever disguise the definition allows, and no others."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import contamination
from jaxlm.data.batches.bitext import join_pairs
from jaxlm.data.batches.encoding import EncodedDocuments, encode_documents
from jaxlm.data.batches.loader import make_loader
from jaxlm.data.config import DataConfig
from jaxlm.data.contamination import find_contamination
from jaxlm.data.sources.types import Bitext, Documents
from jaxlm.data.tokenizers.tokenizer import Tokenizer

RANDOM = np.random.default_rng(0)
WORDS = ["".join(RANDOM.choice(list("abcdefghijklmnop"), RANDOM.integers(3, 9))) for _ in range(400)]


def sentence(n: int) -> str:
    return " ".join(RANDOM.choice(WORDS, n))


TRAIN = [sentence(int(n)) for n in RANDOM.integers(3, 60, 200)]
FRESH = [sentence(40) for _ in range(20)]
TOKENIZER = Tokenizer.train([*TRAIN, *FRESH, " ".join(TRAIN).title()], vocab_size=1200)


def found(held: list[str], train: list[str] = TRAIN, tokenizer: Tokenizer = TOKENIZER):
    sides = [[encode_documents(Documents("jsonl:x", texts, append_eos=True), tokenizer)] for texts in (train, held)]
    return find_contamination(*sides, tokenizer)


def test_fresh_documents_are_no_contamination():
    result = found(FRESH)
    assert (result.documents, result.exact, result.near, result.examples) == (20, 0, 0, ())
    assert str(result) == "none of 20 documents is in the training data"


def test_planted_documents_are_found_and_said():
    whole = next(text for text in TRAIN if len(text.split()) > 30)
    short = next(text for text in TRAIN if len(text.split()) == 3)
    disguised = whole.title().replace(" ", ",  ") + "!"
    words = whole.split()
    changed = " ".join([*words[:-8], *sentence(8).split()])
    result = found([*FRESH, whole, short, disguised, changed])
    assert (result.documents, result.exact + result.near, result.near >= 1) == (24, 4, True)
    assert result.exact >= 2
    assert result.examples[0] == whole[:60]
    assert f'word for word, and {result.near:,} more in large part, such as "{whole[:20]}' in str(result)
    few = " ".join([*words[:10], *sentence(30).split()])
    assert found([*FRESH, few]).exact + found([*FRESH, few]).near == 0, "a quarter is no large part"
    cut = " ".join(short.split()[:2])
    assert found([*FRESH, cut]).exact == 0, "a short document is compared as a whole"


def test_what_many_share_says_nothing():
    prompt = sentence(30)
    held = [f"{prompt} {sentence(12)}" for _ in range(20)]
    assert found(held, [*TRAIN, *(f"{prompt} {sentence(12)}" for _ in range(5))]).near == 0
    assert found(held[:2], [*TRAIN, f"{prompt} {sentence(12)}"]).near == 2


def test_streams_are_judged_in_pieces(monkeypatch):
    train, held = " ".join(TRAIN), " ".join(FRESH)
    inside = held[:3000] + " ".join(TRAIN[50:90]) + held[3000:]
    sides = [[encode_documents(Documents("text:x", [text], append_eos=False), TOKENIZER)] for text in (train, inside)]
    whole = find_contamination(*sides, TOKENIZER)
    planted = len(TOKENIZER.encode(" ".join(TRAIN[50:90]))) / 512
    assert whole.documents == -(-len(sides[1][0].ids) // 512)
    assert planted - 2 <= whole.exact + whole.near <= planted + 2
    monkeypatch.setattr(contamination, "_TOKENS", 100)  # and training data some at a time
    assert find_contamination(*sides, TOKENIZER) == whole


def test_tokenizers_make_no_difference():
    characters = Tokenizer.train([*TRAIN, *FRESH], "char")
    assert found(FRESH, tokenizer=characters).near == 0
    assert found([*FRESH, TRAIN[0]], tokenizer=characters).exact == 1


def test_pairs_are_documents():
    pairs = [(sentence(9), sentence(9)) for _ in range(30)]
    config = DataConfig(batch_tokens=512, buckets=(64,))

    def loader(some):
        return make_loader(config, Bitext("bitext:x", *map(list, zip(*some, strict=True))), TOKENIZER, train=False)

    train, held = loader(pairs), loader([(sentence(9), sentence(9)), pairs[3], (pairs[4][0], sentence(9))])
    assert sum(len(part.lengths) for part in train.documents()) == 30
    result = find_contamination(train.documents(), held.documents(), TOKENIZER)
    assert result.documents == 3 and result.exact == 1
    joint = join_pairs([(np.array([1, 2, 3]), np.array([2, 1])), (np.array([7, 8, 9]), np.array([1, 2]))])
    assert joint.ids.tolist() == [1, 2, 7, 3, 8, 9] and joint.lengths.tolist() == [3, 3]


def test_nothing_to_compare():
    empty = EncodedDocuments(np.array([TOKENIZER.eos_id]), np.array([1]))
    assert find_contamination([empty], [empty], TOKENIZER).exact == 0


def test_a_training_tells_before_its_first_step(tmp_path):
    from jaxlm import nn
    from jaxlm.training.config import Experiment
    from jaxlm.training.setup import prepare

    for name, texts in (("train", TRAIN), ("valid", FRESH), ("test", [*FRESH, TRAIN[0]])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    TOKENIZER.save(tmp_path / "tokenizer")
    data = DataConfig(
        **{name: f"jsonl:{tmp_path / name}" for name in ("train", "valid", "test")}, seq_len=32, batch_size=8,
        tokenizer=str(tmp_path / "tokenizer"), cache=str(tmp_path / "cache"),
    )
    model = nn.DecoderConfig(width=8, heads=1, ffn=8, layers=1)

    def told(policy):
        changed = dataclasses.replace(data, contamination=policy)
        return prepare(Experiment(model=model, data=changed), tmp_path / "run").contamination

    with pytest.raises(UserError, match="data.test: 1 of 21 documents are in .* or set data.contamination=report"):
        told("fail")
    assert told("off") == ()
    valid, test = told("report")
    assert valid == "data.valid: none of 20 documents is in the training data"
    assert test.startswith("data.test: 1 of 21 documents are in the training data word for word, and 0 more")
