"""The one entry point: the figures it promises for each kind of model and data, and the mistakes it names."""

from __future__ import annotations

import json

import pytest

from jaxlm.core.errors import UserError
from jaxlm.data.calibration import calibration_batches
from jaxlm.data.sources import spec as sources
from jaxlm.evaluation.scoring import evaluate
from tests.inference.models import decoder, seq2seq


@pytest.fixture
def bitext(tmp_path):
    (tmp_path / "a.en").write_text("a cat sat\nit is\non the mat\n")
    (tmp_path / "a.de").write_text("die katze\nes ist\nauf der matte\n")
    return f"bitext:{tmp_path / 'a.en'},{tmp_path / 'a.de'}"


def test_text_for_a_language_model(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("the cat sat on the mat. " * 5)
    calls = []
    found = evaluate(
        decoder(), f"text:{path}[:50%]", context=16, stride=8, speed=True, progress=lambda *call: calls.append(call)
    )
    assert {"loss", "perplexity", "word_perplexity", "bits_per_byte", "tokens", "tokens_per_second"} <= found.keys()
    assert found["data"].endswith("[:50%]") and found["bytes"] == 60 and found["tokens"] == 59
    assert (found["context"], found["stride"]) == (16, 8)
    assert calls == [("scoring", 1, 1)]
    assert "bleu" not in found and "synthetic" not in found
    json.dumps(found, allow_nan=False)


def test_special_tokens_of_data_are_parsed_where_asked(tmp_path):
    (tmp_path / "x.txt").write_text("the cat</s>a mat</s>")
    lm = decoder()
    assert evaluate(lm, f"text:{tmp_path / 'x.txt'}", special_tokens="parse")["tokens"] == 13
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "<s>the cat", "completion": " sat</s>"}))
    assert evaluate(lm, f"instruct:{tmp_path / 'x.jsonl'}", prompt_special_tokens="parse")["tokens"] == 5
    (batch,) = calibration_batches(
        f"text:{tmp_path / 'x.txt'}", lm.tokenizer, pairs=False, samples=1, context=14, seed=0, special_tokens="parse"
    )
    assert batch[0].tolist() == [lm.tokenizer.encode("the cat</s>a mat</s>", parse_special=True)]


def test_pairs_for_a_translation_model(bitext):
    lm, calls = seq2seq(), []
    found = evaluate(
        lm, bitext, beam=2, max_length=8, sentences=2, speed=True, progress=lambda *call: calls.append(call)
    )
    assert {"loss", "perplexity", "bits_per_byte", "bleu", "bleu_lowercase", "chrf", "signature"} <= found.keys()
    assert (found["sentences"], found["beam"], found["length_penalty"]) == (2, 2, 1.0)
    assert found["tokens"] == len("die katze") + len("es ist") + len("auf der matte") + 3
    assert calls[-1] == ("translating", 2, 2)
    assert found["tokens_per_second"] > 0
    quick = evaluate(lm, bitext, translations=False)
    assert "bleu" not in quick and quick["loss"] == pytest.approx(found["loss"])
    json.dumps(found, allow_nan=False)


def test_invented_text_is_said_to_be_invented(bitext, monkeypatch):
    real = sources.open_source(bitext)
    made_up = sources.Bitext("builtin:phrasebook", real.src, real.tgt, synthetic="made up")
    monkeypatch.setattr("jaxlm.evaluation.scoring.open_source", lambda *_, **__: made_up)
    found = evaluate(seq2seq(), "builtin:phrasebook", translations=False)
    assert found["synthetic"] is True and found["note"] == "made up"


def test_data_that_does_not_fit_the_model_is_named(bitext, tmp_path):
    with pytest.raises(UserError, match="decoder model"):
        evaluate(decoder(), bitext)
    (tmp_path / "x.txt").write_text("abc")
    with pytest.raises(UserError, match="seq2seq model"):
        evaluate(seq2seq(), f"text:{tmp_path / 'x.txt'}")
