"""Two pictures for a report: the loss over training, and quality against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is all we draw on

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

from jaxlm.evaluation.compare import Comparison  # noqa: E402


def plot_loss(rows: Sequence[Mapping[str, Any]], out: str | Path) -> None:
    """Training and validation loss from the rows of a run's ``metrics.jsonl``, as a PNG."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("valid_loss", "validation", "o-")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="nats a token", yscale="log", title="Loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def plot_size_against_bleu(rows: Sequence[Comparison], out: str | Path) -> None:
    """BLEU over bytes on disk, one point a model, as a PNG: up and to the left is better. The line joins the models
    that no smaller one equals."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    front: list[Comparison] = []
    for row in sorted(rows, key=lambda row: (row.bytes_on_disk, -row.bleu)):
        if not front or row.bleu > front[-1].bleu:
            front.append(row)
    points = [(row.bytes_on_disk / 2**20, row.bleu) for row in front]
    axes.plot(*zip(*points, strict=True), color="0.7", linewidth=1, zorder=0)
    for row in rows:
        axes.plot(row.bytes_on_disk / 2**20, row.bleu, "o", label=row.name)
    axes.set(xlabel="MiB on disk", ylabel="BLEU", title="Size against BLEU", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.1, y=0.25)
    axes.grid(alpha=0.3, which="both")
    # Beside the points names would cover each other: some models are equally large.
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out, dpi=120)
    plt.close(figure)
