"""Orders and mixtures: each row as often as it should be, in every epoch, and never again too soon."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import UserError
from jaxlm.data.batches.loader import make_loader
from jaxlm.data.batches.mixture import MixedRows
from jaxlm.data.batches.shuffle import ShuffledOrder, random_state
from jaxlm.data.config import DataConfig
from jaxlm.data.sources.spec import open_source
from jaxlm.data.sources.types import Bitext, Documents, Mixture
from jaxlm.data.tokenizers.from_config import tokenizer_from_config
from jaxlm.data.tokenizers.tokenizer import Tokenizer


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
def test_orders_are_permutations_in_pieces_or_whole(count, block, group, epoch):
    order = ShuffledOrder(count, 5, block, group)
    whole = order(epoch, np.arange(count))
    assert sorted(whole) == list(range(count))
    places = np.random.default_rng(0).permutation(count)
    assert (order(epoch, places) == whole[places]).all()
    assert (ShuffledOrder(count, 5, block, group)(epoch, places[:3]) == whole[places[:3]]).all()


def test_orders_differ_by_epoch_and_few_rows_are_permuted_as_ever():
    order = ShuffledOrder(1000, 3, 8, 4)
    first, second = (order(epoch, np.arange(1000)) for epoch in (0, 1))
    assert (first != second).mean() > 0.9 and (first != np.arange(1000)).mean() > 0.9
    assert (ShuffledOrder(1000, 3)(2, np.arange(1000)) == random_state(3, 2).permutation(1000)).all()


def test_blocks_are_read_together():
    """32 rows in a row of the order lie in no more than 4 runs of 8 (and one, where the file ends)."""
    rows = ShuffledOrder(1000, 3, 8, 4)(0, np.arange(1000)).reshape(-1, 8)[:120].reshape(-1, 32)
    runs = [len(set(((group - group[0]) % 1000) // 8)) for group in rows]
    assert max(runs) <= 9 and np.mean([len(np.unique(group // 8)) for group in rows]) < 9


class Rows:
    """Row i of part p of epoch e is (p, e, i)."""

    def __init__(self, part: int, count: int):
        self.part, self.count = part, count

    def __len__(self):
        return self.count

    def take(self, epoch, rows_B):
        return {"x": np.stack([np.full_like(rows_B, self.part), np.full_like(rows_B, epoch), rows_B], 1)}

    def report(self):
        return {"tokens": self.count}

    def notes(self):
        return [f"part {self.part}"]


def mixed(sizes, weights, shares, seed=0):
    sources = tuple(Documents(f"s{i}", (), append_eos=False) for i in range(len(sizes)))
    return MixedRows([Rows(i, n) for i, n in enumerate(sizes)], Mixture("mix:", sources, tuple(weights), shares), seed)


def test_epochs_and_shares():
    assert len(mixed([10, 4], [2, 1], shares=False)) == 24
    assert len(mixed([10, 4], [0.5, 2.25], shares=False)) == 5 + 9
    shares = mixed([10, 4], [0.75, 0.25], shares=True)
    assert len(shares) == 10 + 3  # ten rows are three quarters: of the other, 3.33
    assert shares.notes()[:2] == [
        "an epoch has 10 rows (76.9%) of s0, 1 times its 10", "an epoch has 3 rows (23.1%) of s1, 0.75 times its 4"]
    with pytest.raises(UserError, match="'s1'.*less than one row"):
        mixed([10, 4], [1, 0.1], shares=False)


@pytest.mark.parametrize("sizes, weights, shares", [([10, 4], [0.5, 2.25], False), ([7, 5, 9], [0.5, 0.2, 0.3], True)])
def test_each_part_goes_round_at_its_own_pace(sizes, weights, shares):
    rows = mixed(sizes, weights, shares)
    epochs = 12
    seen = np.concatenate([rows.take(epoch, np.arange(len(rows)))["x"] for epoch in range(epochs)])
    for part, size in enumerate(sizes):
        mine = seen[seen[:, 0] == part]
        for around in range(len(mine) // size):
            assert sorted(mine[around * size : (around + 1) * size, 2]) == list(range(size))
            assert (mine[around * size : (around + 1) * size, 1] == around).all()
    per_epoch = Counter(tuple(np.bincount(seen[i : i + len(rows), 0])) for i in range(0, len(seen), len(rows)))
    assert len(per_epoch) == 1
    some = np.random.default_rng(1).permutation(len(rows))[:7]
    assert (rows.take(3, some)["x"] == rows.take(3, np.arange(len(rows)))["x"][some]).all()


def test_evaluation_takes_every_row_once_in_order():
    rows = mixed([3, 2], [5, 1], shares=False, seed=None)
    found = rows.take(0, np.array([0, 1, 2, 3, 4, -1]))["x"].tolist()
    assert found == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [1, 0, 0], [1, 0, 1], [0, 0, -1]]


def test_what_mixtures_are_written_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("abc abc abc")
    (tmp_path / "b").write_text('{"text": "cab"}\n{"text": "bac"}\n')
    (tmp_path / "c").write_text('{"prompt": "a", "completion": "b"}\n')
    source = open_source("mix:25% text:a[:50%] + 75% jsonl:b")
    assert isinstance(source, Mixture) and source.weights == (0.25, 0.75) and source.shares
    assert list(source.texts) == ["abc a", "cab", "bac"]
    tokenizer = tokenizer_from_config(DataConfig(tokenizer_kind="char"), source)
    batch = make_loader(DataConfig(seq_len=2, batch_size=2), source, tokenizer, train=True).batch(0)
    assert batch["inputs"].shape == (2, 2) and "segment_ids" not in batch
    with_dialogues = open_source("mix:3x text:a + 1x instruct:c")
    batch = make_loader(DataConfig(seq_len=4, batch_size=2), with_dialogues, tokenizer, train=True).batch(0)
    assert batch["segment_ids"].shape == (2, 4)
    pairs = open_source("mix:2x bitext:a,a + 1x bitext:b,b")
    assert isinstance(pairs, Bitext) and pairs.src == ["abc abc abc"] * 2 + open("b").read().splitlines()
    for spec, message in {
        "mix:text:a": "write mix:70% SPEC + 30% SPEC, or mix:2x SPEC + 1x SPEC",
        "mix:2x text:a + 30% jsonl:b": "30% jsonl:b' is not a mixture",
        "mix:50% text:a + 30% jsonl:b": "add up to 80%; make that 100%",
        "mix:0x text:a + 1x jsonl:b": "mix:0x text:a.*leave it out",
        "mix:50% bitext:a,a + 50% bitext:b,b": "mix:50% bitext:a,a.*sentence pairs",
        "mix:1x bitext:a,a + 1x text:a": "mix:1x bitext:a,a.*mix text with dialogues",
        "mix:1x text:a + 1x jsonl:no": "no does not exist; check the path",
    }.items():
        with pytest.raises(UserError, match=message.replace("+", r"\+")):
            open_source(spec)
    with pytest.raises(UserError, match="is not all text to train a tokenizer on"):
        tokenizer_from_config(DataConfig(), with_dialogues)


def test_two_mixtures_of_text_are_the_same_for_all():
    words = [f"w{i}" for i in range(40)]
    source = Mixture("mix:", (Documents("a", words, True), Documents("b", words[::-1], True)), (1.0, 0.5), False)
    tokenizer = Tokenizer.train(words, "char")
    config = DataConfig(seq_len=8, batch_size=4, packing="documents")
    one, two = (make_loader(config, source, tokenizer, train=True) for _ in range(2))
    for index in (0, 7, 3):
        assert all((one.batch(index)[name] == two.batch(index)[name]).all() for name in one.batch(0))
