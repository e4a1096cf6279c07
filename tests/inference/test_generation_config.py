"""generation_config.json: reading, options of a caller, unsupported settings, writing."""

from __future__ import annotations

import dataclasses
import json

import pytest

import jaxlm
from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.hf.directory import read_generation
from jaxlm.inference.decoding import generate_tokens
from jaxlm.inference.engine.requests import Request
from jaxlm.inference.generation_config import PLAIN, GenerationConfig
from tests.inference.models import random_params

FILE = {
    "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9,
    "repetition_penalty": 1.1, "forced_eos_token_id": 7, "max_length": None, "typical_p": 1.0, "use_cache": True,
    "transformers_version": "5.0.0", "chat_format": "chatml", "bad_words_ids": [[3, 4], [5]], "early_stopping": "never",
}


def read(directory, fields, name="generation_config.json"):
    (directory / name).write_text(json.dumps(fields))
    return read_generation(directory)


def test_a_file_is_read_and_written_back(tmp_path):
    generation = read(tmp_path, FILE)
    assert generation == GenerationConfig(
        eos_token_id=(2, 7), do_sample=True, temperature=0.6, top_k=50, top_p=0.9, repetition_penalty=1.1,
        forced_eos_token_id=(7,), bad_words_ids=((3, 4), (5,)), early_stopping="never",
        others={"typical_p": 1.0, "chat_format": "chatml"},
    )
    generation.check()
    assert generation.notes() == ["chat_format in generation_config.json: unknown settings, without effect"]
    config = nn.DecoderConfig(vocab_size=11, width=8, heads=2, layers=1)
    lm = jaxlm.LM(config, *random_params(config), generation=generation)
    for path in (lm.save(tmp_path / "saved"), lm.export(tmp_path / "exported")):
        again = jaxlm.load(path)
        assert again.generation == generation and again.info["notes"] == generation.notes()
    written = json.loads((path / "generation_config.json").read_text())
    assert written["forced_eos_token_id"] == 7 and written["top_k"] == 50 and written["bos_token_id"] == 1
    assert "num_beams" not in written
    assert dataclasses.replace(generation, do_sample=False, top_k=0).to_json(config).get("top_k") is None


def test_older_files_keep_the_settings_in_config_json(tmp_path):
    fields = {"model_type": "bart", "d_model": 8, "num_beams": 4, "eos_token_id": 2, "typical_p": 0.5, "max_length": 9}
    generation = read(tmp_path, fields, "config.json")
    assert generation == GenerationConfig(num_beams=4, eos_token_id=(2,), max_length=9, others={"typical_p": 0.5})
    assert read(tmp_path, {}) == PLAIN, "the file of its own is all that counts where there is one"


def test_a_caller_comes_before_the_file():
    sampled, searched = GenerationConfig(do_sample=True, temperature=0.6, top_k=5), GenerationConfig(num_beams=4)
    assert sampled.given(temperature=0.0, top_k=None) == sampled.replace(do_sample=False, top_k=0)
    assert sampled.given(temperature=0.9) == sampled.replace(temperature=0.9, num_beams=1)
    assert sampled.given(beam=3, top_k=2) == sampled.replace(do_sample=False, num_beams=3, top_k=2)
    assert searched.given(temperature=0.5) == GenerationConfig(num_beams=1, do_sample=True, temperature=0.5)
    assert searched.given(beam=1, max_new_tokens=3) == GenerationConfig(num_beams=1, max_new_tokens=3)
    assert searched.override({"bad_words_ids": "5,6", "max_length": "7"}) == GenerationConfig(
        num_beams=4, bad_words_ids=((5,), (6,)), max_length=7
    )


def test_lengths_count_the_prompt_or_not():
    assert GenerationConfig().limits([3, 5], 64) == [64, 64]
    assert GenerationConfig(max_length=9).limits([3, 5], 64) == [6, 4]
    assert GenerationConfig(max_length=9, max_new_tokens=2).limits([3, 50], 64) == [2, 2]
    with pytest.raises(UserError, match="a prompt has 9 tokens, .* max_new_tokens"):
        GenerationConfig(max_length=9).limits([9], 64)


@pytest.mark.parametrize("name, value", [
    ("penalty_alpha", 0.6), ("num_beam_groups", 2), ("guidance_scale", 1.5), ("sequence_bias", [[[3], 1.0]]),
    ("encoder_no_repeat_ngram_size", 3), ("exponential_decay_length_penalty", [5, 1.1]), ("max_time", 2.0),
])
def test_what_is_not_supported_is_named_when_text_is_generated(tmp_path, name, value):
    generation = read(tmp_path, {name: value})
    with pytest.raises(UserError, match=f"{name} = "):
        generation.given(beam=2 if name == "num_beam_groups" else 1).check()


@pytest.mark.parametrize("fields, counts", [
    ({"typical_p": 0.5}, "sampling"), ({"epsilon_cutoff": 0.1}, "sampling"), ({"eta_cutoff": 0.1}, "sampling"),
    ({"top_h": 0.4}, "sampling"), ({"top_k": -1}, "sampling"), ({"num_beam_groups": 2}, "searching"),
    ({"diversity_penalty": 0.5}, "searching"), ({"penalty_alpha": 0.6}, "greedy"),
    ({"num_return_sequences": 2}, "sampling searching"),
])
def test_what_counts_in_one_way_of_generating_is_no_reason_to_refuse_another(tmp_path, fields, counts):
    generation = read(tmp_path, fields)
    assert generation.notes() == []
    (name,) = fields
    for way, options in {"greedy": {}, "sampling": {"temperature": 0.7}, "searching": {"beam": 3}}.items():
        given = generation.given(**options)
        if way in counts.split():
            with pytest.raises(UserError, match=name):
                given.check()
        else:
            given.check()


def test_a_file_that_samples_badly_still_decodes_greedily():
    """top_p and min_p outside their range too, which sampling refuses by itself."""
    config = nn.DecoderConfig(vocab_size=11, width=8, heads=2, layers=1)
    bad = GenerationConfig(top_p=1.5, min_p=-1.0, top_k=-1, others={"typical_p": 0.5, "num_beam_groups": 2})
    lm = jaxlm.LM(config, *random_params(config), generation=bad)
    expected = generate_tokens(lm, [[3, 4]], PLAIN, max_new_tokens=3)
    assert generate_tokens(lm, [[3, 4]], bad, max_new_tokens=3) == expected
    request = Request((3, 4), temperature=0.0).resolved(bad, 16, 11)
    assert (request.top_k, request.top_p, request.min_p) == (0, 1.0, 0.0)
    with pytest.raises(UserError, match="top_k"):
        Request((3, 4), temperature=0.5).resolved(bad, 16, 11)


@pytest.mark.parametrize("fields, message", [
    ({"max_length": -1}, "max_length is -1"), ({"num_beams": 0}, "num_beams is 0"),
    ({"top_k": 2.5}, "top_k: 2.5"), ({"eos_token_id": ["a"]}, "eos_token_id: 'a'"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"), ({"bad_words_ids": [[]]}, "bad_words_ids"),
    ({"early_stopping": "soon"}, "early_stopping: 'soon'"),
])
def test_values_of_the_wrong_kind_are_named(tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, fields)
    assert str(caught.value).startswith(str(tmp_path / "generation_config.json"))
