"""The course of a training, and what models cost beside how good they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import LogLocator

from jaxlm.evaluation.comparison import Comparison
from jaxlm.pictures.style import Figure, new


def training_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, learning rate, gradient norm and speed over steps, from the rows of a run's ``metrics.jsonl``."""
    figure, (loss, rate, norm, speed) = new(8, 5, 2, 2, sharex=True)
    for key, label, style in (("loss", "training", "-"), ("valid_loss", "validation", "o-")):
        _draw(loss, rows, key, style, label=label)
    loss.legend(frameon=False)
    _draw(rate, rows, "lr", "-")
    _draw(norm, rows, "grad_norm", "-")
    _draw(speed, rows, "tokens_per_second", "-")
    for axes, title, scale in ((loss, "loss, nats a token", "log"), (rate, "learning rate", "linear"),
                               (norm, "gradient norm", "log"), (speed, "tokens a second", "linear")):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yscale(scale)
        if scale == "log":
            _plain(axes.yaxis)
        axes.grid(which="both")
    for axes in (norm, speed):
        axes.set_xlabel("step")
    return figure


def _draw(axes, rows: Sequence[Mapping[str, Any]], key: str, style: str, **options) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, markersize=4, **options)


def size_quality(rows: Sequence[Comparison]) -> Figure:
    """BLEU, or perplexity where models do not translate, over bytes on disk, one point a model. The line joins the
    models that no smaller one equals."""
    bleu = all(row.bleu is not None for row in rows)
    figure, (axes,) = new(8, 4)
    worth = {row.name: row.bleu if bleu else -row.perplexity for row in rows}
    front: list[Comparison] = []
    for row in sorted(rows, key=lambda row: (row.bytes_on_disk, -worth[row.name])):
        if not front or worth[row.name] > worth[front[-1].name]:
            front.append(row)
    axes.plot([row.bytes_on_disk / 2**20 for row in front], [abs(worth[row.name]) for row in front], color="0.6",
              linewidth=1, zorder=0)
    for row, marker in zip(rows, "osD^vPX*<>" * len(rows), strict=False):
        axes.plot(row.bytes_on_disk / 2**20, abs(worth[row.name]), marker, label=row.name)
    axes.set(xlabel="MiB on disk", ylabel="BLEU" if bleu else "perplexity", xscale="log")
    axes.set_title("size against quality: up and left is better" if bleu else
                   "size against quality: down and left is better", fontsize=10, loc="left")
    _plain(axes.xaxis)
    axes.margins(x=0.1, y=0.25)
    axes.grid(which="both")
    # Below, for beside the points names would cover each other: some models are equally large.
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _plain(axis) -> None:
    """Marks of a logarithmic axis at 1, 2 and 5, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
