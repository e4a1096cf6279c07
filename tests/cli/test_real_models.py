"""Every command on what users bring: a model trained elsewhere, and models with the tokenizers of real ones."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import sys

import numpy as np
import pytest

from jaxlm import nn
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.directory import export_model
from tests.models import build

TEXT = "It was a dark night. Zwölf Boxkämpfer jagten Eva über den Deich.\n"
TRAINING = """
from jaxlm.training.config import *

config = Experiment(
    model=DecoderConfig(width=16, heads=2, layers=1),
    data=DataConfig(train="text:{text}", tokenizer="{tokenizer}", seq_len=8, batch_size=8),
    optim=OptimConfig(warmup_steps=0),
    train=TrainConfig(steps=1, log_every=1),
)
"""


def run(jaxlm_command, *words) -> str:
    status, out, err = jaxlm_command(*words)
    assert status == 0, err
    assert "Traceback" not in err and "Warning" not in err
    return out


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    return tmp_path / "text.txt"


def test_books_llama(jaxlm_command, shared, tmp_path, text):
    model = shared / "models" / "books-llama"
    words = ["generate", model, "--prompt", "It was a dark night and", "--max-new-tokens", 12]
    out = run(jaxlm_command, *words)
    assert out == "It was a dark night and a little day, and a little more I had seen a\n"
    settings = ["--generation.no_repeat_ngram_size", 2, "--generation.suppress_tokens=0"]
    again = run(jaxlm_command, *words, *settings)
    assert again.startswith("It was a dark night and a little day,") and again != out
    assert " 5,475,584\n" in run(jaxlm_command, "inspect", model)
    run(jaxlm_command, "compress", model, "--recipe", "w8a16-rtn", "--out", tmp_path / "small")
    run(jaxlm_command, "export", tmp_path / "small", "--out", tmp_path / "dense")
    tokens = np.load(shared / "data" / "books" / "valid_tokens.npy")[: 4 * 64]
    np.save(tmp_path / "valid.npy", tokens)
    losses = []
    for path in (model, tmp_path / "small", tmp_path / "dense"):
        run(jaxlm_command, "evaluate", path, "--data", f"tokens:{tmp_path / 'valid.npy'}", "--context", 64, "--json",
            tmp_path / "scores.json")
        losses.append(json.loads((tmp_path / "scores.json").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=0.01) and losses[1] == pytest.approx(losses[2], abs=1e-4)


def tokenizer_files(shared, name, directory):
    """The tokenizer as a Hugging Face directory has it."""
    directory.mkdir(exist_ok=True)
    source = shared / "models" / "tokenizers"
    if name == "deepseek":
        content = gzip.decompress((source / "deepseek_tokenizer.json.gz").read_bytes())
        (directory / "tokenizer.json").write_bytes(content)
        return
    theirs, ours = {"llama2": ("llama2.model", "tokenizer.model"), "t5": ("t5_spiece.model", "spiece.model")}[name]
    shutil.copy(source / theirs, directory / ours)


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """``real(name) -> (directory, tokenizer)``, which takes most of a second."""

    @functools.cache
    def load(name):
        directory = tmp_path_factory.mktemp(name)
        tokenizer_files(shared, name, directory)
        return directory, Tokenizer.load(directory)

    return load


def random_model(shared, name, directory, tokenizer):
    """An untrained model in the directory, with the tokenizer's own files."""
    ids = {f"{role}_id": getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos")}
    ids = {role: index for role, index in ids.items() if index is not None}
    if name == "t5":
        config = nn.preset("tiny", vocab_size=tokenizer.vocab_size, width=16, heads=2, ffn=16, encoder_layers=1,
                           decoder_layers=1, **ids | {"bos_id": tokenizer.pad_id})
    else:
        config = nn.DecoderConfig(vocab_size=tokenizer.vocab_size, width=16, heads=2, ffn=16, layers=1, **ids)
    export_model(directory, config, build(config)[1], None)
    tokenizer_files(shared, name, directory)
    if name == "t5":
        (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    return directory


@pytest.mark.parametrize("name", ["llama2", pytest.param("deepseek", marks=pytest.mark.slow)])
def test_language_models_with_real_tokenizers(jaxlm_command, shared, real, tmp_path, text, name):
    tokenizer = real(name)[1]
    model = random_model(shared, name, tmp_path / "model", tokenizer)
    out = run(jaxlm_command, "generate", model, "--prompt", "Zwölf Boxkämpfer", "--max-new-tokens", 3)
    assert out.startswith("Zwölf Boxkämpfer")
    scores = tmp_path / "scores.json"
    run(jaxlm_command, "evaluate", model, "--data", f"text:{text}", "--context", 32, "--json", scores)
    assert json.loads(scores.read_text())["bytes"] == text.stat().st_size
    run(jaxlm_command, "compress", model, "--recipe", "w8a16-rtn-g8", "--out", tmp_path / "small")
    run(jaxlm_command, "export", tmp_path / "small", "--out", tmp_path / "dense")
    assert "vocabulary" in run(jaxlm_command, "inspect", tmp_path / "dense")
    assert Tokenizer.load(tmp_path / "dense").encode(TEXT) == tokenizer.encode(TEXT)  # through the small one


@pytest.mark.parametrize("name", ["llama2", pytest.param("deepseek", marks=pytest.mark.slow)])
def test_a_training_keeps_a_real_tokenizer(jaxlm_command, real, tmp_path, text, name):
    directory, tokenizer = real(name)
    experiment = tmp_path / "experiment.py"
    experiment.write_text(TRAINING.format(text=text, tokenizer=directory))
    run(jaxlm_command, "train", experiment, "--out", tmp_path / "run")
    assert Tokenizer.load(tmp_path / "run").encode(TEXT) == tokenizer.encode(TEXT)


def test_a_translation_model_with_a_real_tokenizer(jaxlm_command, shared, real, tmp_path, monkeypatch):
    model = random_model(shared, "t5", tmp_path / "model", real("t5")[1])
    monkeypatch.setattr(sys, "stdin", None)
    options = ["--beam", 2, "--max-length", 4, "--generation.no_repeat_ngram_size", 2]
    short = tmp_path / "short.txt"
    short.write_text("A man in a blue shirt.\n\nTwo dogs.\n")
    out = run(jaxlm_command, "evaluate", model, "--data", f"bitext:{short},{short}", *options)
    assert "bleu" in out and "beam                 2" in out
    run(jaxlm_command, "compress", model, "--recipe", "w8a16-rtn-g8", "--out", tmp_path / "small")
    run(jaxlm_command, "export", tmp_path / "small", "--out", tmp_path / "dense")
    assert "vocabulary" in run(jaxlm_command, "inspect", tmp_path / "dense")
    lines = run(jaxlm_command, "translate", tmp_path / "dense", "--input", short, *options).split("\n")
    assert len(lines) == 4 and lines[1] == ""
