"""What the files beside a tokenizer.json say of its tokens: as transformers 5.24 reads them."""

from __future__ import annotations

import json

import pytest

from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.backends import role_tokens
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from tests.data.tokenizers.pieces import LLAMA, write

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The tokenizer.json of Llama 2's first kind, over a small vocabulary."""
    directory = write(tmp_path_factory.mktemp("llama"), {"tokenizer.model": LLAMA})
    return as_published(directory)


def as_published(directory):
    Tokenizer.load(directory).save(directory / "saved")
    spec = json.loads((directory / "saved" / "tokenizer.json").read_text())
    return spec | {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]}}


def load(directory, spec, config=None, model=None, **files):
    files |= {"tokenizer": spec, "tokenizer_config": NAMES if config is None else NAMES | config}
    if model is not None:
        files["config"] = model
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.load(directory)


@pytest.mark.parametrize(("config", "model", "space"), [
    ({"tokenizer_class": "LlamaTokenizer", "legacy": False}, "llama", False),
    ({"tokenizer_class": "LlamaTokenizerFast"}, "gemma2", False),
    ({"tokenizer_class": "LlamaTokenizer"}, None, False),
    ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, "llama", True),
    ({"tokenizer_class": "LlamaTokenizer"}, "mistral", True),
    ({"tokenizer_class": "LlamaTokenizerFast"}, "phi3", True),
    ({"tokenizer_class": "PreTrainedTokenizerFast"}, "llama", True),
    ({}, "llama", True),
])
def test_where_the_class_decides_and_where_the_file(llama, config, model, space, tmp_path):
    """``space``: whether a text after a special token begins with a space of its own."""
    tokenizer = load(tmp_path, llama, config, model and {"model_type": model, "vocab_size": 999})
    newline, gap = tokenizer.encode("\n")[-1], tokenizer.encode("▁")[0]
    assert tokenizer.encode_prompt("</s>\n") == [1, 2, *([gap] if space else []), newline]
    assert tokenizer.decode(tokenizer.encode_prompt("a</s>\n"), skip_special=False).startswith("<s>")
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode_prompt("</s>\n") == tokenizer.encode_prompt("</s>\n")


def test_a_llama_without_a_space_before_texts(llama, tmp_path):
    plain = load(tmp_path, llama, {"tokenizer_class": "LlamaTokenizer"})
    bare = load(tmp_path, llama, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False})
    assert bare.encode("\n") == plain.encode("\n")[1:] and bare.decode(bare.encode("the house")) == "the house"


def test_llama_2_as_published(shared, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((shared / "models" / "tokenizers" / "llama2.model").read_bytes())
    spec = as_published(tmp_path)
    (tmp_path / "json").mkdir()
    for tokenizer_class, ids in (("LlamaTokenizer", [1, 2, 13]), ("PreTrainedTokenizerFast", [1, 2, 29871, 13])):
        tokenizer = load(tmp_path / "json", spec, {"tokenizer_class": tokenizer_class})
        assert tokenizer.encode_prompt("</s>\n") == ids


def test_special_tokens_are_found_wherever_they_are_named(llama, tmp_path):
    size = len(llama["model"]["vocab"])
    token = next(token for token in llama["model"]["vocab"] if token.isalpha() and len(token) > 1)
    ids = {token: llama["model"]["vocab"][token]}
    room = {"model_type": "llama", "vocab_size": size + 8}
    named = load(tmp_path, llama, {"extra_special_tokens": {"image_token": token, "boi": "<boi>"}}, room)
    assert named.backend.special_tokens.items() >= ids.items() | {"<boi>": size}.items()
    assert named.encode_prompt("<s>" + token) == [1, ids[token]] and named.encode_prompt("<s><boi>") == [1, size]
    templated = Tokenizer(named.backend, named.config | {"chat_template": "{{ image_token }}{{ boi }}{{ eos_token }}"})
    assert templated.encode_chat([]) == [ids[token], size, 2]
    listed = load(tmp_path, llama, {"extra_special_tokens": [token, "<new>"]}, room)
    assert listed.backend.special_tokens.items() >= ids.items() | {"<new>": size}.items()
    custom = load(tmp_path, llama, {"audio_token": "<audio>", "pad_token": token}, room)
    assert custom.backend.special_tokens.items() >= ids.items() | {"<audio>": size}.items()
    assert custom.pad_id == ids[token]
    for full in ({"model_type": "llama", "vocab_size": size}, {"model_type": "llama"}):
        without = load(tmp_path, llama, {"extra_special_tokens": {"boi": "<boi>"}, "pad_token": "<new>"}, full)
        assert without.vocab_size == size and without.pad_id is None, "there is no row for them"


def test_added_tokens_that_only_tokenizer_config_has(llama, tmp_path):
    size = len(llama["model"]["vocab"])
    added = {
        "2": PLAIN | {"content": "</s>", "special": False, "rstrip": True},
        str(size + 1): PLAIN | {"content": "<|end|>", "rstrip": True}, str(size): PLAIN | {"content": "<|user|>"},
        str(size + 2): PLAIN | {"content": "<think>", "special": False},
    }
    tokenizer = load(tmp_path, llama, {"added_tokens_decoder": added})
    assert tokenizer.backend.special_tokens == {
        "<unk>": 0, "<s>": 1, "</s>": 2, "<|user|>": size, "<|end|>": size + 1
    }
    assert tokenizer.encode_prompt("<|user|><|end|> \n</s>\n<think>") == [1, size, size + 1, 2, size + 2]
    assert tokenizer.encode("<think>") == [size + 2], "not special: found in every text"
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").backend.special_tokens == tokenizer.backend.special_tokens
    with pytest.raises(UserError, match=rf"'<gap>' the id {size + 7}, and by the vocabulary it has {size}"):
        load(tmp_path, llama, {"added_tokens_decoder": {str(size + 7): PLAIN | {"content": "<gap>"}}})


def test_what_special_tokens_map_says_comes_first_where_it_is_read(llama, tmp_path):
    file = {"bos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<unk>"}
    tokenizer = load(tmp_path, llama, {"bos_token": "<s>"}, special_tokens_map=file)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 2, 0)
    known = {"added_tokens_decoder": {"1": PLAIN | {"content": "<s>"}}}
    tokenizer = load(tmp_path, llama, known, special_tokens_map=file)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (1, None), "not read beside added_tokens_decoder"
    lists = {"additional_special_tokens": ["<a>"], "extra_special_tokens": ["<b>"]}
    tokenizer = load(tmp_path, llama, {"additional_special_tokens": ["<c>"]}, special_tokens_map=lists)
    assert [token for token in tokenizer.backend.special_tokens if len(token) == 3 and token != "<s>"] == ["<c>", "<b>"]


def test_what_names_no_token_is_none():
    config = {
        "a_token": {"a": 1}, "b_token": 3, "c_token": {"content": "<c>"}, "add_bos_token": True, "d_token": "<d>",
        "extra_special_tokens": {"e": "<e>", "f": {}, "g": ["<g>"]},
    }
    assert role_tokens(config) == {"c_token": {"content": "<c>"}, "d_token": "<d>", "e": "<e>"}
