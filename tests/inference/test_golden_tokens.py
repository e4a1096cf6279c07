"""With settings of generation_config.json, greedy and beam search give the tokens that transformers gives."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import save_file

import jaxlm
from jaxlm.inference.decoding import beam_tokens, generate_tokens
from jaxlm.inference.translation import translate_tokens
from tests.hf.families import families
from tests.inference.golden_tokens import CASES, GOLDEN, PROMPT, SEARCHES, by_transformers, settings

# The others have every setting but decoder_start_token_id, with a beam and without, in both kinds of models.
SLOW = [
    ("marian", 1), ("bart", 1), ("t5", 1), ("m2m_100", 5), ("mbart", 1), ("mbart", 5), ("llama", 5), ("gpt2", 1),
    ("qwen3", 1), ("qwen3", 5),
]


def tokens(directory) -> list[list[int]]:
    """The tokens that the model in the directory generates with its own settings."""
    lm = jaxlm.load(directory)
    source = families.inputs(json.loads((directory / "config.json").read_text()))[0]
    if lm.config.kind == "seq2seq":
        return translate_tokens(lm, source.tolist(), lm.generation)[0]
    tokens = beam_tokens if lm.generation.num_beams > 1 else generate_tokens
    return tokens(lm, source[:, :PROMPT].tolist(), lm.generation)


@pytest.mark.parametrize("name, beams", [
    pytest.param(*search, marks=pytest.mark.slow) if search in SLOW else search for search in SEARCHES
])
def test_the_tokens_are_those_that_transformers_left(tmp_path, name, beams):
    family = json.loads((families.GOLDEN / f"{CASES[name][0]}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(family["config"]))
    save_file(families.weights(family["tensors"]), tmp_path / "model.safetensors")
    (tmp_path / "generation_config.json").write_text(json.dumps(settings(name, beams)))
    assert tokens(tmp_path) == json.loads(GOLDEN.read_text())[name][str(beams)]


@pytest.mark.parametrize("name, beams", SEARCHES)
def test_transformers_still_generates_them(tmp_path, name, beams):
    pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    expected = by_transformers(name, beams, tmp_path)
    assert expected == json.loads(GOLDEN.read_text())[name][str(beams)], "the golden file is of another transformers"
    assert tokens(tmp_path) == expected
