"""Model directories: exact round trips, all-or-nothing writes, and damage that is named."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import nn
from jaxlm.checkpoint.store import Store
from jaxlm.core.config import to_dict
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray
from jaxlm.core.tree import flatten, map_params, unflatten
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf import directory as directory_module
from jaxlm.hf.directory import read_model, weight_bytes, write_model
from jaxlm.nn.config import DecoderConfig, LSTMConfig, Seq2SeqConfig
from jaxlm.training.config import Experiment

TOKENIZER = Tokenizer.train(["the cat sat on the mat"], "char")
CONFIGS = [
    DecoderConfig(
        vocab_size=24, width=32, heads=4, layers=3, layer_groups=(2, 1), windows=(4, 0), attention_softcap=9.0
    ),  # which no family has
    Seq2SeqConfig(vocab_size=24, width=16, heads=2, encoder_layers=1, decoder_layers=2, tie_embeddings=False),
    LSTMConfig(vocab_size=24, width=16),
]


def assert_same(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert jax.tree.structure(a[path]) == jax.tree.structure(b[path]), path
        for x, y in zip(jax.tree.leaves(a[path]), jax.tree.leaves(b[path]), strict=True):
            assert x.dtype == y.dtype, path
            np.testing.assert_array_equal(x, y, path)


def random_params(config):
    rng = np.random.default_rng(0)
    return map_params(lambda _, leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), nn.abstract(config)[1])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(directory, config, params) of a small model on disk, which tests do not change."""
    config = CONFIGS[0]
    params = random_params(config)
    return write_model(tmp_path_factory.mktemp("written") / "model", config, params, TOKENIZER), config, params


@pytest.fixture
def model(written, tmp_path):
    """(directory, config, params) of a copy of the model, which tests may damage."""
    path, config, params = written
    return shutil.copytree(path, tmp_path / "model"), config, params


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_round_trip(tmp_path, config):
    params = random_params(config)
    extras = {"info": {"note": [1]}, "files": {"x.json": {"y": 2}}}
    written = write_model(tmp_path / "a" / "b", config, params, TOKENIZER, **extras)
    config2, params2, tokenizer2, info = read_model(written)
    assert config2 == config
    assert_same(params2, params)
    assert tokenizer2.encode("the cat") == TOKENIZER.encode("the cat")
    assert info["note"] == [1]
    assert info["bytes_on_disk"] == (written / "model.safetensors").stat().st_size == weight_bytes(written)
    assert json.loads((written / "x.json").read_text()) == {"y": 2}
    assert json.loads((written / "config.json").read_text())["model_type"] == f"jaxlm-{config.kind}"
    assert json.loads((written / "generation_config.json").read_text())["eos_token_id"] == config.eos_id


def test_a_dense_llama_is_written_as_one(tmp_path):
    config = DecoderConfig(
        vocab_size=24, width=32, heads=4, layers=3, layer_groups=(2, 1), dropout=0.1, remat="full", kv_cache="int4"
    )
    params = random_params(config)
    path = write_model(tmp_path / "m", config, params, TOKENIZER, info={"note": [1]})
    fields = json.loads((path / "config.json").read_text())
    assert (fields["model_type"], fields["architectures"]) == ("llama", ["LlamaForCausalLM"])
    config2, params2, _, info = read_model(path)
    assert config2 == dataclasses.replace(config, kv_heads=4, head_dim=8, ffn=128)  # what was derived is written
    assert_same(params2, params)
    assert info["note"] == [1]

    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(UserError, match=r"model\.safetensors: tensor '.*checksum"):
        read_model(path)
    fields["jaxlm"]["runtime"]["layer_groups"] = [2, 2]
    (path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"layer_groups = \(2, 2\).*3 layers"):
        read_model(path)


@pytest.mark.parametrize("config", [
    pytest.param(CONFIGS[0], id="own", marks=pytest.mark.slow),
    pytest.param(DecoderConfig(vocab_size=24, width=32, heads=4, layers=2), id="llama"),
])
def test_the_kv_cache_is_chosen_on_loading_and_saved(tmp_path, config):
    path = write_model(tmp_path / "m", config, random_params(config), TOKENIZER)
    tokens = jnp.arange(12).reshape(2, 6)
    lm, low = jaxlm.load(path), jaxlm.load(path, kv_cache="int4")
    assert (lm.config.kv_cache, low.config.kv_cache) == ("full", "int4")
    want = low(tokens)
    assert jnp.abs(want - lm(tokens)).max() > 1e-3
    saved = jaxlm.load(low.save(tmp_path / "low"))
    assert saved.config.kv_cache == "int4"
    np.testing.assert_array_equal(saved(tokens), want)
    np.testing.assert_array_equal(saved.configure(kv_cache="full")(tokens), lm(tokens))
    with pytest.raises(UserError, match="kv_cache.*int8"):
        jaxlm.load(path, kv_cache="int7")
    recurrent = write_model(tmp_path / "r", CONFIGS[2], random_params(CONFIGS[2]), None)
    with pytest.raises(UserError, match="kv_cache"):
        jaxlm.load(recurrent, kv_cache="int8")


def test_a_model_without_a_tokenizer(tmp_path):
    config = CONFIGS[2]
    params = random_params(config)
    assert read_model(write_model(tmp_path / "m", config, params, None))[2] is None


def test_a_compressed_model_comes_back_as_it_was(tmp_path):
    config = CONFIGS[2]
    lm = jaxlm.LM(config, nn.abstract(config)[0], random_params(config), TOKENIZER)
    small = jaxlm.compress(lm, "sparse50-magnitude+w4a16-rtn-g8+huffman")
    path = small.save(tmp_path / "small")
    again = jaxlm.load(path, expand=False)
    assert_same(again.params, small.params)
    assert again.recipe == small.recipe
    placed = jaxlm.load(path)
    assert placed.info["notes"]  # weight-only integers are slow on a CPU
    assert not any(isinstance(leaf, QArray) for leaf in flatten(placed.params).values())
    tokens = np.arange(20).reshape(2, 10)
    np.testing.assert_allclose(placed(tokens), again(tokens), atol=1e-4)
    report = json.loads((path / "compression.json").read_text())
    assert report["recipe"] == small.recipe.to_json()
    assert {row["path"] for row in report["tensors"]} == set(flatten(lm.params))


def test_saving_a_loaded_model_changes_nothing(model, tmp_path):
    path = jaxlm.load(model[0]).save(tmp_path / "copy")
    assert (path / "model.safetensors").read_bytes() == (model[0] / "model.safetensors").read_bytes()
    assert read_model(path)[0] == model[1]


def test_a_model_is_replaced_whole(model):
    path, config, params = model
    other = jax.tree.map(lambda x: x + 1, params)
    write_model(path, config, other, None)
    assert_same(read_model(path)[1], other)
    assert not (path / "tokenizer.json").exists()
    assert [each.name for each in path.parent.iterdir()] == ["model"]


def test_a_failed_write_leaves_the_old_model(model, monkeypatch):
    path, config, params = model

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(directory_module, "write_tensors", full)
    with pytest.raises(UserError, match="no space left for .*model"):
        write_model(path, config, params, TOKENIZER)
    assert_same(read_model(path)[1], params)
    assert [each.name for each in path.parent.iterdir()] == ["model"]


def test_other_directories_are_not_overwritten(model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(UserError, match="photos.*not a model directory"):
        write_model(tmp_path / "photos", *model[1:], TOKENIZER)
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "empty", *model[1:], TOKENIZER)


def test_permissions_are_those_of_new_files(model):
    plain = model[0].parent / "plain"
    plain.touch()
    for file in model[0].iterdir():
        assert file.stat().st_mode == plain.stat().st_mode, file


def _header(path, change):
    """Rewrites the header of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _huge(header):
    header["embed/table"]["shape"] = [10**9, 10**9]


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-5]),
    lambda path: path.write_bytes(path.read_bytes()[:100]),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"\xff" * 16),
    lambda path: _header(path, _huge),
    lambda path: path.unlink(),
    lambda path: (path.unlink(), path.mkdir()),
], ids=["short", "header", "empty", "garbage", "huge", "missing", "directory"])
def test_damaged_weights_are_named(model, damage):
    damage(model[0] / "model.safetensors")
    with pytest.raises(UserError, match=r"model(/| has no )model\.safetensors"):
        read_model(model[0])


def test_a_lost_or_flipped_tensor_is_named(model):
    path = model[0] / "model.safetensors"
    whole = path.read_bytes()
    position = whole.index(np.asarray(flatten(model[2])["embed/table"]).tobytes())
    path.write_bytes(whole[: position + 3] + bytes([whole[position + 3] ^ 1]) + whole[position + 4 :])
    with pytest.raises(UserError, match="embed/table'.*checksum"):
        read_model(model[0])
    path.write_bytes(whole)

    def lose(header):
        header["other"] = header.pop("embed/table")
        header["__metadata__"] = {"jaxlm": header["__metadata__"]["jaxlm"]}  # without checksums

    _header(path, lose)
    with pytest.raises(UserError, match=r"model\.safetensors has no tensor 'embed/table'"):
        read_model(model[0])


@pytest.mark.parametrize(("text", "message"), [
    ("{", "JSON"),
    ("[]", "JSON object"),
    ('{"model_type": "jaxlm-decoder", "widht": 3}', "'widht'"),
    ('{"model_type": "jaxlm-x"}', "kind is 'x'"),
    ('{"model_type": "bert"}', "model_type 'bert' is not supported"),
    ("{}", "model_type None is not supported"),
])
def test_a_damaged_config_is_explained(model, text, message):
    (model[0] / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_model(model[0])
    assert str(model[0] / "config.json") in str(caught.value) and message in str(caught.value)


def test_weights_of_another_model_are_refused(model):
    path = model[0] / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"ffn": 99}))
    with pytest.raises(UserError, match=r"decoder/layers/0/mlp/.*config.json"):
        read_model(model[0])


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="none does not exist"):
        jaxlm.load(tmp_path / "none")
    with pytest.raises(UserError, match="has no config.json"):
        jaxlm.load(tmp_path)


@pytest.mark.parametrize(("metric", "expected"), [("loss", 1), pytest.param("bleu", 2, marks=pytest.mark.slow)])
def test_a_run_gives_its_model_else_its_best_else_its_latest_checkpoint(tmp_path, metric, expected):
    config = CONFIGS[0]
    like = random_params(config)
    experiment = to_dict(Experiment(model=config))
    experiment["eval"]["metric"] = metric
    (tmp_path / "experiment.json").write_text(json.dumps(experiment))
    TOKENIZER.save(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        jaxlm.load(tmp_path)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class State:
        params: dict
        moments: dict

    def state(value):
        params = {path: jnp.full(leaf.shape, value) for path, leaf in flatten(like).items()}
        return State(params, params)

    store = Store(tmp_path / "checkpoints", keep_latest=3, keep_best=3)
    store.save(3, state(3.0), {})
    store.wait()
    lm = jaxlm.load(tmp_path)
    assert (lm.config, lm.info["step"]) == (config, 3)
    assert_same(lm.params, unflatten(like, state(3.0).params))
    for step, score in [(4, 0.5), (5, 0.75), (6, None)]:
        store.save(step, state(float(step)), {}, score)
    store.close()
    assert jaxlm.load(tmp_path).info["step"] == 3 + expected
    write_model(tmp_path / "model", config, like, TOKENIZER)
    assert_same(jaxlm.load(tmp_path).params, like)
