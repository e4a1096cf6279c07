"""LoRA adapters of PEFT: what they add to which parameters, merged and kept apart, and PEFT reads those that jaxlm
writes."""

from __future__ import annotations

import functools
import json
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm import nn
from jaxlm.compression.platforms import describe_leaf
from jaxlm.core.leaves import LoRA, QArray, merge_adapters
from jaxlm.core.sharding import make_mesh, shardings
from jaxlm.core.tree import flatten, map_params
from jaxlm.hf.directory import read_model
from jaxlm.hf.peft.adapters import apply_adapter, read_adapter, save_adapter
from tests.cli.conftest import jaxlm_command  # noqa: F401  a fixture
from tests.hf.families.families import GOLDEN, transformers_model, weights

TOKENS = np.random.default_rng(0).integers(3, 50, (2, 12))
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """A function from the name of a golden case to a directory with its model, which tests do not change."""

    @functools.cache
    def make(name):
        golden = json.loads((GOLDEN / f"{name}.json").read_text())
        path = tmp_path_factory.mktemp(name) / "base"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(golden["config"]))
        save_file(weights(golden["tensors"]), path / "model.safetensors")
        return path

    return make


@functools.cache
def loaded(base):
    return jaxlm.load(base)


@functools.cache
def base_logits(base):
    return logits(loaded(base))


def write(path, tensors, **config):
    """A PEFT directory made by hand."""
    path.mkdir()
    defaults = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q"], "lora_dropout": 0.1}
    (path / "adapter_config.json").write_text(json.dumps(defaults | config))
    save_file({PREFIX + name: np.ascontiguousarray(each) for name, each in tensors.items()},
              path / "adapter_model.safetensors")
    return path


def pair(module, n_in, n_out, rank=4, seed=0):
    rng = np.random.default_rng((zlib.crc32(module.encode()), seed))
    a, b = rng.normal(0, 0.2, (rank, n_in)), rng.normal(0, 0.2, (n_out, rank))
    return {f"{module}.lora_A.weight": a.astype(np.float32), f"{module}.lora_B.weight": b.astype(np.float32)}


def edited(path, source, changes):
    """The base model with some of its tensors changed by hand, in float64."""
    tensors = load_file(source / "model.safetensors")
    for name, change in changes.items():
        tensors[name] = change(tensors.get(name)).astype(np.float32)
    path.mkdir()
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, path / "model.safetensors")
    lm = loaded(source)
    config, params, *_ = read_model(path)
    return lm.replace(params=params) if config == lm.config else jaxlm.load(path)


def product(tensors, module):
    return np.float64(tensors[f"{module}.lora_B.weight"]) @ np.float64(tensors[f"{module}.lora_A.weight"])


def assert_close(found, want) -> None:
    """To 1e-5 of the largest: sums run in another order, which each processor rounds in its own way."""
    want = np.asarray(want)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def logits(lm):
    return np.asarray(lm(TOKENS))


def check(base, adapter, expected):
    """The adapter merged and apart computes the same as the model edited by hand, and other than the base model."""
    apart = jaxlm.load(base, adapter=adapter, merge=False)
    merged = apart.replace(params=merge_adapters(apart.params))
    assert not any(isinstance(leaf, LoRA) for leaf in flatten(merged.params).values())
    want = logits(expected)
    for each in (apart, merged):  # sums in float32, whose order is XLA's: errors are a part of the largest terms
        assert_close(logits(each), want)
    assert np.abs(want - base_logits(base)).max() > 1e-2
    return apart


def fields_of(base):
    return json.loads((base / "config.json").read_text())


def with_adapter(base, adapter):
    """The model, merged by hand."""
    lm = loaded(base)
    config, params = apply_adapter(read_adapter(adapter), lm.config, lm.params, fields_of(base))
    return lm.replace(config=config, graphdef=nn.abstract(config)[0], params=merge_adapters(params))


def test_each_layer_gets_its_own_rank_and_scale(tmp_path, base_model):
    base = base_model("llama")
    q, down = "model.layers.{}.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    tensors = pair(q.format(0), 32, 32, 2) | pair(q.format(2), 32, 32, 5) | pair(down, 48, 32)
    adapter = write(
        tmp_path / "adapter", tensors, rank_pattern={"layers.0.self_attn.q_proj": 2, r"layers\.2.*q_proj": 5},
        alpha_pattern={"down_proj": 3}, use_rslora=True, r=4,
    )
    scales = {q.format(0): 6 / 2**0.5, q.format(2): 6 / 5**0.5, down: 3 / 2}
    changes = {f"{m}.weight": lambda w, m=m, s=s: w + s * product(tensors, m) for m, s in scales.items()}
    apart = check(base, adapter, edited(tmp_path / "edited", base, changes))
    leaf = flatten(apart.params)["decoder/layers/0/attn/q/kernel"]
    assert leaf.a.shape == (3, 32, 5) and leaf.shape == (3, 32, 32) and describe_leaf(leaf) == "float32 + rank 5"
    assert not np.any(leaf.b[1]) and not np.any(leaf.scale[1])  # the layer that has none
    assert not isinstance(flatten(apart.params)["decoder/layers/0/attn/k/kernel"], LoRA)


@pytest.mark.parametrize("name, module, n_in, n_out, transposed", [
    ("gpt2", "transformer.h.{}.attn.c_attn", 32, 96, False),
    pytest.param("gpt2-by-layer", "transformer.h.{}.attn.c_attn", 32, 96, False, marks=pytest.mark.slow),
    ("phi3", "model.layers.{}.mlp.gate_up_proj", 32, 96, True),
    ("gpt_neox", "gpt_neox.layers.{}.attention.query_key_value", 32, 96, True),
])
def test_fused_tensors_share_a_and_slice_b(tmp_path, base_model, name, module, n_in, n_out, transposed):
    base = base_model(name)
    modules = [module.format(i) for i in range(3)]
    tensors = {key: each for m in modules for key, each in pair(m, n_in, n_out).items()}
    adapter = write(tmp_path / "adapter", tensors, fan_in_fan_out=not transposed)

    def change(weight, m):
        delta = 1.5 * product(tensors, m)
        return weight + (delta if transposed else delta.T)

    changes = {f"{m}.weight": lambda w, m=m: change(w, m) for m in modules}
    apart = check(base, adapter, edited(tmp_path / "edited", base, changes))
    again = save_adapter(tmp_path / "again", apart.config, apart.params, fields_of(base))
    written = load_file(again / "adapter_model.safetensors")
    assert written.keys() == {PREFIX + key for key in tensors}
    for key, each in tensors.items():
        np.testing.assert_array_equal(written[PREFIX + key], each)
    assert json.loads((again / "adapter_config.json").read_text())["fan_in_fan_out"] is not transposed


def test_experts_have_adapters_of_their_own(tmp_path, base_model):
    base = base_model("mixtral")
    modules = "model.layers.1.block_sparse_moe.experts.2.w1", "model.layers.0.block_sparse_moe.gate"
    tensors = pair(modules[0], 32, 48) | pair(modules[1], 32, 4)
    adapter = write(tmp_path / "adapter", tensors)
    changes = {f"{m}.weight": lambda w, m=m: w + 1.5 * product(tensors, m) for m in modules}
    check(base, adapter, edited(tmp_path / "edited", base, changes))


@pytest.mark.parametrize("name, modules", [
    ("t5", {
        "decoder.block.1.layer.1.EncDecAttention.q": (32, 24), "encoder.block.2.layer.1.DenseReluDense.wi": (32, 48)
    }),
    ("marian", {"model.decoder.layers.2.encoder_attn.v_proj": (32, 32), "model.encoder.layers.0.fc2": (48, 32)}),
])
def test_translation_models_are_adapted_on_both_sides(tmp_path, base_model, name, modules):
    base = base_model(name)
    tensors = {key: each for module, sizes in modules.items() for key, each in pair(module, *sizes).items()}
    adapter = write(tmp_path / "adapter", tensors)
    changes = {f"{m}.weight": lambda w, m=m: w + 1.5 * product(tensors, m) for m in modules}
    found, expected = with_adapter(base, adapter), edited(tmp_path / "edited", base, changes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.params, expected.params)


def test_whole_tensors_and_biases_replace_those_of_the_model(tmp_path, base_model):
    base = base_model("gpt2")
    rng = np.random.default_rng(1)
    norm, bias = (rng.normal(0, 1, n).astype(np.float32) for n in (32, 96))
    tensors = {"transformer.ln_f.weight": norm, "transformer.h.1.attn.c_attn.base_layer.bias": bias}
    adapter = write(tmp_path / "adapter", tensors | pair("transformer.h.0.mlp.c_fc", 32, 128), bias="lora_only")
    delta = product(pair("transformer.h.0.mlp.c_fc", 32, 128), "transformer.h.0.mlp.c_fc")
    expected = edited(tmp_path / "edited", base, {
        "transformer.ln_f.weight": lambda _: norm, "transformer.h.1.attn.c_attn.bias": lambda _: bias,
        "transformer.h.0.mlp.c_fc.weight": lambda w: w + 1.5 * delta.T,
    })
    check(base, adapter, expected)


@pytest.mark.parametrize("end", ["embedding", "head", "own head"])
def test_tied_embeddings_are_untied_where_one_of_them_is_adapted(tmp_path, base_model, end):
    base = base_model("gpt2")
    rng = np.random.default_rng(1)
    table = load_file(base / "model.safetensors")["transformer.wte.weight"]
    a, b = rng.normal(0, 0.3, (4, 61)).astype(np.float32), rng.normal(0, 0.3, (32, 4)).astype(np.float32)
    moved = table + 1.5 * (b @ a).T
    tensors = {
        "embedding": {"transformer.wte.lora_embedding_A": a, "transformer.wte.lora_embedding_B": b},
        "head": {"lm_head.lora_A.weight": b.T, "lm_head.lora_B.weight": a.T},
        "own head": {"lm_head.weight": moved},
    }[end]
    adapter = write(tmp_path / "adapter", tensors)
    one = "transformer.wte.weight" if end == "embedding" else "lm_head.weight"
    changes = {"lm_head.weight": lambda _: table} | {one: lambda _: moved}
    apart = check(base, adapter, edited(tmp_path / "edited", base, changes))
    assert not apart.config.tie_embeddings
    if end != "own head":
        again = save_adapter(tmp_path / "again", apart.config, apart.params, fields_of(base))
        assert_close(logits(with_adapter(base, again)), logits(apart))


@pytest.mark.parametrize("recipe", [pytest.param("w8a8-dynamic", marks=pytest.mark.slow), "w4a16-rtn-g8"])
def test_a_quantized_base_keeps_its_codes(tmp_path, base_model, recipe):
    base = base_model("llama")
    module = "model.layers.1.self_attn.v_proj"
    adapter = write(tmp_path / "adapter", pair(module, 32, 16))
    small = jaxlm.compress(loaded(base), recipe)
    small.save(tmp_path / "small")
    apart = jaxlm.load(tmp_path / "small", adapter=adapter, merge=False, expand=False)
    leaf = flatten(apart.params)["decoder/layers/0/attn/v/kernel"]
    assert isinstance(leaf, LoRA) and isinstance(leaf.base, QArray)
    np.testing.assert_array_equal(leaf.base.codes, flatten(small.params)["decoder/layers/0/attn/v/kernel"].codes)
    assert np.abs(logits(apart) - logits(small)).max() > 0.5
    merged = jaxlm.load(tmp_path / "small", adapter=adapter, expand=False)
    assert [note for note in merged.info["notes"] if note.startswith("1 quantized") and "adapter" in note]
    if recipe != "w8a8-dynamic":  # there activations are rounded before the product, but not once merged
        assert_close(logits(merged), logits(apart))
    apart.save(tmp_path / "saved")
    np.testing.assert_array_equal(logits(jaxlm.load(tmp_path / "saved", expand=False)), logits(merged))


def test_a_copy_of_a_model_that_scales_attention_by_layer_takes_its_adapters(tmp_path, base_model):
    """Compressed or saved again, queries keep the scale that the adapter was trained with."""
    base = base_model("gpt2-by-layer")
    adapter = write(tmp_path / "adapter", pair("transformer.h.2.attn.c_attn", 32, 96), fan_in_fan_out=True)
    lm, apart = loaded(base), jaxlm.load(base, adapter=adapter, merge=False)
    lm.save(tmp_path / "saved")
    jaxlm.compress(lm, "w8a16-rtn").save(tmp_path / "small")
    saved, small = (jaxlm.load(tmp_path / name, adapter=adapter, merge=False) for name in ("saved", "small"))
    assert fields_of(tmp_path / "saved")["scale_attn_by_inverse_layer_idx"] is True
    np.testing.assert_array_equal(logits(saved), logits(apart))
    assert saved.config.attention_scale_by_layer and small.config.attention_scale_by_layer
    query = "decoder/layers/0/attn/q/kernel"
    for part in ("a", "b", "scale"):
        expected = getattr(flatten(apart.params)[query], part)
        np.testing.assert_array_equal(getattr(flatten(small.params)[query], part), expected)


def test_saving_and_compressing_merge(tmp_path, base_model):
    base = base_model("llama")
    adapter = write(tmp_path / "adapter", pair("model.layers.1.self_attn.v_proj", 32, 16))
    merged, apart = (jaxlm.load(base, adapter=adapter, merge=merge) for merge in (True, False))
    for name, save in {"saved": apart.save, "exported": apart.export}.items():
        save(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == "llama"
        np.testing.assert_allclose(logits(jaxlm.load(tmp_path / name)), logits(merged), atol=1e-6)
    small = jaxlm.compress(apart, "w4a16-rtn-g8")
    expected = jaxlm.compress(merged, "w4a16-rtn-g8")
    jax.tree.map(np.testing.assert_array_equal, small.params, expected.params)


def test_on_a_mesh_the_parts_are_sharded_as_the_weight(tmp_path, base_model):
    base = base_model("llama")
    adapter = write(tmp_path / "adapter", pair("model.layers.1.self_attn.q_proj", 32, 32))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread = jaxlm.load(base, adapter=adapter, merge=False, mesh=mesh)
    leaf = flatten(spread.params)["decoder/layers/0/attn/q/kernel"]
    parts = {name: getattr(leaf, name).sharding.spec for name in ("base", "a", "b", "scale")}
    assert [tuple(spec) for spec in parts.values()] == [
        (None, "fsdp", "tensor"), (None, "fsdp", None), (None, None, "tensor"), (None, None, None)
    ]
    assert jax.tree.structure(shardings(spread.params, mesh)) == jax.tree.structure(spread.params)
    assert_close(logits(spread), logits(jaxlm.load(base, adapter=adapter)))


def test_a_second_adapter_lies_upon_the_first_and_an_adapter_finds_its_base(tmp_path, base_model):
    base = base_model("llama")
    one, two = pair("model.layers.1.self_attn.q_proj", 32, 32), pair("model.layers.1.self_attn.q_proj", 32, 32, seed=1)
    first = write(tmp_path / "first", one, base_model_name_or_path=str(base))
    second = write(tmp_path / "second", two)
    name = "model.layers.1.self_attn.q_proj"
    total = product(one, name) + product(two, name)
    expected = edited(tmp_path / "edited", base, {f"{name}.weight": lambda w: w + 1.5 * total})
    lm = jaxlm.load(first, adapter=second, merge=False)
    for each in (lm, jaxlm.load(first, adapter=second)):
        assert_close(logits(each), logits(expected))
    with pytest.raises(jaxlm.UserError, match="q/kernel has two adapters"):
        save_adapter(tmp_path / "x", lm.config, lm.params)


def test_names_may_lack_the_prefix_and_the_family_is_found(tmp_path, base_model):
    base = base_model("gpt2")
    adapter = write(tmp_path / "adapter", pair("h.1.attn.c_attn", 32, 96))
    lm = loaded(base)
    config, params = apply_adapter(read_adapter(adapter), lm.config, lm.params)  # no config.json
    found = lm.replace(config=config, params=merge_adapters(params))
    np.testing.assert_array_equal(logits(found), logits(jaxlm.load(base, adapter=adapter)))


def test_what_differs_between_queries_keys_and_values_is_saved_as_a_sum_of_ranks(tmp_path, base_model):
    base = base_model("gpt2")
    lm, rng = loaded(base), np.random.default_rng(0)

    def adapt(path, leaf):
        if not re.fullmatch(r"decoder/layers/0/attn/[qv]/kernel", path):
            return leaf
        a, b = rng.normal(0, 0.3, (3, 32, 2)), rng.normal(0, 0.3, (3, 2, 32))
        scale = np.full((3, 1, 1), 2.0 if "/q/" in path else 0.5, np.float32)
        return LoRA(leaf, *(jnp.asarray(each, jnp.float32) for each in (a, b, scale)))

    adapted = lm.replace(params=map_params(adapt, lm.params))
    out = save_adapter(tmp_path / "out", lm.config, adapted.params)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    assert_close(logits(jaxlm.load(base, adapter=out)), logits(adapted))
    with pytest.raises(jaxlm.UserError, match="no parameter"):
        save_adapter(tmp_path / "x", lm.config, lm.params)
    with pytest.raises(jaxlm.UserError, match="base .*adapter directory"):
        save_adapter(base, lm.config, adapted.params)


GOOD = pair("model.layers.1.self_attn.q_proj", 32, 32)
LAYER = "model.layers.1.self_attn"


@pytest.mark.parametrize("tensors, config, message", [
    (GOOD, {"use_dora": True}, "adapter_config.json: use_dora is True.*lora_magnitude_vector"),
    (GOOD | {"model.layers.1.self_attn.q_proj.lora_magnitude_vector": np.ones(32, np.float32)}, {},
     "use_dora is False, and"),
    (GOOD, {"some_new_switch": 3}, "some_new_switch = 3"),
    (GOOD, {"peft_type": "IA3"}, "peft_type 'IA3'"),
    (GOOD, {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    (GOOD, {"r": 8}, r"tensor 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight' has rank 4, .* be 8"),
    (GOOD, {"lora_alpha": "6"}, "lora_alpha = '6'"),
    (GOOD, {"alpha_pattern": {"q_proj": None}}, "lora_alpha = None"),
    (GOOD, {"rank_pattern": {"(": 4}}, r"'\(' in rank_pattern"),
    (GOOD, {"rank_pattern": [4]}, r"rank_pattern = \[4\]"),
    (pair(f"{LAYER}.q_proj", 32, 48), {}, r"safetensors: .*q_proj'.* 32 inputs and 48 outputs, .* 32 and 32"),
    (pair("model.layers.7.self_attn.q_proj", 32, 32), {}, "'model.layers.7.*q_proj.weight'"),
    (pair("transformer.h.0.attn.c_attn", 32, 96), {}, "'transformer.h.0.attn.c_attn.weight'"),
    ({f"{LAYER}.q_proj.lora_A.weight": np.zeros((4, 32), np.float32)}, {}, "lora_B.weight'"),
    ({f"{LAYER}.q_proj.lora_B.weight": np.zeros((4, 32), np.float32)}, {}, "lora_B.weight'.*lora_A.weight"),
    (GOOD | {f"{LAYER}.q_proj.lora_magnitude_vector": np.zeros(3, np.float32)}, {},
     "use_dora is False.*lora_magnitude_vector"),
    (GOOD | {f"{LAYER}.q_proj.lora_bias": np.zeros(3, np.float32)}, {}, "lora_bias'"),
    (GOOD, {"lora_alpha": 10**400}, "lora_alpha = 1000"),
    (GOOD, {"rank_pattern": {"(.|..|...)+[xy]": 4}}, "xy.' in rank_pattern takes too long"),
    ({name: tensor.view(np.int32) for name, tensor in GOOD.items()}, {}, "lora_A.weight' is of the type int32"),
    ({"model.norm.weight": np.zeros(32, np.int32)}, {}, "'base_model.model.model.norm.weight' is of the type int32"),
    ({"model.norm.weight": np.zeros(31, np.float32)}, {}, r"'model.norm.weight'.*\[31\].*\[32\]"),
])
def test_unknown_settings_and_tensors_are_an_error_of_one_line(tmp_path, base_model, tensors, config, message):
    llama = loaded(base_model("llama"))
    adapter = write(tmp_path / "adapter", tensors, **config)
    with pytest.raises(jaxlm.UserError, match=message) as caught:
        apply_adapter(read_adapter(adapter), llama.config, llama.params)
    assert str(tmp_path / "adapter") in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_are_an_error_of_one_line(tmp_path, base_model):
    base = base_model("llama")
    with pytest.raises(jaxlm.UserError, match="base has no adapter_config.json"):
        jaxlm.load(base, adapter=base)
    adapter = write(tmp_path / "adapter", GOOD, base_model_name_or_path="/nowhere/llama")
    with pytest.raises(jaxlm.UserError, match="'/nowhere/llama'"):
        jaxlm.load(adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(jaxlm.UserError, match="adapter_config.json.*JSON"):
        jaxlm.load(base, adapter=adapter)
    (write(tmp_path / "pickled", GOOD) / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(jaxlm.UserError, match="has no adapter_model.safetensors"):
        jaxlm.load(base, adapter=tmp_path / "pickled")


# Live -----------------------------------------------------------------------------------------------------------------


LIVE = {
    "llama": dict(
        r=4, lora_alpha=10, target_modules=["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"],
        rank_pattern={"v_proj": 2}, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 3}, layers_to_transform=None,
    ),
    "llama-biased": dict(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "up_proj"], bias="all",
        modules_to_save=["lm_head"], layers_to_transform=[0, 2],
    ),
    "gpt2": dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True, bias="lora_only"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIVE)
def test_peft_computes_the_same_and_reads_what_we_write(tmp_path, name):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    peft = pytest.importorskip("peft", reason="peft is not installed: nothing to compare with")
    model = transformers_model(name, tmp_path / "base")
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **LIVE[name]))
    with torch.no_grad():
        for key, each in tuned.named_parameters():
            if each.requires_grad and "lora_" not in key:
                each += 0.1 * torch.randn_like(each)
        expected = tuned.eval()(torch.from_numpy(TOKENS)).logits.numpy()
    tuned.save_pretrained(tmp_path / "adapter")
    apart = jaxlm.load(tmp_path / "base", adapter=tmp_path / "adapter", merge=False)
    for params in (apart.params, merge_adapters(apart.params)):
        assert_close(logits(apart.replace(params=params)), expected)

    if LIVE[name].get("bias") or LIVE[name].get("modules_to_save"):
        return  # whole tensors are not part of what we write
    out = save_adapter(tmp_path / "again", apart.config, apart.params, fields_of(tmp_path / "base"))
    base = type(tuned.get_base_model()).from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        assert_close(again(torch.from_numpy(TOKENS)).logits, expected)


def test_commands_take_an_adapter(tmp_path, base_model, jaxlm_command):  # noqa: F811
    base = base_model("llama")
    adapter = write(tmp_path / "adapter", GOOD)
    words = ("compress", base, "--adapter", adapter, "--recipe", "w4a16-rtn-g8", "--out", tmp_path / "small")
    assert jaxlm_command(*words)[0] == 0
    expected = jaxlm.compress(jaxlm.load(base, adapter=adapter), "w4a16-rtn-g8")
    jax.tree.map(np.testing.assert_array_equal, read_model(tmp_path / "small")[1], expected.params)
    for command in ("evaluate", "generate", "translate"):
        status, out, _ = jaxlm_command(command, "--help")
        assert "--adapter DIR" in out
