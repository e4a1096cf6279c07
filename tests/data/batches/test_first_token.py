"""Windows and documents begin with the tokenizer's first token: once, and it is nothing to predict."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.config import to_dict
from jaxlm.core.errors import UserError
from jaxlm.data.batches.encoding import EncodedDocuments, encode_documents
from jaxlm.data.batches.packing import PackedDocuments, Windows
from jaxlm.data.batches.token_cache import encode_cached
from jaxlm.data.calibration import calibration_batches
from jaxlm.data.config import DataConfig
from jaxlm.data.sources.spec import open_source
from jaxlm.data.sources.types import Documents, Tokens
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.evaluation.likelihood import StreamWindows
from jaxlm.nn.config import DecoderConfig
from jaxlm.training.config import Experiment
from jaxlm.training.setup import _check_first_token

FIRST = {"none": (), "one": (1,), "two": (1, 2)}


def tokenizer(first: tuple[int, ...] = (1,)) -> Tokenizer:
    """One that puts <s> before a text, or <s> and </s>."""
    from tokenizers.processors import TemplateProcessing

    made = Tokenizer.train(["abc xyz"], "char")
    tokens = [{1: "<s>", 2: "</s>"}[i] for i in first]
    if first:
        made.backend.raw.post_processor = TemplateProcessing(
            single=[*tokens, "$A"], special_tokens=list(zip(tokens, first, strict=True))
        )
    return Tokenizer(made.backend, made.config)


def documents(sizes: list[int], first: tuple[int, ...]) -> EncodedDocuments:
    """Documents whose ids name their own places, from 100 on, each behind the first token."""
    texts = np.split(np.arange(sum(sizes)) + 100, np.cumsum(sizes)[:-1])
    ids = np.concatenate([np.array([*first, *text]) for text in texts])
    return EncodedDocuments(ids, np.array(sizes) + len(first), first_token=first)


def check_rows(batch, first: tuple[int, ...], text: np.ndarray) -> None:
    """Each id of the text is predicted once, from the id before it or from the first token; nothing else is."""
    counted = batch["weights"] > 0
    assert sorted(batch["targets"][counted].tolist()) == text.tolist()
    sources = batch["inputs"][counted]
    assert ((sources == batch["targets"][counted] - 1) | (sources == first[-1])).all()
    assert not np.isin(batch["targets"][counted], first).any()
    segment_ids = batch.get("segment_ids", np.ones_like(batch["inputs"]))
    doubled = (batch["inputs"][:, 1:] == first[0]) & (batch["inputs"][:, :-1] == first[-1])
    doubled &= (segment_ids[:, 1:] == segment_ids[:, :-1]) & (np.cumsum(counted[:, ::-1], 1)[:, ::-1][:, 1:] > 0)
    assert not doubled.any(), "a first token stands there twice"


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(3, 20),
       st.one_of(st.none(), st.integers(0, 3)), st.sampled_from([(1,), (1, 2)]))
def test_windows_of_a_stream_begin_with_it(sizes, length, seed, first):
    encoded = documents(sizes, first)
    windows = Windows.of_documents(encoded, length, seed)
    batch = windows.take(1, np.arange(len(windows)))
    assert all(values.shape == (len(windows), length) for values in batch.values())
    assert (batch["inputs"][:, : len(first)] == first).all()
    check_rows(batch, first, np.arange(sum(sizes)) + 100)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(3, 20), st.sampled_from([(1,), (1, 2)]))
def test_packed_documents_begin_with_it(sizes, length, first):
    packed = PackedDocuments(documents(sizes, first), length, 0)
    batch = packed.take(0, np.arange(len(packed)))
    starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    assert (batch["inputs"][starts] == first[0]).all() and starts.sum() >= len(sizes)
    check_rows(batch, first, np.arange(sum(sizes)) + 100)
    assert batch["inputs"].shape == (len(packed), length)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(5, 20), st.integers(0, 20),
       st.sampled_from([(1,), (1, 2)]))
def test_scored_windows_begin_with_it(sizes, context, stride, first):
    scored = StreamWindows(documents(sizes, first), context, stride)
    batches = list(scored.batches(3))
    batch = {name: np.concatenate([each[name] for each in batches]) for name in batches[0]}
    assert batch["inputs"].shape[1] == context - 1 and scored.num_tokens == sum(sizes)
    assert (batch["inputs"][: len(scored.spans), : len(first)] == first).all()
    check_rows(batch, first, np.arange(sum(sizes)) + 100)


def test_given_ids_have_it_where_they_do():
    """A stream made elsewhere: its first document has <s>, its second does not; both are predicted whole."""
    encoded = EncodedDocuments(np.array([1, 100, 101, 102, 103]), np.array([3, 2]), first_token=(1,))
    for rows in (Windows.of_documents(encoded, 4), PackedDocuments(encoded, 4, 0)):
        check_rows(rows.take(0, np.arange(len(rows))), (1,), np.arange(100, 104))


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_documents_are_encoded_behind_it(first, tmp_path):
    found, text = tokenizer(first), Documents("jsonl:x", ["ab", "", "c"], append_eos=True)
    a, b, c = found.encode("abc")
    expected = [*first, a, b, 2, *first, c, 2] if first else [a, b, 2, 2, c, 2]
    assert found.first_token == first
    assert encode_documents(text, found).ids.tolist() == expected
    cached = encode_cached(text, found, str(tmp_path))
    assert cached.ids.tolist() == expected and cached.first_token == first
    assert encode_documents(Tokens("tokens:x", np.array([a, b])), found).first_token == first


def test_it_is_never_there_where_one_says_so_and_never_twice(tmp_path):
    found, file = tokenizer(), tmp_path / "text"
    file.write_text("<s>abc")
    (a, b, c), spec = found.encode("abc"), f"text:{file}"
    spelled = encode_documents(open_source(spec, special_tokens="parse"), found)
    assert spelled.ids.tolist() == [1, a, b, c]
    never = encode_documents(open_source(spec, special_tokens="parse", first_token="never"), found)
    assert never.first_token == () and never.ids.tolist() == [1, a, b, c]


def test_calibration_windows_begin_with_it(tmp_path):
    found = tokenizer()
    (tmp_path / "text").write_text("abcxyz")
    ids = found.encode("abcxyz")
    options = {"pairs": False, "samples": 9, "context": 3, "seed": 0}
    ((rows,),) = calibration_batches(f"text:{tmp_path}/text", found, **options)
    assert rows.tolist() == [[1, *ids[:2]], [1, *ids[2:4]], [1, *ids[4:]]]
    ((rows,),) = calibration_batches(f"text:{tmp_path}/text", found, first_token="never", **options)
    assert rows.tolist() == [ids[:3], ids[3:]]


def test_a_run_that_began_without_it_goes_on_without_it(tmp_path):
    model = DecoderConfig(vocab_size=9, width=8, heads=2, ffn=8, layers=1)
    experiment = Experiment(model=model, data=DataConfig(train="text:x"))
    stored = to_dict(experiment)
    (tmp_path / "experiment.json").write_text(json.dumps(stored))
    _check_first_token(experiment, tokenizer(), tmp_path)
    del stored["data"]["first_token"]
    (tmp_path / "experiment.json").write_text(json.dumps(stored))
    _check_first_token(experiment, tokenizer(()), tmp_path)
    with pytest.raises(UserError, match="--data.first_token never"):
        _check_first_token(experiment, tokenizer(), tmp_path)
    never = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, first_token="never"))
    _check_first_token(never, tokenizer(), tmp_path)


def test_rows_without_room_are_an_error():
    with pytest.raises(UserError, match="rows of 1 tokens have no room behind the 2"):
        Windows.of_documents(documents([9], (1, 2)), 1)
