"""The quickstart from end to end, with too little training to learn anything."""

from __future__ import annotations

import dataclasses
import json

import jaxlm
from jaxlm.cli import quickstart
from jaxlm.cli.quickstart import RECIPES
from jaxlm.compression.names import parse
from jaxlm.data import phrasebook


def test_leaves_models_a_table_and_a_report(jaxlm_command, tmp_path, monkeypatch):
    dice = phrasebook.Dice(0)
    pairs = list(dict.fromkeys(pattern.draw(dice) for pattern in phrasebook.PATTERNS for _ in range(4)))
    book = {"train": pairs[4:], "valid": pairs[:2], "test": pairs[2:4]}
    monkeypatch.setattr(phrasebook, "generate", lambda: book)
    assert all(parse(recipe).name == recipe for recipe in RECIPES)
    monkeypatch.setattr(quickstart, "RECIPES", RECIPES[-1:])  # each model compiles its own programs
    monkeypatch.setattr(quickstart, "SHOWN", 2)  # all of the test set: one shape
    for part in ("TRAIN", "VALID", "TEST"):
        monkeypatch.setattr(quickstart, part, f"builtin:phrasebook:{part.lower()}[:{24 if part == 'TRAIN' else 2}]")
    full = quickstart._experiment

    def tiny(steps):  # one layer and one shape: what takes time here is compiling
        config = full(steps)
        model = dataclasses.replace(config.model, width=32, heads=2, ffn=64, encoder_layers=1, decoder_layers=1)
        train = dataclasses.replace(config.train, eval_every=steps)
        data = dataclasses.replace(config.data, buckets=(64,))
        return dataclasses.replace(config, model=model, train=train, data=data)

    monkeypatch.setattr(quickstart, "_experiment", tiny)
    out = tmp_path / "quickstart"
    status, stdout, _ = jaxlm_command("quickstart", "--steps", "2", "--out", out)
    assert status == 0 and "synthetic" in stdout
    report = json.loads((out / "report.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert names == ["dense", *quickstart.RECIPES]
    fields = {"bytes_on_disk", "bytes_in_memory", "bits_per_weight", "perplexity", "bleu", "tokens_per_second"}
    assert all(fields <= set(row) and row["bytes_on_disk"] > 0 for row in report["rows"])
    dense, *small = report["rows"]
    assert all(row["bytes_on_disk"] < dense["bytes_on_disk"] for row in small)
    assert all(row["bytes_in_memory"] <= dense["bytes_in_memory"] for row in small)

    text = (out / "report.md").read_text()
    assert "synthetic" in text and dense["signature"] in text
    for name in ("loss.png", "size.png"):
        assert name in text
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    for name in names:
        assert name in text and name in stdout
    again = jaxlm.load(out / RECIPES[-1]).translate([english for english, _ in book["test"]])
    assert len(again) == 2 and all(each in text for each in again)
