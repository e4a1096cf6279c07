"""The commands on small models: from a text file to a compressed model that generates."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxlm.cli import presets
from jaxlm.core import sharding
from jaxlm.core.errors import UserError
from jaxlm.nn.config import PRESETS, DecoderConfig, Seq2SeqConfig
from tests.cli.commands import save_model

EXPERIMENT = """
from jaxlm.training.config import *

config = Experiment(
    model=LSTMConfig(width=16, layers=1),
    data=DataConfig(train="text:{text}", valid="text:{text}", test="text:{text}", tokenizer_kind="char", seq_len=8,
                    batch_size=8),
    optim=OptimConfig(warmup_steps=1),
    train=TrainConfig(steps=3, log_every=1, eval_every=3),
)
"""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("decoder") / "model", DecoderConfig, layers=2)


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    path = tmp_path_factory.mktemp("seq2seq") / "model"
    return save_model(path, Seq2SeqConfig, encoder_layers=1, decoder_layers=1)


@pytest.fixture(scope="module")
def small(jaxlm_command, decoder, tmp_path_factory):
    """The decoder in int4, entropy-coded."""
    path = tmp_path_factory.mktemp("small") / "small"
    status, out, err = jaxlm_command("compress", decoder, "--recipe", "w4a16-rtn-g8+huffman", "--out", path)
    assert status == 0, err
    assert "decoder/layers/0/attn/q/kernel" in out and "int4 g8" in out
    return path


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "text.txt").write_text("all work and no play makes jack a dull boy\n" * 20)
    path = tmp_path / "experiment.py"
    path.write_text(EXPERIMENT.format(text=tmp_path / "text.txt"))
    return path


@contextlib.contextmanager
def compilation_cache_at(path):
    """This process as one that has just started, with its compiled programs in another directory."""
    options = {"jax_compilation_cache_dir": str(path), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in options}
    jax.clear_caches()
    try:
        compilation_cache.reset_cache()
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    finally:
        compilation_cache.reset_cache()
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_second_process_compiles_nothing_and_a_run_can_be_evaluated(jaxlm_command, experiment, tmp_path):
    cache = tmp_path / "cache"
    words = ["train", experiment, "--train.eval_every", "2", "--out"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxlm", *map(str, words), tmp_path / "a"], capture_output=True, text=True,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    compiled = {path.name for path in cache.glob("*-cache")}
    assert compiled
    with compilation_cache_at(cache):
        status, _, err = jaxlm_command(*words, tmp_path / "b")
    assert status == 0, err
    assert {path.name for path in cache.glob("*-cache")} == compiled
    assert json.loads((tmp_path / "a" / "experiment.json").read_text())["train"]["eval_every"] == 2
    status, out, err = jaxlm_command("evaluate", tmp_path / "a", "--json", tmp_path / "scores.json")
    assert status == 0, err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {"loss", "perplexity", "bits_per_byte", "tokens"} <= scores.keys()
    assert f"{scores['loss']:.4f}" in out


def test_presets_tells_all_of_them(jaxlm_command):
    assert set(presets.MODELS) == set(PRESETS) and set(presets.MESHES) == set(sharding.PRESETS)
    status, out, err = jaxlm_command("presets")
    assert status == 0, err
    assert "124m" in out and "85.1 M" in out and "stage 4" in out


def test_a_page_of_a_model_beside_its_dense_one(jaxlm_command, decoder, small, tmp_path):
    file = tmp_path / "page.html"
    (tmp_path / "some.txt").write_text("abcdef abc fed " * 4)
    data = ("--data", f"text:{tmp_path / 'some.txt'}")
    status, out, err = jaxlm_command("inspect", small, "--html", file, "--beside", decoder, *data, "--text", "abc")
    assert status == 0 and str(file) in out, err
    text = file.read_text()
    for heading in ("Size and quality", "Layers", "Sharding", "Attention", "Attribution", "Tensors"):
        assert f">{heading}</h2>" in text
    assert "error of weights" in text and "int4 g8" in text
    for wrong in (("--beside", decoder), ("--html", tmp_path / "no" / "page.html"), ("--html", file, *data),
                  ("--html", file, "--preset", "fast")):
        status, _, err = jaxlm_command("inspect", small, *wrong)
        assert status == 2 and err.count("\n") == 1, err


def test_compress_inspect_generate(jaxlm_command, small, tmp_path):
    assert json.loads((small / "compression.json").read_text())["recipe"]["name"] == "w4a16-rtn-g8+huffman"
    status, out, _ = jaxlm_command("inspect", small, "--json", tmp_path / "facts.json")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (status, facts["recipe"], facts["config"]["width"]) == (0, "w4a16-rtn-g8+huffman", 16)
    assert facts["bytes_on_disk"] == (small / "model.safetensors").stat().st_size
    assert facts["bytes_a_cached_token"] == 2 * 2 * 16 * 4
    kinds = {row["tensor"]: row["representation"] for row in facts["tensors"]}
    assert kinds["decoder/layers/0/attn/q/kernel"] == "int4 g8" and kinds["embed/table"] == "float32"
    assert "int4 g8: " in out  # what it is here
    rows = json.loads((small / "compression.json").read_text())["tensors"]
    shown = {row["tensor"]: row for row in facts["tensors"]}
    assert {row["path"]: (row["bytes"], row["bits"]) for row in rows} == {
        path: (row["bytes"], row["bits"]) for path, row in shown.items()
    }
    assert all(abs(row["sparsity"] - shown[row["path"]]["sparsity"]) < 1e-6 for row in rows)
    status, out, err = jaxlm_command("generate", small, "--prompt", "abc", "--prompt", "d", "--max-new-tokens", 3)
    first, second = out.removesuffix("\n").split("\n\n")
    assert (status, first[:3], second[:1]) == (0, "abc", "d")
    status, _, err = jaxlm_command("compress", small, "--recipe", "w8a8-dynamic", "--out", tmp_path / "smaller")
    assert status == 2 and err.count("\n") == 1 and "quantized" in err
    assert not (tmp_path / "smaller").exists()


@pytest.mark.slow
def test_compress_fits_budgets(jaxlm_command, decoder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abc def abc had a bad cab fed abc " * 20)
    data = ["--calibrate", f"text:{text}", "--samples", 8, "--context", 16]
    small = tmp_path / "small"
    status, out, err = jaxlm_command("compress", decoder, "--fit", "5bits", *data, "--out", small)
    assert status == 0, err
    assert "decoder/1/mlp/down" in out and "predicted" in out
    facts = json.loads((small / "compression.json").read_text())
    kernels = [row for row in facts["tensors"] if row["path"].endswith("kernel")]
    weights = sum(math.prod(row["shape"]) for row in kernels)
    assert 4 < 8 * sum(row["bytes"] for row in kernels) / weights <= 5
    assert facts["recipe"]["name"] == "fit-5bits" and "decoder/0/attn/q" in [row["kernel"] for row in facts["choices"]]
    weights = (small / "model.safetensors").read_bytes()
    again = tmp_path / "again"
    status, _, err = jaxlm_command("compress", decoder, "--recipe", small / "compression.json", *data, "--out", again)
    assert status == 0 and (again / "model.safetensors").read_bytes() == weights, err
    size = len(weights) + 300
    status, _, err = jaxlm_command("compress", decoder, "--fit", f"{size}B", *data, "--out", small)
    assert status == 0 and size - 600 < (small / "model.safetensors").stat().st_size <= size, err
    status, _, err = jaxlm_command("compress", decoder, "--max-perplexity", "+5%", *data, "--out", small)
    assert status == 0, err
    assert (small / "model.safetensors").stat().st_size < (decoder / "model.safetensors").stat().st_size / 2
    for words, says in (
        (["--fit", "1000B"], "1,000 bytes"),
        (["--fit", "3parsecs"], "'3parsecs'"),
        (["--fit", "4bits", "--recipe", "w4a16-rtn"], "--fit"),
        (["--recipe", "w4a16-rtn", "--storage", "huffman"], "+huffman"),
    ):
        status, _, err = jaxlm_command("compress", decoder, *words, *data, "--out", tmp_path / "none")
        assert status == 2 and says in err and err.count("\n") == 1
    status, _, err = jaxlm_command("compress", decoder, "--fit", "4bits", "--out", tmp_path / "none")
    assert status == 2 and "--calibrate SPEC" in err


@pytest.mark.slow
def test_the_kv_cache_is_an_option(jaxlm_command, decoder, translator, tmp_path):
    text = tmp_path / "x.txt"
    text.write_text("abcd efgh " * 4)
    losses = {}
    for kind in ("full", "int4"):
        status, _, err = jaxlm_command(
            "evaluate", decoder, "--data", f"text:{text}", "--kv-cache", kind, "--json", tmp_path / "scores.json"
        )
        assert status == 0, err
        losses[kind] = json.loads((tmp_path / "scores.json").read_text())["loss"]
    assert 1e-6 < abs(losses["int4"] - losses["full"]) < 0.1 * losses["full"]
    status, out, _ = jaxlm_command("generate", decoder, "--prompt", "abc", "--max-new-tokens", 3, "--kv-cache", "fp8")
    assert (status, out[:3]) == (0, "abc")
    text.write_text("abc\n")
    options = ["--input", text, "--max-length", 4, "--beam", 2, "--kv-cache"]
    assert jaxlm_command("translate", translator, *options, "int8")[::2] == (0, "")
    status, _, err = jaxlm_command("translate", translator, *options, "int7")
    assert status == 2 and "--kv-cache" in err and "'int7'" in err


def test_special_tokens_of_data_are_an_option(jaxlm_command, decoder, monkeypatch):
    seen = []

    def see(*_, **options):
        seen.append((options["special_tokens"], options.get("prompt_special_tokens")))
        raise UserError("seen")

    monkeypatch.setattr("jaxlm.evaluation.scoring.evaluate", see)
    monkeypatch.setattr("jaxlm.compress", see)
    evaluate = "evaluate", decoder, "--data", "text:x"
    compress = "compress", decoder, "--recipe", "w4a16-gptq", "--calibrate", "text:x", "--out", "y"
    for words in (
        evaluate, (*evaluate, "--special-tokens", "parse"), (*evaluate, "--prompt-special-tokens", "parse"),
        compress, (*compress, "--special-tokens", "parse"),
    ):
        assert jaxlm_command(*words)[0] == 2
    assert seen == [("text", "text"), ("parse", "text"), ("text", "parse"), ("text", None), ("parse", None)]


def test_export_and_inspect_what_is_foreign(jaxlm_command, small, tmp_path):
    out_dir = tmp_path / "ct"
    status, out, err = jaxlm_command("export", small, "--format", "compressed-tensors", "--out", out_dir)
    assert (status, err) == (0, "") and out.startswith(f"{out_dir}: llama, ") and out.endswith("pack-quantized\n")
    status, out, err = jaxlm_command("inspect", out_dir, "--json", tmp_path / "facts.json")
    assert status == 0, err
    rows = {row["tensor"]: row for row in json.loads((tmp_path / "facts.json").read_text())["tensors"]}
    up = rows["decoder/layers/0/mlp/up/kernel"]
    assert up["representation"] == "int4 g8" and 8 < up["bits"] < 13 and "int4 g8" in out  # a scale each 8 weights
    total = sum(row["bytes"] for row in rows.values())
    assert total == json.loads((tmp_path / "facts.json").read_text())["bytes_on_disk"] - _header(out_dir)
    status, _, err = jaxlm_command("export", small, "--format", "gguf-q4_0", "--out", tmp_path / "m.gguf")
    assert status == 2 and "WordLevel" in err


def _header(directory):
    data = (directory / "model.safetensors").read_bytes()
    return 8 + int.from_bytes(data[:8], "little")


def test_translate_files_and_pipes(jaxlm_command, translator, tmp_path, monkeypatch):
    source = tmp_path / "source.txt"
    source.write_bytes(b"abc\r\n\nfed cab\n")
    options = ["--beam", 1, "--max-length", 4]
    status, out, err = jaxlm_command("translate", translator, "--input", source, *options)
    assert (status, err) == (0, "")
    lines = out.split("\n")
    assert len(lines) == 4 and lines[1] == lines[3] == ""
    target = tmp_path / "target.txt"
    assert jaxlm_command("translate", translator, "--input", source, "--output", target, *options) == (0, "", "")
    assert target.read_text() == out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
    assert jaxlm_command("translate", translator, *options) == (0, out, "")
    source.write_bytes(b"abc\nab\xff\n")
    status, _, err = jaxlm_command("translate", translator, "--input", source)
    assert status == 2 and f"{source} line 2" in err and err.count("\n") == 1


def test_each_kind_of_model_has_its_verb(jaxlm_command, decoder, translator, tmp_path):
    (tmp_path / "x.txt").write_text("abc\n")
    status, _, err = jaxlm_command("translate", decoder, "--input", tmp_path / "x.txt")
    assert status == 2 and "generate" in err
    status, _, err = jaxlm_command("generate", translator, "--prompt", "a")
    assert status == 2 and "translate" in err
    status, _, err = jaxlm_command("evaluate", translator, "--data", f"text:{tmp_path / 'x.txt'}")
    assert status == 2 and "seq2seq" in err
