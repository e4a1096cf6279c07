"""What all pictures share: colours that colour-blind readers tell apart, sizes, and how they go into a page."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib import figure
from matplotlib.axes import Axes

__all__ = ["COLOURS", "MAP", "Figure", "label_cells", "new", "svg"]

# Okabe and Ito's, https://jfly.uni-koeln.de/color/, without black and yellow, which one of two backgrounds swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MAP = "cividis"  # of numbers: the same to all kinds of sight, and even in grey
_INK = "#101112"  # of what has no meaning by its colour: a page replaces it by that of its text


class Figure(figure.Figure):
    """A matplotlib figure that notebooks show by themselves, without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png")
        return out.getvalue()


def new(
    width: float = 7.0, height: float = 4.0, rows: int = 1, columns: int = 1, **options
) -> tuple[Figure, list[Axes]]:
    """A figure (inches) and its axes, row by row."""
    drawing = Figure(figsize=(width, height), layout="constrained", dpi=120)
    with matplotlib.rc_context({
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "text.color": _INK, "axes.labelcolor": _INK,
        "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.facecolor": "none",
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10,
        "axes.titlelocation": "left", "axes.grid": False, "grid.alpha": 0.3,
    }):
        axes = drawing.subplots(rows, columns, squeeze=False, **options)
    return drawing, list(axes.flat)


def label_cells(axes: Axes, values, texts, map_, norm, size: float = 8) -> None:
    """Writes a text into each cell of a map of ``values``, in black or white, whichever shows on its colour."""
    for (i, j), text in texts.items():
        red, green, blue, _ = map_(norm(values[i, j]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(j, i, text, ha="center", va="center", fontsize=size, color="#FEFEFE" if dark else "#010101")


def svg(figure: Figure, name: str) -> str:
    """The picture as an ``<svg>`` for a page: transparent, its ink that of the page's text, read aloud as ``name``."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(f"{_INK}|#000000", "currentColor", text[text.index("<svg") :], flags=re.IGNORECASE)
    text = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", text)  # the reader's own
    prefix = re.sub(r"\W+", "-", name).lower()  # two pictures of a page must not share ids
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", text)
    title = name.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    # What is black has no colour of its own in the file.
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" fill="currentColor" ', 1)
