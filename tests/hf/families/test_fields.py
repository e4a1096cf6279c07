"""Which fields of config.json count: those that transformers reads. All others are noted, and change nothing."""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import version

import pytest
import tokenizers
from safetensors.numpy import save_file

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.hf.config import from_hf_config, read_config, with_defaults
from jaxlm.hf.families.fields import REQUIRED
from jaxlm.hf.families.known_fields import FILE, config_notes
from jaxlm.hf.families.registry import FAMILIES
from jaxlm.hf.wrappers import text_fields
from tests.hf.families.families import CASES, GOLDEN, weights
from tests.hf.families.read_fields import read_fields, text, transformers_source

TABLE = json.loads(FILE.read_text())
LONG = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_the_table_is_that_of_the_installed_transformers():
    if version("transformers") != TABLE["transformers"]:
        pytest.skip(f"the table is of transformers {TABLE['transformers']}")
    assert FILE.read_text() == text(read_fields(transformers_source()))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_reads_what_transformers_reads_and_has_its_defaults(model_type):
    read = TABLE["every"] | TABLE[model_type]["fields"]
    # T5 says by tie_word_embeddings how to scale its output, and always ties. MiniMax rotates whole heads where nothing
    # else is said.
    others = {("t5", "tie_word_embeddings"), ("minimax_m2", "partial_rotary_factor")}
    for field in FAMILIES[model_type].fields:
        for name, default in field.hf_defaults.items():
            assert name in read
            same = default is REQUIRED or default == read[name] or not (default or read[name])  # null and false
            assert same or (model_type, name) in others, name


# Cases, fields that published files have beside theirs, and those that are noted.
HARMLESS = [
    ("llama", {"unsloth_version": "2025.12.5", "unsloth_fixed": True}, "unsloth_version, unsloth_fixed"),
    ("llama", {"is_llama_config": True, "rope_interleaved": False}, "is_llama_config, rope_interleaved"),
    ("llama", {"transformers.js_config": {"dtype": "q4"}}, "transformers.js_config"),
    ("llama", {"_model_name_or_path": "x.gguf", "unk_token_id": 0}, "_model_name_or_path, unk_token_id"),
    ("llama", {"max_sequence_length": 2048, "alibi": True}, "max_sequence_length, alibi"),
    ("llama", {"attention_multiplier": 2.0, "final_logit_softcapping": 1.0, "num_local_experts": 4},
     "attention_multiplier, final_logit_softcapping, num_local_experts"),
    ("llama", {"layer_types": ["full_attention"] * 3, "is_causal": True, "sliding_window": None}, ""),
    ("llama", {"rope_scaling": {"type": "default", "mrope_section": [1]}}, "rope_scaling.mrope_section"),
    ("gpt_neox", {"rope_theta": 7.0, "partial_rotary_factor": 1.0}, "rope_theta, partial_rotary_factor"),
    ("llama", {"rope_scaling": {"type": "default"}, "rope_parameters": {"type": [], "x": 1}}, "rope_parameters.x"),
    ("gpt_neox", {"custom_pipeline": {"text-generation": {}}}, "custom_pipeline"),
    ("phi3", {"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1},
     "attention_bias, mlp_bias, lm_head_bias, full_attn_mod"),
    ("gemma2", {"sliding_window_size": 4096, "hidden_act": "gelu_pytorch_tanh"}, "sliding_window_size, hidden_act"),
    ("qwen2", {"use_mrope": False}, "use_mrope"),
    ("bart", {"do_blenderbot_90_layernorm": False, "num_hidden_layers": 2}, "do_blenderbot_90_layernorm"),
    ("t5", {"n_positions": 512, "dense_act_fn": "relu", "is_gated_act": False}, "n_positions"),
]


def config_of(case):
    return json.loads((GOLDEN / f"{case}.json").read_text())["config"]


def notes_on(fields):
    fields, _ = text_fields(fields)
    return config_notes(fields, with_defaults(fields))


@pytest.mark.parametrize(("case", "fields", "noted"), HARMLESS)
def test_what_transformers_does_not_read_is_noted(case, fields, noted):
    given = config_of(case)
    assert notes_on(given) == []
    assert read_config(given | fields) == read_config(given)
    notes = notes_on(given | fields)
    assert len(notes) == bool(noted) and all(f"config.json: {noted}: without effect" in note for note in notes)


def test_notes_reach_the_user_once(tmp_path):
    golden = json.loads((GOLDEN / "llama.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(golden["config"] | {"unsloth_version": "2", "x" * 900: 1}))
    save_file(weights(golden["tensors"]), tmp_path / "model.safetensors")
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 2, "a": 3}, "a"))
    raw.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": "</s>", "model_max_length": 9, "image_token": "a", "is_fancy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config, tokenizer = jaxlm.load(tmp_path).info["notes"]
    assert "unsloth_version" in config and len(config) < 200
    assert tokenizer.startswith("tokenizer_config.json: is_fancy: without effect")


@pytest.mark.parametrize(("case", "fields", "message"), [
    ("llama", {"is_causal": False}, r"is_causal = False .*only true or null"),
    ("llama", {"sliding_window": 64}, r"sliding_window = 64 .*only null"),
    ("llama", {"per_layer_config": {"0": {"hidden_act": "relu"}}}, r"per_layer_config = .*only null"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types .*only full_attention"),
    ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0.5 .*only 1.0"),
    ("mistral", {"attention_chunk_size": 64}, r"attention_chunk_size = 64 .*only null"),
    ("gpt_neox", {"head_dim": 4}, r"head_dim = 4 .*only null"),
    ("gpt2", {"add_cross_attention": True}, r"add_cross_attention = True .*False"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
])
def test_what_transformers_reads_and_we_do_not_understand_is_refused(case, fields, message):
    with pytest.raises(UserError, match=message):
        from_hf_config(config_of(case) | fields)


@pytest.mark.parametrize(("fields", "message"), [
    ({"architectures": ["LlamaForCausalLMEagle3"]}, r"LlamaForCausalLMEagle3.*draft head"),
    ({"architectures": ["DFlashDraftModel"]}, r"DFlashDraftModel.*draft head"),
    ({"draft_vocab_size": 32}, "draft_vocab_size.*draft head"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*LlamaForCausalLM"),
])
def test_models_that_only_share_the_model_type_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        read_config(config_of("llama") | fields)
    read_config(config_of("llama") | {"architectures": ["LLaMAForCausalLM"]})


def test_the_fields_that_count_are_those_of_transformers():
    """Where a file says something twice."""
    neox = {name: value for name, value in config_of("gpt_neox").items() if name != "rope_parameters"}
    given = {"rotary_emb_base": 500, "rotary_pct": 0.5, "rope_theta": 7.0, "partial_rotary_factor": 1.0}
    config = from_hf_config(neox | given)
    assert (config.rope_theta, config.rotary_fraction) == (500.0, 0.5)
    assert from_hf_config(neox | {"rope_scaling": {"partial_rotary_factor": 1.0}}).rotary_fraction == 1.0

    long = {"rope_type": "longrope", "short_factor": LONG, "long_factor": LONG, "original_max_position_embeddings": 16}
    phi = config_of("phi3") | {"rope_parameters": long, "original_max_position_embeddings": None}
    assert from_hf_config({k: v for k, v in phi.items() if v is not None}).rope_scaling.original_positions == 4096
    assert from_hf_config(phi | {"original_max_position_embeddings": 8}).rope_scaling.original_positions == 8

    for where in ("rope_scaling", "rope_parameters"):
        inside = {where: {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}}
        assert from_hf_config(neox | {"rotary_pct": 0.5} | inside).rotary_fraction == 0.25
        short = {name: value for name, value in phi.items() if value is not None and name != "rope_parameters"}
        assert from_hf_config(short | {where: long}).rope_scaling.original_positions == 4096

    for case in ("bart", "marian", "mbart", "m2m_100"):
        config = from_hf_config(config_of(case) | {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 1})
        assert (config.encoder_layers, config.decoder_layers) == (1, 2)
    for given, layers in (
        ({"num_layers": 2}, (2, 2)), ({"num_layers": 2, "num_hidden_layers": 3}, (3, 2)),
        ({"num_hidden_layers": 3}, (3, 6)),
        ({"num_layers": 2, "num_hidden_layers": 3, "num_decoder_layers": 4}, (3, 4)),
    ):
        t5 = {name: value for name, value in config_of("t5").items() if "layers" not in name}
        config = from_hf_config(t5 | given)
        assert (config.encoder_layers, config.decoder_layers) == layers
    assert from_hf_config(config_of("mixtral") | {"num_experts": 3}).experts == 3
    assert from_hf_config(config_of("t5") | {"dense_act_fn": "tanh"}).activation == "tanh"
    gated = {"feed_forward_proj": "gated-gelu", "dense_act_fn": None, "is_gated_act": None}
    assert from_hf_config(config_of("t5") | gated).activation == "geglu_tanh"
    assert from_hf_config(config_of("t5") | gated | {"dense_act_fn": "gelu"}).activation == "geglu"
    assert from_hf_config(config_of("t5") | gated | {"is_gated_act": False}).activation == "gelu_tanh"


def test_every_case_is_read_without_a_word():
    assert [name for name in CASES if notes_on(config_of(name))] == []
