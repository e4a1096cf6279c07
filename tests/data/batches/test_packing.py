"""Windows cover a stream exactly; packed documents come back whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import UserError
from jaxlm.data.batches.encoding import EncodedDocuments, encode_documents
from jaxlm.data.batches.packing import PackedDocuments, Windows, token_stream
from jaxlm.data.batches.shuffle import random_state
from jaxlm.data.sources.types import Bitext, Documents, Tokens
from jaxlm.data.tokenizers.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["abc xyz"], "char")


def source(*texts: str, append_eos: bool = True) -> Documents:
    return Documents("jsonl:x", texts, append_eos)


# --- streams


def test_documents_end_with_eos_and_text_does_not():
    a, b, c = TOKENIZER.encode("abc")
    assert token_stream(source("ab", "", "c"), TOKENIZER).ids.tolist() == [a, b, 2, 2, c, 2]
    assert token_stream(source("ab", append_eos=False), TOKENIZER).ids.tolist() == [a, b]
    assert token_stream(Tokens("tokens:x", np.array([3, 2, 4])), TOKENIZER).ids.tolist() == [3, 2, 4]


def test_stream_mistakes():
    with pytest.raises(UserError, match="'bitext:a,b' is sentence pairs; a language model reads text:"):
        token_stream(Bitext("bitext:a,b", ["a"], ["b"]), TOKENIZER)
    size = TOKENIZER.vocab_size
    for wrong in (-1, size):
        with pytest.raises(UserError, match=f"'tokens:x' holds the id {wrong}, and the tokenizer has {size} tokens;"):
            token_stream(Tokens("tokens:x", np.array([3, wrong])), TOKENIZER)
    with pytest.raises(UserError, match="the text is a single token"):
        Windows(np.array([3]), 4)


# --- windows


def rows(windows, epoch: int = 0) -> dict[str, np.ndarray]:
    return windows.take(epoch, np.arange(len(windows)))


@given(st.integers(2, 200), st.integers(1, 20), st.one_of(st.none(), st.integers(0, 5)), st.integers(0, 3))
@example(129, 16, 0, 0)  # no remainder
@example(128, 16, 0, 0)  # the largest remainder
def test_every_target_is_predicted_exactly_once_an_epoch(n, length, seed, epoch):
    stream = np.arange(n) + 100  # ids name their own places
    windows = Windows(stream, length, seed)
    batch = rows(windows, epoch)
    counted = batch["weights"] > 0
    assert sorted(batch["targets"][counted].tolist()) == stream[1:].tolist()
    assert (batch["targets"] == batch["inputs"] + 1).all(), "a target is the next id, counted or not"
    assert counted.any(axis=1).all(), "no window is idle"
    if n > length:
        assert (np.diff(batch["inputs"], axis=1) == 1).all(), "windows are full of consecutive ids"
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32 and batch["weights"].dtype == np.float32


@settings(max_examples=25)
@given(st.integers(100, 200), st.integers(8, 20))
def test_windows_begin_elsewhere_each_epoch(n, length):
    windows = Windows(np.arange(n), length, seed=0)
    grids = {tuple(rows(windows, epoch)["inputs"][:, 0]) for epoch in range(40)}
    assert len(grids) >= length // 4
    assert len({len(grid) for grid in grids}) == 1


def test_without_a_seed_windows_begin_at_the_start():
    batch = rows(Windows(np.arange(11), 4))
    assert batch["inputs"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]


def test_padding_rows_have_no_weight():
    batch = Windows(np.arange(11), 4).take(0, np.array([1, -1]))
    assert batch["weights"].sum(axis=1).tolist() == [4, 0]


def test_epochs_differ_and_repeat():
    one, again, other = (random_state(0, epoch).permutation(50).tolist() for epoch in (3, 3, 4))
    assert one == again != other
    assert one[:8] == [20, 34, 23, 15, 25, 30, 1, 17], "whatever NumPy a resumed run has, it sees the order it left"


# --- documents


def documents_in(batch: dict[str, np.ndarray]) -> list[list[int]]:
    """The ids of every segment: its inputs and its last target."""
    found = []
    for row in range(len(batch["segment_ids"])):
        segment_ids = batch["segment_ids"][row]
        for segment in range(1, segment_ids.max(initial=0) + 1):
            at = np.flatnonzero(segment_ids == segment)
            assert (np.diff(at) == 1).all() and batch["positions"][row, at].tolist() == list(range(len(at)))
            assert batch["targets"][row, at[:-1]].tolist() == batch["inputs"][row, at[1:]].tolist()
            found.append([*batch["inputs"][row, at].tolist(), int(batch["targets"][row, at[-1]])])
    padding = batch["segment_ids"] == 0
    assert (batch["weights"] == ~padding).all()
    for key in ("inputs", "targets", "positions"):
        assert not batch[key][padding].any()
    return found


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 16))
def test_segments_restore_each_document(lengths, capacity):
    ids = np.arange(sum(lengths)) + 1
    documents = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    if max(lengths) < 2:
        with pytest.raises(UserError, match="no document has two tokens"):
            PackedDocuments(EncodedDocuments(ids, np.array(lengths)), capacity, 0)
        return
    packed = PackedDocuments(EncodedDocuments(ids, np.array(lengths)), capacity, 0)
    expected = [
        document[i:i + capacity + 1] for document in documents for i in range(0, len(document) - 1, capacity)
    ]
    assert sorted(documents_in(rows(packed))) == sorted(expected)
    report = packed.report()
    assert report["documents"] == len(lengths) and report["tokens"] == sum(lengths)
    assert report["empty"] == lengths.count(1) and report["split"] == sum(n > capacity + 1 for n in lengths)
    targets = sum(lengths) - len(lengths)
    assert report["efficiency"] == pytest.approx(targets / (capacity * len(packed)))
    assert len(packed) <= max(1, 2 * targets / capacity), "two rows never share what fits one"


def test_rows_do_not_depend_on_their_batch():
    packed = PackedDocuments(EncodedDocuments(np.arange(60), np.array([5, 9, 2, 20, 7, 7, 10])), 12, 0)
    whole = rows(packed)
    for row in range(len(packed)):
        batch = packed.take(1, np.array([-1, row]))
        for key, values in batch.items():
            assert (values[1] == whole[key][row]).all() and not values[0].any()


def test_what_is_left_out_or_cut_is_said():
    packed = PackedDocuments(encode_documents(source("abc", "", "abcabcabc"), TOKENIZER), 4, 0)
    empty, split = packed.notes()
    assert empty.startswith("1 of 3 documents") and "empty" in empty
    assert split.startswith("1 of 3 documents") and "4 tokens" in split and "data.seq_len" in split
    assert PackedDocuments(encode_documents(source("abc"), TOKENIZER), 4, 0).notes() == []


def test_given_ids_are_documents_up_to_each_eos():
    ids = np.array([5, 6, 2, 7, 2, 2, 8, 3], np.uint16)
    packed = PackedDocuments(encode_documents(Tokens("tokens:x", ids), TOKENIZER), 8, 0)
    assert sorted(documents_in(rows(packed))) == [[5, 6, 2], [7, 2], [8, 3]]
    assert packed.report()["empty"] == 1
