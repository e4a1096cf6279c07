"""The GPTQ and AWQ layouts, with tensors that are packed here one value at a time, as their authors' code does."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray
from jaxlm.core.tree import flatten
from jaxlm.hf.directory import read_model
from jaxlm.hf.quantized.awq import awq_matrices
from jaxlm.hf.quantized.gptq import gptq_matrices
from jaxlm.hf.quantized.matrix import dequantize_matrix
from jaxlm.hf.tensor_files import TensorFiles

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
FIELDS = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}
KERNELS = {
    **{f"self_attn.{name}_proj": (32, 32 if name in "qo" else 16) for name in "qkvo"},
    "mlp.gate_proj": (32, 64), "mlp.up_proj": (32, 64), "mlp.down_proj": (64, 32),
}


def words(codes, bits, order=None):
    """A row's codes as 32-bit words, by the bits of one long number."""
    rows = []
    for row in codes.tolist():
        if order is not None:
            row = [row[start + i] for start in range(0, len(row), len(order)) for i in order]
        number = sum(int(code) << bits * i for i, code in enumerate(row))
        rows.append([number >> 32 * i & 2**32 - 1 for i in range(-(-len(row) * bits // 32))])
    return np.array(rows, np.uint32).view(np.int32)


def draw(rng, n_in, n_out, bits, group, symmetric=False):
    """Codes [in, out], zeros and scales [groups, out]."""
    groups = -(-n_in // group)
    codes = rng.integers(0, 2**bits, (n_in, n_out))
    zeros = np.full((groups, n_out), 2 ** (bits - 1)) if symmetric else rng.integers(0, 2**bits, (groups, n_out))
    return codes, zeros, rng.random((groups, n_out)).astype(np.float16)


def gptq(codes, zeros, scales, bits, g_idx, offset=1):
    return {
        "qweight": words(codes.T, bits).T.copy(), "qzeros": words((zeros - offset) % 2**bits, bits), "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }


def awq(codes, zeros, scales):
    return {"qweight": words(codes, 4, AWQ), "qzeros": words(zeros, 4, AWQ), "scales": scales}


def weight(codes, zeros, scales, g_idx):
    """``[in, out]`` in float64."""
    return (codes.astype(np.float64) - zeros[g_idx]) * scales.astype(np.float64)[g_idx]


def read(find, tmp_path, tensors, config):
    save_file({f"m.{name}": array for name, array in tensors.items()}, tmp_path / "model.safetensors")
    return find(TensorFiles(tmp_path), config)["m.weight"]


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [
    (4, 16, False), (4, 64, True), (3, 32, False), (2, 16, False), (8, 32, True), (4, 40, False),
])
def test_gptq(tmp_path, version, bits, group, symmetric):
    codes, zeros, scales = draw(np.random.default_rng(bits), 64, 32, bits, group, symmetric)
    g_idx = np.arange(64) // group
    config = {"bits": bits, "group_size": group if group < 64 else -1, "sym": symmetric, "checkpoint_format": version}
    tensors = gptq(codes, zeros, scales, bits, g_idx, int(version == "gptq"))
    matrix = read(gptq_matrices, tmp_path, tensors, config)
    leaf = matrix.read()
    assert isinstance(leaf, QArray) and (leaf.zero is None) == symmetric and matrix.shape == (32, 64)
    assert leaf.group == (group if group < 64 else 0) and not matrix.dense_reason
    np.testing.assert_allclose(dequantize_matrix(leaf).T, weight(codes, zeros, scales, g_idx), rtol=1e-6)


def test_gptq_with_inputs_in_the_order_of_their_importance_is_dense(tmp_path):
    rng = np.random.default_rng(0)
    codes, zeros, scales = draw(rng, 64, 32, 4, 16)
    g_idx = rng.permutation(np.arange(64) // 16)
    config = {"bits": 4, "group_size": 16, "desc_act": True, "sym": False}
    matrix = read(gptq_matrices, tmp_path, gptq(codes, zeros, scales, 4, g_idx), config)
    assert matrix.stack_key is None and "desc_act" in matrix.dense_reason
    np.testing.assert_allclose(matrix.read().T, weight(codes, zeros, scales, g_idx), rtol=1e-6)


@pytest.mark.parametrize("group", [16, 64])
def test_awq(tmp_path, group):
    codes, zeros, scales = draw(np.random.default_rng(0), 64, 32, 4, group)
    config = {"bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    leaf = read(awq_matrices, tmp_path, awq(codes, zeros, scales), config).read()
    assert isinstance(leaf, QArray) and leaf.group == (group if group < 64 else 0)
    expected = weight(codes, zeros, scales, np.arange(64) // group)
    np.testing.assert_allclose(dequantize_matrix(leaf).T, expected, rtol=1e-6)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_zero_points_of_the_other_format(tmp_path, version):
    """Symmetric ones show which format they are of; of others the user is told what to try."""
    rng, other = np.random.default_rng(0), "gptq_v2" if version == "gptq" else "gptq"
    offset = int(version == "gptq_v2")  # that of the other
    for symmetric in (True, False):
        config = {"bits": 4, "group_size": 16, "sym": symmetric, "checkpoint_format": version}
        codes, zeros, scales = draw(rng, 64, 32, 4, 16, symmetric)
        if not symmetric:
            codes, zeros = np.clip(rng.normal(8.2, 3, codes.shape).round().astype(int), 0, 15), zeros // 8 + 8
        g_idx = np.arange(64) // 16
        tensors = gptq(codes, zeros, scales, 4, g_idx, offset)
        matrix = read(gptq_matrices, tmp_path, tensors, config)
        assert f"checkpoint_format {other}" in matrix.note and ("set that" in matrix.note) != symmetric
        if symmetric:
            found = dequantize_matrix(matrix.read()).T
            np.testing.assert_allclose(found, weight(codes, zeros, scales, g_idx), rtol=1e-6)
        right = read(gptq_matrices, tmp_path, tensors, config | {"checkpoint_format": other})
        assert not right.note
        np.testing.assert_allclose(
            dequantize_matrix(right.read()).T, weight(codes, zeros, scales, g_idx), rtol=1e-6
        )


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_without_zero_points_by_its_configuration(tmp_path, symmetric):
    """auto-round says zero_point = false and stores zero points."""
    codes, zeros, scales = draw(np.random.default_rng(0), 64, 32, 4, 16, symmetric)
    config = {"bits": 4, "group_size": 16, "zero_point": False, "sym": True, "version": "gemm"}
    tensors = awq(codes, zeros, scales)
    leaf = read(awq_matrices, tmp_path, tensors, config).read()
    assert (leaf.zero is None) == symmetric
    expected = weight(codes, zeros, scales, np.arange(64) // 16)
    np.testing.assert_allclose(dequantize_matrix(leaf).T, expected, rtol=1e-6)
    tensors.pop("qzeros")
    with pytest.raises(UserError, match="zero_point is false and m.qzeros is missing"):
        read(awq_matrices, tmp_path, tensors, config)


def llama(path, method, change=lambda layer, name, g_idx: g_idx):
    """A model in a layout, and the same one dense; ``change`` gives each matrix its groups."""
    rng = np.random.default_rng(0)
    shared = {
        "model.embed_tokens.weight": rng.normal(size=(40, 32)).astype(np.float32),
        "lm_head.weight": rng.normal(size=(40, 32)).astype(np.float32), "model.norm.weight": np.ones(32, np.float32),
    }
    coded, dense = {}, {}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shared[f"{prefix}.{norm}.weight"] = np.ones(32, np.float32)
        for name, (n_in, n_out) in KERNELS.items():
            codes, zeros, scales = draw(rng, n_in, n_out, 4, 16)
            scales = (scales / 32).astype(np.float16)
            g_idx = change(layer, name, np.arange(n_in) // 16)
            parts = gptq(codes, zeros, scales, 4, g_idx) if method == "gptq" else awq(codes, zeros, scales)
            coded |= {f"{prefix}.{name}.{part}": array for part, array in parts.items()}
            dense[f"{prefix}.{name}.weight"] = weight(codes, zeros, scales, g_idx).T.astype(np.float32).copy()
    quantization = {"quant_method": method, "bits": 4, "group_size": 16, "sym": False}
    for name, tensors, more in (("coded", coded, {"quantization_config": quantization}), ("dense", dense, {})):
        (path / name).mkdir(exist_ok=True)
        (path / name / "config.json").write_text(json.dumps(FIELDS | more))
        save_file(shared | tensors, path / name / "model.safetensors")
    return path / "coded", path / "dense"


@pytest.fixture(scope="module")
def gptq_model(tmp_path_factory):
    """A model in the GPTQ layout, which tests do not change."""
    return llama(tmp_path_factory.mktemp("gptq"), "gptq")[0]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_model_computes_what_its_weights_say(method, tmp_path):
    coded, dense = (jaxlm.load(path, expand=False) for path in llama(tmp_path, method))
    kernels = [leaf for path, leaf in flatten(coded.params).items() if "/layers/" in path and path.endswith("kernel")]
    assert len(kernels) == 7 and all(isinstance(leaf, QArray) for leaf in kernels)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9))
    np.testing.assert_allclose(coded(tokens), dense(tokens), atol=2e-4)
    np.testing.assert_allclose(jaxlm.load(tmp_path / "coded")(tokens), dense(tokens), atol=1e-5)  # expanded


def test_a_layer_that_cannot_stay_in_codes_is_a_layer_group_and_a_note(tmp_path):
    def change(layer, name, g_idx):
        return g_idx[::-1].copy() if layer == 1 and name == "mlp.down_proj" else g_idx

    coded, dense = (jaxlm.load(path, expand=False) for path in llama(tmp_path, "gptq", change))
    assert coded.config.layer_groups == (1, 1)
    leaves = flatten(coded.params)
    assert isinstance(leaves["decoder/layers/0/mlp/down/kernel"], QArray)
    assert not isinstance(leaves["decoder/layers/1/mlp/down/kernel"], QArray)
    (note,) = coded.info["notes"]
    assert "1 quantized" in note and "desc_act" in note
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9))
    np.testing.assert_allclose(coded(tokens), dense(tokens), atol=2e-4)


@pytest.mark.parametrize(("change", "message"), [
    ({"quant_method": "bitsandbytes"}, "quant_method = 'bitsandbytes'"),
    ({"quant_method": "awq", "version": "gemv"}, "version = 'gemv'"),
    ({"bits": 5}, "bits = 5"),
    ({"bits": "4"}, "bits = '4'"),
    ({"group_size": 0}, "group_size = 0"),
    ({"group_size": 8}, "qzeros'"),
    ({"bits": 8}, "qzeros'"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    ({"sym": True}, 'qzeros.*symmetric.*"sym": false'),
    ({"dynamic": {"+:x": {"bits": 8}}}, "dynamic"),
])
def test_configurations_that_do_not_fit_are_named(change, message, gptq_model, tmp_path):
    path = shutil.copytree(gptq_model, tmp_path / "model")
    fields = json.loads((path / "config.json").read_text())
    fields["quantization_config"] |= change
    (path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message) as error:
        read_model(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_damaged_tensors_are_named(gptq_model, tmp_path):
    path = shutil.copytree(gptq_model, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    prefix = "model.layers.1.mlp.up_proj"
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        whole = tensors[f"{prefix}.{part}"]
        other = whole.view({1: np.uint8, 2: np.int16, 4: np.float32}[whole.dtype.itemsize])
        for broken in (whole[1:].copy(), whole.astype(np.bool_), whole.reshape(1, *whole.shape), other):
            save_file(tensors | {f"{prefix}.{part}": broken}, path / "model.safetensors")
            with pytest.raises(UserError, match=f"model.safetensors: tensor '{prefix}") as error:
                read_model(path)
            assert "\n" not in str(error.value)
    save_file(tensors | {f"{prefix}.g_idx": tensors[f"{prefix}.g_idx"] + 9}, path / "model.safetensors")
    with pytest.raises(UserError, match="g_idx.*groups"):
        read_model(path)
    save_file(tensors | {f"{prefix}.weight": np.zeros((64, 32), np.float32)}, path / "model.safetensors")
    with pytest.raises(UserError, match="up_proj.weight.*dense and quantized"):
        read_model(path)
