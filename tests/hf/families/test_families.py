"""Models of every Hugging Face family compute, generate and export what transformers computes."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxlm
import jaxlm.core.sharding
import jaxlm.nn
from jaxlm.core.tree import flatten, map_params
from jaxlm.core.untrusted import read_json
from jaxlm.hf.directory import read_model
from jaxlm.hf.families.registry import FAMILIES
from jaxlm.hf.wrappers import WRAPPERS
from jaxlm.inference.decoding import generate_tokens
from jaxlm.inference.translation import translate_tokens
from tests.hf.families.families import (
    BEAMS,
    CASES,
    GOLDEN,
    STEPS,
    auto_class,
    inputs,
    outputs,
    transformers_model,
    weights,
)


def directory(path, name):
    """(model directory, golden figures) of a case."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    path.mkdir()
    (path / "config.json").write_text(json.dumps(golden["config"]))
    save_file(weights(golden["tensors"]), path / "model.safetensors")
    return path, golden


def logits(lm, fields):
    source, target = inputs(fields)
    return np.asarray(lm(source, target) if lm.config.kind == "seq2seq" else lm(source))


def text_type(fields):
    """The ``model_type`` of a model, or of the text model in it."""
    return fields.get("text_config", fields)["model_type"]


def test_every_family_has_a_case():
    assert {case["model_type"] for case in CASES.values()} == {*FAMILIES, *WRAPPERS}
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A function from the name of a case to its (model, golden figures)."""

    @functools.cache
    def load(name):
        path, golden = directory(tmp_path_factory.mktemp(name) / "theirs", name)
        return jaxlm.load(path), golden

    return load


def marked(slow):
    """All cases; those that ``slow`` is true for run with JAXLM_SLOW_TESTS: other cases prove the same."""
    return [pytest.param(name, marks=[pytest.mark.slow] * slow(name)) for name in CASES]


SLOW = {
    "llama-biased", "llama-dynamic", "llama-yarn", "llama-yarn-mscale", "gpt2-by-layer", "bart-untied", "marian-untied",
    "m2m_100-untied", "mistral-full", "olmo2-tied", "qwen2_moe-plain", "glm4_moe-plain", "stablelm-parallel",
    "exaone4-full", "opt-post-norm", "falcon-serial", "falcon-grouped",
}
# Every way of decoding: rotary, learned, relative, sinusoidal positions, windows, experts, two vocabularies, and by the
# length of the text. The others decode as one of these; that they compute what transformers does is in their logits.
DECODING = {
    "llama", "gpt2", "gemma3_text-scaled", "cohere2", "ministral3", "phi3-longrope", "qwen3_moe-sparse", "t5",
    "marian-two-vocabularies",
}


@pytest.mark.parametrize("name", marked(lambda name: name in SLOW))
def test_logits_are_those_of_transformers_and_exports_are_the_model(case, tmp_path, name):
    lm, golden = case(name)
    found = logits(lm, golden["config"])
    np.testing.assert_allclose(found[:, ::4], golden["logits"], atol=1e-4)

    model_type = text_type(golden["config"])
    exported = lm.export(tmp_path / "ours", format=model_type)
    assert read_json(exported / "config.json")["model_type"] == model_type
    config, params, *_ = read_model(exported)
    if config == lm.config:  # then equal parameters compute the same
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, lm.params)
    else:
        np.testing.assert_allclose(logits(jaxlm.load(exported), golden["config"]), found, atol=2e-6)


@pytest.mark.parametrize("name", marked(lambda name: name not in DECODING))
def test_text_is_that_of_transformers(case, name):
    lm, golden = case(name)
    source = inputs(golden["config"])[0]
    if lm.config.kind == "seq2seq":
        rows, _ = translate_tokens(lm, source.tolist(), beam=BEAMS, length_penalty=1.0, max_length=STEPS)
        assert rows == golden["search"]
    else:
        endless = dataclasses.replace(lm.config, eos_id=-1)
        model = lm.replace(config=endless, graphdef=jaxlm.nn.initializer(endless)[0])
        assert generate_tokens(model, source[:, :8].tolist(), max_new_tokens=STEPS) == golden["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_transformers_agrees_and_reads_what_we_export(tmp_path, name):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    model = transformers_model(name, tmp_path / "theirs")
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    live = outputs(model)
    expected = live.pop("logits")
    np.testing.assert_allclose(expected[:, ::4], golden["logits"], atol=1e-4)
    assert live == {key: golden[key] for key in live}, "the golden file is of another transformers"

    lm = jaxlm.load(tmp_path / "theirs")
    np.testing.assert_allclose(logits(lm, golden["config"]), expected, atol=1e-4)
    exported = lm.export(tmp_path / "ours", format=text_type(golden["config"]))
    again = auto_class(lm.config.kind == "seq2seq").from_pretrained(exported).eval()
    source, target = map(torch.from_numpy, inputs(golden["config"]))
    with torch.no_grad():
        both = {"decoder_input_ids": target} if lm.config.kind == "seq2seq" else {}
        np.testing.assert_allclose(again(input_ids=source, **both).logits, expected, atol=1e-5)


@pytest.mark.parametrize("name", [
    "mixtral", "gpt2", pytest.param("t5", marks=pytest.mark.slow), pytest.param("gpt_neox", marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("marian-two-vocabularies", "gpt_oss", "granitemoe")),
])
def test_a_mesh_changes_nothing(tmp_path, name):
    """Stacked, fused and expert tensors, read by eight devices."""
    path, _ = directory(tmp_path / "theirs", name)
    mesh = jaxlm.core.sharding.make_mesh(data=1, fsdp=4, tensor=2)
    one, eight = (read_model(path, mesh=each)[1] for each in (None, mesh))
    expected = flatten(jaxlm.core.sharding.shardings(eight, mesh))
    for key, leaf in flatten(eight).items():
        assert leaf.sharding.is_equivalent_to(expected[key], leaf.ndim), key
        np.testing.assert_array_equal(leaf, flatten(one)[key], key)
    assert any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in flatten(eight).values())


PRESETS = {
    "llama": jaxlm.nn.DecoderConfig(vocab_size=61, width=16, heads=4, layers=2, tie_embeddings=False),
    "gpt2": jaxlm.nn.preset("124m", vocab_size=61, width=16, heads=2, layers=2, max_positions=32),
    "gpt2-without-biases": jaxlm.nn.preset("nano", vocab_size=61, width=16, heads=2, layers=2),
    "m2m_100": jaxlm.nn.preset("tiny", vocab_size=61, width=16, heads=2, ffn=24),
    "marian": jaxlm.nn.preset(
        "tiny", vocab_size=61, width=16, heads=2, ffn=24, norm_position="post", positions="sinusoidal",
        position_offset=0,
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_models_trained_here_are_models_of_transformers(tmp_path, name):
    config, rng = PRESETS[name], np.random.default_rng(0)
    graphdef, like = jaxlm.nn.abstract(config)
    lm = jaxlm.LM(config, graphdef, map_params(
        lambda path, leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape) + path.endswith("norm/scale"), jnp.float32), like
    ))
    exported = lm.export(tmp_path / "exported")
    fields = read_json(exported / "config.json")
    assert fields["model_type"] == name.partition("-")[0]
    expected = logits(lm, fields)
    np.testing.assert_allclose(logits(jaxlm.load(exported), fields), expected, atol=1e-5)
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    source, target = map(torch.from_numpy, inputs(fields))
    seq2seq = config.kind == "seq2seq"
    kind = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model, report = kind.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        found = model.eval()(input_ids=source, **({"decoder_input_ids": target} if seq2seq else {})).logits
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_model_that_a_family_cannot_hold_is_an_error(tmp_path):
    config = dataclasses.replace(PRESETS["llama"], positions="relative")
    lm = jaxlm.LM(config, *jaxlm.nn.abstract(config))
    with pytest.raises(jaxlm.UserError, match="llama.*positions.*'relative'.*'rotary'"):
        lm.export(tmp_path / "x", format="llama")
    with pytest.raises(jaxlm.UserError, match="'bert'"):
        lm.export(tmp_path / "x", format="bert")
    assert not (tmp_path / "x").exists()
