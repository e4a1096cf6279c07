"""A sample of ``tests.hf.fuzz``, and damage that users meet: each is an error of one line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from tests.hf.fuzz import BASES, outcome, run

SAMPLE_BASES = ("llama-yarn", "gpt2", "jaxlm-w4a16")


def test_a_sample_of_damaged_directories_load_or_are_refused_in_a_line():
    results = list(run(1, range(60), SAMPLE_BASES))
    assert [result for result in results if result[2] not in ("loaded", "refused")] == []
    assert {result[2] for result in results} == {"loaded", "refused"}


def test_the_fuzzer_notices(tmp_path, monkeypatch):
    """It reports each kind of fault that it exists to find."""

    def raises(error):
        def read_model(path):
            raise error

        return read_model

    faults = {
        "KeyError in": raises(KeyError("x")), "not one line": raises(UserError(f"{tmp_path}: a\nb")),
        "names the directory": raises(UserError("a tensor is wrong")), "MemoryError": lambda path: np.ones(10**10),
    }
    for expected, fault in faults.items():
        monkeypatch.setattr("tests.hf.fuzz.read_model", fault)
        assert expected in outcome(tmp_path)
    assert set(SAMPLE_BASES) <= set(BASES)


@pytest.fixture(scope="module")
def books(shared):
    return shared / "models" / "books-llama"


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(books, tmp_path):
    path = tmp_path / "books"
    shutil.copytree(books, path)
    raw = json.loads((path / "tokenizer.json").read_text())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    raw["added_tokens"].append({"id": 4096, "content": "<image>"} | token)
    (path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        jaxlm.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "'<image>' the id 4096" in str(caught.value)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"image_token": "<image>"}))
    assert jaxlm.load(path).tokenizer.vocab_size == 4097  # no text has it


def test_each_language_of_a_translation_model_has_its_own_rows():
    tokenizer = Tokenizer.train(["ab"], "char")
    tokenizer.vocabulary.check_embedding_rows(5, 5)
    for rows in ((4, 5), (5, 4)):
        with pytest.raises(UserError, match="'b' the id 4.* 4 rows"):
            tokenizer.vocabulary.check_embedding_rows(*rows)
