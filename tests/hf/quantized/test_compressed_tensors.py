"""compressed-tensors: jaxlm reads what the package writes, and the package and transformers read what jaxlm writes.

    python -m tests.hf.quantized.test_compressed_tensors      writes compressed_golden.json; needs compressed-tensors

The golden file holds small matrices as the package stores them, and the weights that it makes of them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm import nn
from jaxlm.compression.prune.scores import magnitude, n_of_m
from jaxlm.compression.quantize.codebook import E2M1, TableQuantize
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, LowRank, QArray, dequantize_tree
from jaxlm.core.tree import flatten, map_params
from jaxlm.hf.directory import read_model, weight_bytes
from jaxlm.hf.quantized.compressed_tensors import compressed_tensors_matrices
from jaxlm.hf.quantized.compressed_tensors_scheme import Scheme
from jaxlm.hf.quantized.matrix import dequantize_matrix
from jaxlm.hf.quantized.packing import pack_int32, unpack_int32
from jaxlm.hf.tensor_files import TensorFiles
from jaxlm.model import LM
from jaxlm.nn.config import DecoderConfig

GOLDEN = Path(__file__).with_name("compressed_golden.json")
CASES = {
    "int4-group": Scheme(4, symmetric=False, group=16, strategy="group"),
    "int4-channel": Scheme(4),
    "int3-channel": Scheme(3, symmetric=False),
    "int8-group": Scheme(8, group=32, strategy="group"),
    "w8a8": Scheme(8, activations="dynamic"),
    "w8a8-static": Scheme(8, activations="static"),
    "fp8": Scheme(8, floats=True, activations="dynamic"),
    "mxfp4": Scheme(4, floats=True, group=32, strategy="group"),
    "w4a8-group": Scheme(4, group=16, strategy="group", activations="dynamic"),
}
CONFIG = DecoderConfig(vocab_size=40, width=32, heads=4, kv_heads=2, layers=3, ffn=48, max_positions=64)
TOKENS = np.random.default_rng(1).integers(0, 40, (2, 9))


def config_of(scheme, *targets):
    return {
        "quant_method": "compressed-tensors", "format": scheme.format, "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": list(targets or ("Linear",)), **scheme.to_json()}}, "ignore": [],
    }


def golden():
    """name -> (tensors, the weights that they store)."""
    stored = json.loads(GOLDEN.read_text())
    arrays = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn}

    def array(entry):
        dtype = np.dtype(arrays.get(entry["dtype"], entry["dtype"]))
        return np.frombuffer(bytes.fromhex(entry["bytes"]), dtype).reshape(entry["shape"])

    return {
        name: ({part: array(entry) for part, entry in case["tensors"].items()}, array(case["weight"]))
        for name, case in stored.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_what_the_package_writes_is_read(name, tmp_path):
    tensors, weight = golden()[name]
    save_file({f"a.b.{part}": array for part, array in tensors.items()}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    matrices = compressed_tensors_matrices(files, config_of(CASES[name]))
    (found, matrix), = matrices.items()
    assert (found, matrix.shape) == ("a.b.weight", weight.shape)
    leaf = matrix.read()
    np.testing.assert_array_equal(dequantize_matrix(leaf), weight)
    assert set(matrix.stored_names) == set(files)
    codes = np.uint8 if name == "mxfp4" else ml_dtypes.float8_e4m3fn if CASES[name].floats else np.int8
    assert leaf.codes.dtype == codes
    if CASES[name].activations == "static":
        np.testing.assert_array_equal(leaf.act_scale, [[0.125]])


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_hold_each_rows_bits_in_order(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 37)).astype(np.uint8)
    words = pack_int32(codes, bits)
    assert words.shape == (3, -(-37 * bits // 32)) and words.dtype == np.int32
    for row, word in zip(codes, words, strict=True):
        number = sum(int(w) << 32 * i for i, w in enumerate(word.view(np.uint32)))
        assert [number >> bits * i & 2**bits - 1 for i in range(37)] == row.tolist()
    np.testing.assert_array_equal(unpack_int32(words, bits, 37), codes)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_older_words_hold_whole_codes(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 64)).astype(np.uint8)
    each = 32 // bits
    words = np.zeros((3, -(-64 // each)), np.uint32)
    for i in range(64):
        words[:, i // each] |= codes[:, i].astype(np.uint32) << np.uint32(bits * (i % each))
    np.testing.assert_array_equal(unpack_int32(words.view(np.int32), bits, 64), codes)
    with pytest.raises(ValueError, match="do not hold 64 codes"):
        unpack_int32(words.view(np.int32)[:, :5], bits, 64)


# Whole models ---------------------------------------------------------------------------------------------------------


@functools.cache
def model(config=CONFIG):
    rng = np.random.default_rng(0)
    graphdef, like = nn.abstract(config)
    params = map_params(lambda _, leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), like)
    return LM(config, graphdef, params)


def on_kernels(fn, lm, part="/layers/"):
    def change(path, leaf):
        return fn(leaf) if path.endswith("/kernel") and part in path else leaf

    return lm.replace(params=map_params(change, lm.params))


def float8(leaf):
    w = np.asarray(leaf).swapaxes(-1, -2)
    scale = np.abs(w).max(-1, keepdims=True) / 448
    return QArray(jnp.asarray(w / scale, jnp.float8_e4m3fn), jnp.asarray(scale), None, 8, 0, 8)


def static(leaf):
    coded = quantize(leaf, bits=8, act_bits=8)
    scales = jnp.full((*coded.codes.shape[:-2], 1, 1), 0.037)
    return dataclasses.replace(coded, act_scale=scales)


RECIPES = {
    "int4-group": lambda leaf: quantize(leaf, bits=4, group=16, symmetric=False),
    "int4-symmetric": lambda leaf: quantize(leaf, bits=4, group=16),
    "int5-channel": lambda leaf: quantize(leaf, bits=5, symmetric=False),
    "int8-group": lambda leaf: quantize(leaf, bits=8, group=16),
    "w8a8": lambda leaf: quantize(leaf, bits=8, act_bits=8),
    "w8a8-static": static,
    "fp8": float8,
    "mxfp4": lambda leaf: leaf if leaf.shape[-2] % 32 else TableQuantize("mxfp4", 32).weight(leaf, -2),
    "w4a8-group": lambda leaf: quantize(leaf, bits=4, group=16, act_bits=8),
}


def same_leaves(a, b):
    for (path, x), y in zip(flatten(a).items(), flatten(b).values(), strict=True):
        assert jax.tree.structure(x) == jax.tree.structure(y), path
        for one, two in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            assert one.dtype == two.dtype, path
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two), path)


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_comes_back_leaf_for_leaf(name, tmp_path):
    small = on_kernels(RECIPES[name], model())
    path = small.export(tmp_path / "m", format="compressed-tensors")
    config, params, _, info = read_model(path)
    assert config == dataclasses.replace(CONFIG, head_dim=8)
    same_leaves(params, small.params)
    if name == "int4-group":  # equal configurations and leaves compute the same: one is enough
        np.testing.assert_array_equal(jaxlm.load(path, expand=False)(TOKENS), small(TOKENS))
    bits = 8 * info["tensor_bytes"]["decoder/layers/0/mlp/up/kernel"] / (3 * 32 * 48)
    assert bits < {"int4-group": 8, "int4-symmetric": 7, "int5-channel": 7.5}.get(name, 11)


def test_layers_in_other_bits_are_layer_groups(tmp_path):
    config = dataclasses.replace(CONFIG, layer_groups=(1, 2))
    two = on_kernels(RECIPES["int8-group"], model(config), "/layers/0/")
    small = on_kernels(RECIPES["int4-symmetric"], two, "/layers/1/")
    small = small.replace(params=map_params(
        lambda path, leaf: leaf if "o/kernel" not in path or "/1/" not in path else jnp.asarray(
            dequantize_tree(small.params)["decoder"]["layers"][1]["attn"]["o"]["kernel"].get_value()
        ), small.params,
    ))
    path = small.export(tmp_path / "m", format="compressed-tensors")
    layout = json.loads((path / "config.json").read_text())["quantization_config"]
    assert len(layout["config_groups"]) == 2 and "model.layers.1.self_attn.o_proj" in layout["ignore"]
    found, params, *_ = read_model(path)
    assert found.layer_groups == (1, 2)
    same_leaves(params, small.params)


def test_tensors_that_are_one_matrix_in_the_family(tmp_path, monkeypatch):
    from jaxlm.hf import directory

    def phi3(config, exact=True):
        return directory.to_hf_config(config, "phi3")

    monkeypatch.setattr(directory, "simplest_hf_config", phi3)
    small = on_kernels(RECIPES["int4-group"], model())
    path = small.export(tmp_path / "m", format="compressed-tensors")
    stored = load_file(path / "model.safetensors")
    assert stored["model.layers.0.self_attn.qkv_proj.weight_packed"].shape == (32 + 16 + 16, 4)
    same_leaves(read_model(path)[1], small.params)
    mixed = on_kernels(RECIPES["int8-group"], model(), "attn/q/")
    with pytest.raises(UserError, match="q/kernel, decoder/layers/0/attn/k/kernel, .* must be quantized alike"):
        mixed.export(tmp_path / "n", format="compressed-tensors")


@pytest.mark.parametrize(("prune", "layout"), [
    (lambda leaf: magnitude(leaf, sparsity=0.6), "sparse-bitmask"),
    (lambda leaf: n_of_m(leaf, n=2, m=4), "sparse-24-bitmask"),
    (lambda leaf: n_of_m(leaf, n=1, m=4), "sparse-24-bitmask"),
])
def test_pruned_models_are_masks_and_values(prune, layout, tmp_path):
    pruned = on_kernels(prune, model())
    path = pruned.export(tmp_path / "m", format="compressed-tensors")
    sparsity = json.loads((path / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert sparsity["format"] == layout
    same_leaves(read_model(path)[1], pruned.params)
    assert weight_bytes(path) < 0.75 * weight_bytes(pruned.export(tmp_path / "d"))


@pytest.mark.parametrize(("fn", "message"), [
    (lambda leaf: quantize(leaf, bits=4, group=20), "32 inputs, .*-channel"),
    (lambda leaf: quantize(leaf, bits=4, group=24), "32 inputs, .* 24"),
    (lambda leaf: TableQuantize("mxfp4", 32).weight(leaf, -2), "48 inputs, .* 32, .*w4a16-rtn-g16"),
    (lambda leaf: Codebook(jnp.zeros(leaf.shape, jnp.uint8).swapaxes(-1, -2), jnp.zeros((*leaf.shape[:-2], 16)), None,
                           4, 0, "nf4"), r"nf4.*w4a16-rtn-g64"),
    (lambda leaf: LowRank(leaf[..., :2], jnp.zeros((*leaf.shape[:-2], 2, leaf.shape[-1]))), "low-rank factors"),
    (lambda leaf: leaf, "nothing in this model is quantized or pruned"),
])
def test_leaves_that_the_layout_does_not_have_are_an_error_of_one_line(fn, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        on_kernels(fn, model()).export(tmp_path / "m", format="compressed-tensors")
    assert "\n" not in str(error.value) and not (tmp_path / "m").exists()


def test_the_nearest_group_divides_all_inputs(tmp_path):
    wide = model(dataclasses.replace(CONFIG, width=128, ffn=192))
    with pytest.raises(UserError, match="192 inputs.* -g64 .*-g128"):
        on_kernels(lambda leaf: quantize(leaf, bits=4, group=128), wide).export(tmp_path, format="compressed-tensors")


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    small = on_kernels(RECIPES["int4-group"], on_kernels(RECIPES["w8a8-static"], model(), "/attn/"), "/mlp/")
    path = small.export(tmp_path_factory.mktemp("ct") / "m", format="compressed-tensors")
    return json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")


def refused(path, fields, tensors):
    (path / "config.json").write_text(json.dumps(fields))
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UserError) as error:
        read_model(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_tensors_that_do_not_fit_are_refused(written, tmp_path):
    fields, tensors = written
    for name in [name for name in tensors if "layers.1.mlp.up" in name or "layers.1.self_attn.q_proj" in name]:
        whole = tensors[name]
        refused(tmp_path, fields, {key: value for key, value in tensors.items() if key != name})
        of_its_size = {1: np.uint8, 2: np.int16, 4: np.float32 if whole.dtype == np.int32 else np.int32, 8: np.float64}
        another = np.float16 if whole.dtype == np.int8 else np.bool_
        for broken in (
            whole.reshape(-1)[:-1], whole.astype(another), whole.view(of_its_size[whole.dtype.itemsize]),
        ):
            refused(tmp_path, fields, tensors | {name: broken})
    huge = tensors | {"model.layers.1.mlp.up_proj.weight_shape": np.array([2**40, 2**40])}
    refused(tmp_path, fields, huge)


def test_configurations_that_make_no_sense_are_refused(written, tmp_path):
    fields, tensors = written
    layout = fields["quantization_config"]
    for path in (
        ("quant_method",), ("format",), ("config_groups",), ("config_groups", "group_0"),
        ("config_groups", "group_1", "targets"), ("config_groups", "group_1", "weights"),
        *(("config_groups", "group_1", "weights", field) for field in ("num_bits", "type", "symmetric", "strategy")),
        ("config_groups", "group_0", "input_activations", "strategy"),
    ):
        for value in (None, -7, "?", {}):
            changed = copy.deepcopy(layout)
            node = changed
            for key in path[:-1]:
                node = node[key]
            if value is None and path[-1] in ("strategy", "format"):
                continue
            if value in ({}, None) and path == ("config_groups", "group_1", "weights"):
                continue
            node[path[-1]] = value
            refused(tmp_path, fields | {"quantization_config": changed}, tensors)
    endless = copy.deepcopy(layout)
    endless["config_groups"]["group_0"]["targets"] = ["re:(.|..|...)+[xy]"]
    assert "takes too long" in refused(tmp_path, fields | {"quantization_config": endless}, tensors)


# The package ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "int4-group", "int4-symmetric", "int5-channel", "w8a8", "w8a8-static", "w4a8-group", "mxfp4", "mixed",
])
def test_transformers_reads_what_we_write(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    if name == "mixed":
        config = dataclasses.replace(CONFIG, layer_groups=(1, 2))
        small = on_kernels(RECIPES["int4-symmetric"], model(config), "/layers/0/")
        small = on_kernels(RECIPES["w8a8"], small, "/layers/1/")
    else:
        small = on_kernels(RECIPES[name], model())
    if name == "mxfp4":  # transformers runs it in bfloat16; compared in float32, of the same values
        small = small.replace(params=jax.tree.map(
            lambda array: array.astype(jnp.bfloat16).astype(jnp.float32) if array.dtype == jnp.float32 else array,
            small.params,
        ))
    path = small.export(tmp_path / "m", format="compressed-tensors")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.float().numpy()
        if name == "mxfp4":
            logits = torch.nn.Module.float(theirs)(torch.tensor(TOKENS)).logits.numpy()
    # The package spreads integer activations over 255 steps a token, jaxlm over 254: some are rounded differently.
    rounded = name in ("w8a8", "w8a8-static", "w4a8-group", "mixed")
    np.testing.assert_allclose(logits, small(TOKENS), atol=0.2 if rounded else 1e-4)


def main():
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    out = {}
    for name, scheme in CASES.items():
        rng = np.random.default_rng(len(name))
        low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1)
        fields = scheme.to_json()
        theirs = QuantizationScheme(targets=["Linear"], **fields)
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        groups = 64 // scheme.group if scheme.group else 1
        scale = torch.tensor(rng.random((16, groups)) + 0.1, dtype=torch.float32)
        zero = torch.tensor(rng.integers(low, high, (16, groups)), dtype=torch.int8)
        zero = torch.zeros_like(zero) if scheme.symmetric else zero
        codes = torch.tensor(rng.integers(low, high, (16, 64)), dtype=torch.float32)
        if scheme.mxfp4:
            scale = torch.tensor(2.0 ** rng.integers(-5, 5, (16, groups)), dtype=torch.float32)
            codes = torch.tensor(rng.choice(E2M1, (16, 64)))
        spread = [each.float().repeat_interleave(64 // groups, 1) for each in (scale, zero)]
        state = {"weight": (codes - spread[1]) * spread[0], "weight_scale": scale, "weight_zero_point": zero}
        state = compressor.compress(state, theirs)
        tensors = dict(state)
        if scheme.activations == "static":
            tensors["input_scale"] = torch.tensor([0.125])
        weight = compressor.decompress(state, theirs)["weight"].float()
        out[name] = {
            "tensors": {part: _entry(tensor) for part, tensor in tensors.items()}, "weight": _entry(weight),
        }
    GOLDEN.write_text(json.dumps(out, indent=1) + "\n")


def _entry(tensor):
    import torch

    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "bytes": data}


if __name__ == "__main__":
    main()
