"""Hugging Face directories: a Llama computes what its paper says, loading spares memory, what cannot be is an error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import make_mesh
from jaxlm.hf.assemble import copy_into
from jaxlm.hf.config import from_hf_config
from jaxlm.hf.directory import read_model

FIELDS = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "rope_theta": 500.0, "bos_token_id": 3,
    "eos_token_id": [5, 6], "max_position_embeddings": 64,
}


def random_tensors(rng: np.random.Generator, bias: bool, tied: bool) -> dict[str, np.ndarray]:
    """A llama of FIELDS with everything random, norms too."""
    shapes = {"model.embed_tokens.weight": (50, 24), "model.norm.weight": (24,)}
    if not tied:
        shapes["lm_head.weight"] = (50, 24)
    sizes = {"q": (24, 24), "k": (12, 24), "v": (12, 24), "o": (24, 24)}
    sizes |= {"gate": (40, 24), "up": (40, 24), "down": (24, 40)}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        for name, shape in sizes.items():
            module = f"{prefix}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj"
            shapes[f"{module}.weight"] = shape
            if bias:
                shapes[f"{module}.bias"] = shape[:1]
        shapes |= {f"{prefix}.input_layernorm.weight": (24,), f"{prefix}.post_attention_layernorm.weight": (24,)}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def llama_logits(fields: dict, tensors: dict[str, np.ndarray], tokens_T: np.ndarray) -> np.ndarray:
    """Llama (arXiv:2302.13971) in float64, one head and one position at a time, written from the paper."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    width, heads, groups = fields["hidden_size"], fields["num_attention_heads"], fields["num_key_value_heads"]
    size, T = width // heads, len(tokens_T)

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + fields["rms_norm_eps"]) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def rotate(x_K, position):
        half = size // 2
        angle = position * fields["rope_theta"] ** (-np.arange(half) * 2 / size)
        a, b = x_K[:half], x_K[half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    x = w["model.embed_tokens.weight"][tokens_T]
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        h = norm(x, f"{prefix}.input_layernorm")
        q, k, v = (linear(h, f"{prefix}.self_attn.{name}_proj") for name in "qkv")
        mixed = np.zeros((T, width))
        for head in range(heads):
            mine, shared = slice(head * size, (head + 1) * size), head // (heads // groups)
            theirs = slice(shared * size, (shared + 1) * size)
            for t in range(T):
                scores = [rotate(q[t, mine], t) @ rotate(k[s, theirs], s) / np.sqrt(size) for s in range(t + 1)]
                weights = np.exp(scores - np.max(scores))
                mixed[t, mine] = weights / weights.sum() @ v[: t + 1, theirs]
        x = x + linear(mixed, f"{prefix}.self_attn.o_proj")
        h = norm(x, f"{prefix}.post_attention_layernorm")
        gate = linear(h, f"{prefix}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{prefix}.mlp.up_proj"), f"{prefix}.mlp.down_proj")
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def write(directory, fields, tensors):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(("bias", "tied"), [(False, False), (True, True)])
def test_a_llama_computes_what_the_paper_says(tmp_path, rng, bias, tied):
    fields = FIELDS | {"attention_bias": bias, "mlp_bias": bias, "tie_word_embeddings": tied}
    tensors = random_tensors(rng, bias, tied)
    lm = jaxlm.load(write(tmp_path / "llama", fields, tensors))
    tokens = rng.integers(0, 50, 11)
    np.testing.assert_allclose(lm(tokens[None])[0], llama_logits(fields, tensors, tokens), atol=2e-4, rtol=2e-4)
    assert (lm.config.bos_id, lm.config.eos_id, lm.config.pad_id) == (3, 5, 5)
    assert lm.tokenizer is None


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_half_precision_sources(tmp_path, rng, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in random_tensors(rng, False, False).items()}
    half = jaxlm.load(write(tmp_path / "half", FIELDS, tensors))
    full = jaxlm.load(write(tmp_path / "full", FIELDS, {name: x.astype(np.float32) for name, x in tensors.items()}))
    tokens = rng.integers(0, 50, (2, 7))
    np.testing.assert_array_equal(half(tokens), full(tokens))


def test_weights_in_several_files(tmp_path, rng):
    tensors = random_tensors(rng, False, False)
    one = jaxlm.load(write(tmp_path / "one", FIELDS, tensors))
    many = tmp_path / "many"
    many.mkdir()
    (many / "config.json").write_text(json.dumps(FIELDS))
    names = sorted(tensors)
    files = {f"model-{i + 1}.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, many / file)
    index = many / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    tokens = rng.integers(0, 50, (1, 7))
    lm = jaxlm.load(many)
    np.testing.assert_array_equal(lm(tokens), one(tokens))
    assert lm.info["bytes_on_disk"] == sum((many / file).stat().st_size for file in files)
    (many / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2\.safetensors"):
        jaxlm.load(many)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        jaxlm.load(many)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "tensor 'model.layers.1.mlp.up_proj.weight'"),
    (lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)}),
     "tensor 'model.norm.weight' is [7], by config.json it should be [24]"),
    (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].view(np.int32)}),
     "tensor 'model.norm.weight' is of the type int32"),
    (lambda t: t.update({"adapter.weight": np.ones(7, np.float32)}),
     "tensor 'adapter.weight'"),
])
def test_tensors_that_do_not_fit_are_named(tmp_path, rng, change, message):
    tensors = random_tensors(rng, False, False)
    change(tensors)
    with pytest.raises(UserError) as caught:
        jaxlm.load(write(tmp_path / "llama", FIELDS, tensors))
    assert "model.safetensors" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_parameters": {"rope_type": "axial"}}, "'axial'"),
    ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor = -2.0"),
    ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
    ({"num_key_value_heads": 3}, "3 key/value heads"),
    ({"num_hidden_layers": "3"}, "layers: '3'"),
    ({"num_hidden_layers": -1}, "layers is -1"),
    ({"hidden_size": None}, "hidden_size"),
])
def test_what_changes_the_mathematics_is_refused(change, message):
    with pytest.raises(UserError) as caught:
        from_hf_config(FIELDS | change)
    assert message in str(caught.value)


def test_both_spellings_of_the_rotary_base():
    old = from_hf_config(FIELDS)
    new = {name: value for name, value in FIELDS.items() if name != "rope_theta"}
    assert old.rope_theta == 500.0
    assert from_hf_config(new).rope_theta == 10000.0
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    assert from_hf_config(new) == old


def test_a_real_llama_agrees_with_transformers(shared, rng):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    path = shared / "models" / "books-llama"
    reference = transformers.LlamaForCausalLM.from_pretrained(path)
    tokens = rng.integers(0, 4096, (2, 100))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(jaxlm.load(path)(tokens), expected, atol=1e-4)


def test_a_real_llama_round_trips_through_our_format(shared, tmp_path, rng):
    lm = jaxlm.load(shared / "models" / "books-llama")
    again = jaxlm.load(lm.save(tmp_path / "copy"))
    tokens = rng.integers(0, 4096, (1, 20))
    np.testing.assert_array_equal(again(tokens), lm(tokens))
    text = "It was a dark night and\n\n\"so\"  on."
    assert again.tokenizer.encode(text) == lm.tokenizer.encode(text)
    original = load_file(shared / "models" / "books-llama" / "model.safetensors")
    assert sum(x.size for x in original.values()) == 5_475_584
    shutil.rmtree(tmp_path / "copy")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_transposed_matrices_are_copied_exactly(rng, dtype):
    """In strips and by several threads, whole and in parts."""
    array = rng.normal(size=(700, 611)).astype(ml_dtypes.bfloat16 if dtype == "float32" else np.float32)
    for source in (array, array.T, array[33:, 5:], array[33:, 5:].T):
        out = np.zeros((2, *source.shape), dtype)
        copy_into(out[1], source)
        np.testing.assert_array_equal(out[1], source.astype(dtype))
        assert not out[0].any()


def test_a_device_with_memory_of_its_own_gets_one_piece_at_a_time(tmp_path, rng, monkeypatch):
    """On all platforms except CPU the stack of layers is assembled on the device."""
    path = write(tmp_path / "llama", FIELDS, random_tensors(rng, False, False))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    whole = [read_model(path, mesh=each)[1] for each in (None, mesh)]
    monkeypatch.setattr("jaxlm.hf.assemble._on_host", lambda target: False)
    for expected, each in zip(whole, (None, mesh), strict=True):
        found = read_model(path, mesh=each)[1]
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(str(a)), found, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_one_tensor_beyond_the_parameters(tmp_path, rng):
    """Peak resident memory of a process that loads 4 layers, whose tensors are stacked as one parameter here."""
    fields = FIELDS | {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 256}
    width, ffn, layer = 512, 4096, "model.layers.{}"
    shapes = {"model.embed_tokens.weight": (256, width), "lm_head.weight": (256, width), "model.norm.weight": (width,)}
    for i in range(4):
        shapes |= {f"{layer.format(i)}.self_attn.{n}_proj.weight": (width, width) for n in "qo"}
        shapes |= {f"{layer.format(i)}.self_attn.{n}_proj.weight": (width // 2, width) for n in "kv"}
        shapes |= {f"{layer.format(i)}.mlp.{n}_proj.weight": (ffn, width) for n in ("gate", "up")}
        shapes |= {f"{layer.format(i)}.mlp.down_proj.weight": (width, ffn)}
        shapes |= {f"{layer.format(i)}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    write(tmp_path / "llama", fields, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    code = textwrap.dedent("""
        import sys, jax, jaxlm
        from pathlib import Path
        def memory(field):
            return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
                        if line.startswith(field))
        jaxlm.load(sys.argv[2])
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        params = jaxlm.load(sys.argv[1]).params
        jax.block_until_ready(params)
        print(memory("VmHWM") - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
    """)
    small = write(tmp_path / "small", FIELDS, random_tensors(rng, False, False))
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "llama", small], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 4 * width * ffn + 12e6  # a tensor of the 115 MB, where a stack of four has 34 MB
