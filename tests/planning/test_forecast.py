"""Forecasts of real programs on eight CPU devices, and what users are told."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import sys
from pathlib import Path

import jax
import pytest

from jaxlm import nn
from jaxlm.cli import main
from jaxlm.core.config import to_dict
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray
from jaxlm.core.ops import dot
from jaxlm.core.sharding import bytes_per_device
from jaxlm.core.tree import count_params, flatten
from jaxlm.planning import subprocess_runner
from jaxlm.planning.abstract_models import abstract_compressed
from jaxlm.planning.analytic import estimate, mesh_shapes
from jaxlm.planning.forecasting import _out_of_memory, forecast
from jaxlm.planning.hlo import parse_hlo
from jaxlm.planning.hlo_costs import count_costs
from jaxlm.planning.programs import ServingShape, forecast_programs
from jaxlm.planning.subprocess_runner import run_forecast
from jaxlm.planning.suggestions import suggest_changes
from jaxlm.planning.topology import parse_topology, topology_devices
from jaxlm.training.config import DataConfig, Experiment, LoraConfig, MeshConfig, TrainConfig

MODEL = nn.DecoderConfig(
    width=64, heads=4, kv_heads=2, ffn=128, layers=2, vocab_size=96, tie_embeddings=False, max_positions=32
)
CONFIG = Experiment(
    model=MODEL, data=DataConfig(batch_size=8, seq_len=32), train=TrainConfig(steps=200), mesh=MeshConfig(1, 4, 2)
)
CPU = parse_topology("cpu:8")


@pytest.fixture(scope="module")
def trained():
    (program,) = forecast_programs(CONFIG, CPU)
    return program, forecast(program, CONFIG, CPU)


def test_memory_is_what_the_layout_says(trained):
    program, result = trained
    count = count_params(nn.abstract(MODEL)[1])
    norms = (2 * MODEL.layers + 1) * MODEL.width  # on every device
    share = 4 * ((count - norms) / 8 + norms)
    held = result.memory.held
    assert held["parameters"] == share
    assert held["optimizer"] == pytest.approx(2 * share, abs=16)  # and its counters
    assert held["batch"] == 3 * 4 * 8 * 32 / 4
    assert 0 < held["gradients"] <= share
    assert result.memory.peak == sum(held.values()) + result.memory.activations
    arguments = bytes_per_device(program.arguments)
    assert result.memory.peak > arguments == pytest.approx(sum(held.values()) - held["gradients"], abs=64)


def test_arithmetic_is_that_of_the_model(trained):
    """What all devices compute is what the model needs, and the little that several compute alike."""
    _, result = trained
    assert 1 <= 8 * result.costs.total_flops / result.flops < 1.15
    assert result.total_tokens == 200 * 8 * 32 and result.tokens == 8 * 32


def test_fully_sharded_weights_are_gathered_along_their_axis_only(trained):
    _, result = trained
    gathered = result.costs.sent("all-gather")
    weights = 4 * count_params(nn.abstract(MODEL)[1]) / 2  # of a device along "tensor"
    # forward and backward; some the compiler gathers once for both, small activations it gathers too
    assert 3 / 4 * weights <= gathered[("fsdp",)] <= 3 / 4 * weights * 3


def test_remat_computes_the_forward_pass_again(trained):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, remat="full"))
    (program,) = forecast_programs(config, CPU)
    again = forecast(program, config, CPU)
    assert 1.2 < again.costs.total_flops / trained[1].costs.total_flops < 1.34
    assert again.memory.activations < trained[1].memory.activations


def test_serving_holds_weights_and_cache():
    prefill, decode = forecast_programs(CONFIG, CPU, ServingShape(batch=8))
    result = forecast(decode, CONFIG, CPU)
    count = count_params(nn.abstract(MODEL)[1])
    assert result.memory.held["parameters"] == pytest.approx(2 * count / 8, rel=0.05)  # bfloat16
    row = 2 * MODEL.layers * 2 * 16 * 32 * 4  # keys and values, 2 heads of 16, 32 tokens, float32
    assert result.memory.held["cache"] == pytest.approx(8 * row / 8, abs=64)
    assert prefill.tokens == 8 * 32 and decode.tokens == 8
    assert 1 <= 8 * result.costs.total_flops / result.flops < 1.2


RECIPES = {
    "w8a8-dynamic": 8, "w4a16-gptq-g32": 4, "w4a16-awq-g32": 4, "w2a16-autoround-g32": 4, "w8a8-static": 8,
    "w8a8-smooth": 8, "fp8-static": 8, "nf4": 4, "sparse50-sparsegpt": 16, "sparse50-sparsegpt-w4": 4, "lowrank50": 16,
    "2:4-wanda+w4a16-rtn-g32": 4, "kv8": 16, "rotate+w8a8-dynamic": 8, "prune-heads50": 16, "drop-layers1": 16,
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_forecast_by_shape(name):
    """Those that need data too: what matters is the kind of leaf that they make."""
    from jaxlm.compression.names import load_recipe
    from jaxlm.core.tree import flatten

    config, params = abstract_compressed(load_recipe(name), MODEL, nn.abstract(MODEL)[1], "bfloat16", "tpu")
    path = next(path for path in flatten(params) if path.endswith("up/kernel"))
    leaf = flatten(params)[path]
    parts = jax.tree.leaves(getattr(leaf, "codes", leaf))
    bits = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "float8_e4m3fn": 8, "bfloat16": 16, "float32": 16}
    assert bits[str(parts[0].dtype)] == RECIPES[name]
    assert config.kv_cache == ("int8" if name == "kv8" else "full")


def test_what_the_compiler_says_when_it_does_not_fit():
    said = "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded"
    assert _out_of_memory(said) == (20.5 * 2**30, 15.75 * 2**30)
    said = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (29.89G) exceeds available HBM (15.75G). HLO module: jit_prefill.")
    assert _out_of_memory(said) == (29.89 * 2**30, 15.75 * 2**30)
    assert _out_of_memory("anything else") is None


def test_advice_is_for_what_does_not_fit(trained):
    topology = parse_topology("v5e:2x4")
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(8), data=DataConfig(batch_size=64, seq_len=32))
    held = {name: 8 * size for name, size in trained[1].memory.held.items()}
    memory = dataclasses.replace(trained[1].memory, held=held, peak=2e6, capacity=1e6)
    result = dataclasses.replace(trained[1], memory=memory, mesh=dict.fromkeys(trained[1].mesh, 1) | {"data": 8})
    lines = "\n".join(suggest_changes(result, config, topology, None))
    for change in ("mesh.preset fsdp", "model.remat full", "model.dtype bfloat16", "train.accumulate 2"):
        assert f"--{change}" in lines
    assert suggest_changes(trained[1], config, topology, None) == []


def test_meshes_of_a_search():
    shapes = mesh_shapes(8)
    assert len(shapes) == len(set(shapes)) == 10
    assert all(math.prod((mesh.data, mesh.fsdp, mesh.tensor)) == 8 for mesh in shapes)
    assert {mesh.expert for mesh in mesh_shapes(8, experts=4)} == {1, 2, 4}
    topology, config = parse_topology("v5e:2x4"), dataclasses.replace(CONFIG, mesh=MeshConfig(8))
    whole, split = (estimate(dataclasses.replace(config, mesh=mesh), topology) for mesh in
                    (MeshConfig(8), MeshConfig(1, 8)))
    assert split.state < whole.state / 4 and split.compute == whole.compute


def test_a_forecast_from_the_command_line(tmp_path, capsys, monkeypatch):
    """Its process imports no module from the working directory."""
    monkeypatch.chdir(tmp_path)
    for module in ("json", "numpy", "jaxlm"):
        Path(f"{module}.py").write_text("raise SystemExit('a stranger')")
    file, out = tmp_path / "config.py", tmp_path / "plan.json"
    file.write_text(
        "from jaxlm import nn\nfrom jaxlm.training.config import *\n"
        "config = Experiment(model=nn.DecoderConfig(width=16, heads=2, layers=1), data=DataConfig(seq_len=8))\n"
    )
    with pytest.raises(SystemExit) as status:
        main(["plan", str(file), "--topology", "cpu:2", "--json", str(out), "--data.vocab_size", "32",
              "--mesh.fsdp", "2"])  # fmt: skip
    printed = capsys.readouterr().out
    assert status.value.code == 0 and "activations and other temporaries" in printed and "fsdp 2" in printed
    (found,) = json.loads(out.read_text())["forecasts"]
    assert found["devices"] == 2 and found["tokens"] == 16 * 8 and found["time"] is None
    assert found["memory"]["peak"] >= found["memory"]["held"]["parameters"]


MISTAKES = {
    "no vocabulary": (CONFIG, {"model": dataclasses.replace(MODEL, vocab_size=0)}, {"tokenizer": "x"}, "vocab_size N"),
    "rows": (CONFIG, {"train": TrainConfig(accumulate=3)}, {}, "batch_size.*multiple"),
    "mesh": (CONFIG, {"mesh": MeshConfig(3)}, {}, "does not fit 8 devices"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_a_line(case):
    config, changes, data, said = MISTAKES[case]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data), **changes)
    with pytest.raises(UserError, match=said):
        forecast_programs(config, CPU)


def test_serving_takes_language_models_and_whole_rows():
    with pytest.raises(UserError, match="--batch 3"):
        forecast_programs(CONFIG, CPU, ServingShape(batch=3))
    with pytest.raises(UserError, match="seq2seq"):
        forecast_programs(dataclasses.replace(CONFIG, model=nn.preset("tiny", vocab_size=96)), CPU, ServingShape())


def test_mistakes_cross_from_the_child(monkeypatch, tmp_path):
    """The child's reply is made in this process; a process that repeats it stands for the child."""
    request = {"config": to_dict(CONFIG), "topology": CPU.name, "serving": None, "search": 1}
    written = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
        patch.setattr(sys, "stdout", written)
        subprocess_runner._main()
    (tmp_path / "reply").write_text(written.getvalue())
    child = tmp_path / "child"
    child.write_text(f"#!/bin/sh\ncat > /dev/null\ncat {tmp_path / 'reply'}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    with pytest.raises(UserError, match="--search.*CPU"):
        run_forecast(CONFIG, CPU, None, 1, lambda *_: None)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_says_what_to_install():
    with pytest.raises(UserError, match=r"pip install jaxlm\[plan\]"):
        forecast_programs(CONFIG, parse_topology("v5e:2x4"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (jaxlm[plan]) is not installed")
def test_a_step_for_tpus_that_are_not_there():
    found = run_forecast(CONFIG, parse_topology("v5e:2x4"), None, 0, lambda *_: None)
    (result,) = found["forecasts"]
    assert result["mesh"]["fsdp"] == 4 and result["time"]["step"] > 0 and 0 < result["mfu"] < 1
    assert 1 <= 8 * sum(result["counts"]["flops"].values()) / result["flops"] < 1.3
    assert {tuple(row["axes"]) for row in result["counts"]["collectives"]} <= {
        ("fsdp",), ("tensor",), ("fsdp", "tensor")}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (jaxlm[plan]) is not installed")
def test_int4_weights_are_never_written_out_on_tpus():
    """Groups with zero points: decoding reads the codes, and moves less than half of what bfloat16 weights would."""
    (device,) = topology_devices(parse_topology("v5e:1x1"))

    def like(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    n_in, n_out = 8192, 3584
    scales = (n_out, n_in // 128)
    leaf = QArray(like((n_out, n_in), "int4"), like(scales, "float32"), like(scales, "int8"), 4, 128)
    for rows in (1, 16):
        compiled = jax.jit(dot).lower(like((rows, n_in), "bfloat16"), leaf).compile()
        assert count_costs(parse_hlo(compiled.as_text()), {"data": 1}).traffic < n_in * n_out


def test_frozen_weights_count_as_they_are_held(trained):
    """QLoRA: no gradient and no moments of what is frozen, and that in its codes."""
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=4, base="w4a16-rtn-g32"), mesh=MeshConfig(1, 4, 2))
    (program,) = forecast_programs(config, CPU)
    dense = trained[0]
    held = program.held
    assert held["parameters"] == held["gradients"] < 0.35 * dense.held["parameters"]
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], abs=16)
    kernels = sum(math.prod(leaf.shape) for path, leaf in flatten(nn.abstract(MODEL)[1]).items() if "/layers/" in path
                  and path.endswith("kernel"))
    codes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.arguments[0].frozen)
                if leaf.dtype == jax.numpy.int8 and leaf.ndim == 3 and leaf.shape[-1] > 8)
    assert kernels <= codes <= 1.1 * kernels
    assert 8 * held["frozen"] < 4 * count_params(nn.abstract(MODEL)[1])


def test_programs_with_frozen_weights_are_forecast_as_others():
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=4, base="w4a16-rtn-g32"), mesh=MeshConfig(1, 4, 2))
    (program,) = forecast_programs(config, CPU)
    result = forecast(program, config, CPU)
    assert result.memory.peak > bytes_per_device(program.arguments) and result.memory.over == 0
