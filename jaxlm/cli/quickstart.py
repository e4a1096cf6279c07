"""Trains a small English-German translator on built-in phrases, compresses it in three ways, and compares the results.

    jaxlm quickstart --out runs/quickstart

This takes minutes on a CPU. DIR gets the models, report.md with figures, and report.json. The phrases are written by a
program, so the scores show that everything works and say nothing about real text.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.cli.output import ProgressBar, format_bytes, print_table, write_json, write_text

if TYPE_CHECKING:
    from jaxlm.evaluation.comparison import Comparison
    from jaxlm.training.config import Experiment

RECIPES = ("w8a8-dynamic", "w4a16-rtn-g64", "sparse50-magnitude+w4a16-rtn-g64+huffman")
TRAIN, VALID, TEST = (f"builtin:phrasebook:{part}" for part in ("train", "valid", "test"))
SHOWN = 4  # sentences that are shown with the translations of each model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/quickstart"),
                        help="where to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=700, metavar="N", help="training steps (%(default)s)")


def run(args: argparse.Namespace) -> None:
    import jaxlm
    from jaxlm.data.sources.spec import open_source
    from jaxlm.evaluation.comparison import compare
    from jaxlm.training.loop import train

    out = args.out
    trained = train(_experiment(args.steps), out / "run")
    models = {"dense": trained}
    for recipe in RECIPES:
        print(f"compressing: {recipe}", flush=True)
        models[recipe] = jaxlm.compress(jaxlm.load(trained, expand=False), recipe).save(out / recipe)
    lms = {name: jaxlm.load(path) for name, path in models.items()}
    rows = compare(lms, TEST, progress=ProgressBar())
    test = open_source(TEST)
    sources, references = test.src[:SHOWN], test.tgt[:SHOWN]
    translations = {name: lm.translate(sources) for name, lm in lms.items()}

    print(f"\n{test.synthetic}\n")
    print_table([_table_row(row, rows[0]) for row in rows])
    for name, note in _notes(rows):
        print(f"{name}: {note}")
    for i, (source, reference) in enumerate(zip(sources, references, strict=True)):
        print(f"\n{source}\n  {'reference':<44}{reference}")
        for name, lines in translations.items():
            print(f"  {name:<44}{lines[i]}")
    _write_report(out, rows, test.synthetic, sources, references, translations)
    print(f"\nreport: {out / 'report.md'}; models: {', '.join(str(path) for path in models.values())}")


def _experiment(steps: int) -> Experiment:
    from jaxlm import nn
    from jaxlm.training.config import DataConfig, Experiment, OptimConfig, TrainConfig

    return Experiment(
        model=nn.preset("tiny", encoder_layers=2, decoder_layers=2, ffn=512, dropout=0.0, scan_layers=False),
        data=DataConfig(
            train=TRAIN, valid=VALID, vocab_size=1200, batch_tokens=2048, buckets=(8, 12, 16, 24, 48)
        ),
        optim=OptimConfig(lr=4e-3, schedule="cosine", warmup_steps=steps // 9, b2=0.98, weight_decay=0.01),
        train=TrainConfig(steps=steps, label_smoothing=0.05, eval_every=-(-steps // 3), checkpoint_every=0),
    )


def _table_row(row: Comparison, dense: Comparison) -> dict[str, object]:
    """A row of the table, with every figure relative to the dense model."""
    return {
        "model": row.name,
        "on disk": f"{format_bytes(row.bytes_on_disk)} ({row.bytes_on_disk / dense.bytes_on_disk:.2f}x)",
        "in memory": f"{format_bytes(row.bytes_in_memory)} ({row.bytes_in_memory / dense.bytes_in_memory:.2f}x)",
        "bits a weight": f"{row.bits_per_weight:.2f}",
        "perplexity": f"{row.perplexity:.3f} ({row.perplexity - dense.perplexity:+.3f})",
        "BLEU": f"{row.bleu:.1f} ({row.bleu - dense.bleu:+.1f})",
        "tokens/s": f"{row.tokens_per_second:,.0f} ({row.tokens_per_second / dense.tokens_per_second:.2f}x)",
    }


def _notes(rows: Sequence[Comparison]) -> list[tuple[str, str]]:
    """(name of the model, note) pairs."""
    return [(row.name, note) for row in rows for note in row.notes]


def _write_report(
    out: Path, rows: Sequence[Comparison], synthetic: str, sources: Sequence[str], references: Sequence[str],
    translations: dict[str, list[str]],
) -> None:
    """Writes report.md with its figures, and report.json."""
    from jaxlm.pictures.curves import size_quality, training_curves
    from jaxlm.training.metrics import read_metrics

    training_curves(read_metrics(out / "run" / "metrics.jsonl")).savefig(out / "loss.png")
    size_quality(rows).savefig(out / "size.png")
    table = [_table_row(row, rows[0]) for row in rows]
    lines = ["# Quickstart", "", synthetic, "", f"BLEU: `{rows[0].signature}`", "", _markdown(table), ""]
    lines += [f"- {name}: {note}" for name, note in _notes(rows)]
    lines += ["", "![Loss over training](loss.png)", "", "![BLEU against bytes on disk](size.png)"]
    lines += ["", "## Translations"]
    for i, (source, reference) in enumerate(zip(sources, references, strict=True)):
        found = [{"model": name, "translation": texts[i]} for name, texts in translations.items()]
        lines += ["", f"**{source}** (reference: {reference})", "", _markdown(found)]
    write_text(out / "report.md", "\n".join(lines) + "\n")
    write_json(out / "report.json", {"data": TEST, "note": synthetic, "rows": [row.to_json() for row in rows]})


def _markdown(rows: list[dict[str, object]]) -> str:
    header = list(rows[0])
    cells = [header, ["---"] * len(header), *[[str(value) for value in row.values()] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
