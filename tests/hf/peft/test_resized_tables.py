"""Adapters that bring whole tables: resized ones, as PEFT 0.21 writes them, tied or not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from tests.hf.families.families import transformers_model
from tests.hf.peft.test_adapters import (
    TOKENS,
    assert_close,
    base_model,  # noqa: F401  a fixture
    fields_of,
    logits,
    pair,
    product,
    write,
)

EMBED, HEAD, Q = "model.embed_tokens", "lm_head", "model.layers.1.self_attn.q_proj"
ROWS = 66  # of the resized tables; the base models have 61


def tables(count):
    """Tables with so many rows, by name."""
    rng = np.random.default_rng(count)
    return [rng.normal(0, 0.3, (ROWS, 32)).astype(np.float32) for _ in range(count)]


def three_names(module, trained, original):
    return {
        f"{module}.weight": trained, f"{module}.modules_to_save.weight": trained,
        f"{module}.original_module.weight": original,
    }


def by_hand(path, base, embedding, head, delta):
    """The base model with other tables; without a head they are tied."""
    tensors = load_file(base / "model.safetensors") | {f"{EMBED}.weight": embedding}
    tensors[f"{Q}.weight"] = (tensors[f"{Q}.weight"] + 1.5 * product(delta, Q)).astype(np.float32)
    tensors |= {} if head is None else {f"{HEAD}.weight": head}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields_of(base) | {"vocab_size": len(embedding)}))
    save_file(tensors, path / "model.safetensors")
    return jaxlm.load(path)


DELTA = pair(Q, 32, 32)


def cases(tied):
    first, second, third = tables(3)
    resized = {f"{HEAD}.weight": first, f"{EMBED}.weight": first}
    adapted = pair(HEAD, 32, ROWS)
    yield "trained apart", three_names(EMBED, first, third) | three_names(HEAD, second, third), (first, second)
    yield "embedding trained", three_names(EMBED, first, third) | {f"{HEAD}.weight": third}, (first, third)
    yield "head trained", three_names(HEAD, first, third) | {f"{EMBED}.weight": third}, (third, first)
    changed = (third + 1.5 * product(adapted, HEAD)).astype(np.float32)
    bases = {f"{EMBED}.base_layer.weight": third, f"{HEAD}.base_layer.weight": third}
    yield "head adapted", adapted | bases, (third, changed)
    if tied:
        yield "resized only", resized, (first, None)
        both = three_names(EMBED, first, third) | three_names(HEAD, first, third)
        yield "ensure_weight_tying", both, (first, None)
        bases.pop(f"{EMBED}.base_layer.weight")
        yield "head adapted, one table saved", adapted | bases, (third, changed)


@pytest.mark.parametrize("name", ["llama", "llama-biased"])  # untied, tied
def test_resized_tables_replace_those_of_the_model(tmp_path, base_model, name):  # noqa: F811
    base = base_model(name)
    tied = fields_of(base)["tie_word_embeddings"]
    size = load_file(base / "model.safetensors")[f"{Q}.weight"].shape[0]
    delta = pair(Q, 32, size)
    for number, (what, tensors, (embedding, head)) in enumerate(cases(tied)):
        adapter = write(
            tmp_path / f"adapter{number}", delta | tensors, ensure_weight_tying=what == "ensure_weight_tying",
            modules_to_save=["embed_tokens", "lm_head"],
        )
        found = jaxlm.load(base, adapter=adapter)
        expected = by_hand(tmp_path / f"expected{number}", base, embedding, head, delta)
        assert (found.config.vocab_size, found.config.tie_embeddings) == (ROWS, head is None), what
        assert_close(logits(found), logits(expected))


def test_tables_that_contradict_each_other_are_refused(tmp_path, base_model):  # noqa: F811
    base, (first, second) = base_model("llama"), tables(2)
    names = three_names(EMBED, first, first) | three_names(HEAD, first, first)
    for number, (tensors, message) in enumerate([
        (names | {f"{HEAD}.modules_to_save.weight": second}, "lm_head.*is another than"),
        (three_names(EMBED, first, first), "its tables are for 66 tokens, 'lm_head.weight'.* is for 61"),
        ({f"{EMBED}.weight": first, f"{HEAD}.weight": second[:50]}, "different numbers of rows .*50.*66"),
    ]):
        with pytest.raises(jaxlm.UserError, match=message):
            jaxlm.load(base, adapter=write(tmp_path / str(number), DELTA | tensors))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "llama-biased"])
def test_peft_computes_the_same(tmp_path, name):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    peft = pytest.importorskip("peft", reason="peft is not installed: nothing to compare with")
    for number, options in enumerate([
        {"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ]):
        torch.manual_seed(0)
        model = transformers_model(name, tmp_path / f"base{number}")
        model = type(model).from_pretrained(tmp_path / f"base{number}").eval()
        model.resize_token_embeddings(ROWS)
        tuned = peft.get_peft_model(model, peft.LoraConfig(
            r=2, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=["q_proj"], **options
        ))
        with torch.no_grad():
            for key, each in tuned.named_parameters():
                if each.requires_grad and "lora_" not in key:
                    each += 0.1 * torch.randn_like(each)
            expected = tuned.eval()(torch.from_numpy(TOKENS)).logits.numpy()
        tuned.save_pretrained(tmp_path / f"adapter{number}")
        assert_close(logits(jaxlm.load(tmp_path / f"base{number}", adapter=tmp_path / f"adapter{number}")), expected)
