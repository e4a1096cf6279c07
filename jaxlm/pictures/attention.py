"""What tokens look at, and what a model's choice rests on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlm.pictures.style import COLOURS, MAP, Figure, new

__all__ = ["attention_maps", "attributions"]


def attention_maps(
    weights_HxTxS: np.ndarray, queries: Sequence[str], keys: Sequence[str] | None = None, *, each: str = "head"
) -> Figure:
    """A map for each head of a layer: how much each of the queries' tokens (rows) attends to each of the keys'
    (columns; by default the queries themselves). Rows sum to 1. ``each`` names what a map is of, as "layer" where they
    are the means of layers."""
    keys = queries if keys is None else keys
    heads = len(weights_HxTxS)
    columns = min(4, heads)
    rows = -(-heads // columns)
    side = max(1.9, 0.16 * max(len(keys), len(queries)))
    figure, axes = new(side * columns + 1.2, side * rows + 0.8, rows, columns, sharex=True, sharey=True)
    for head, map_ in enumerate(axes):
        if head >= heads:
            map_.axis("off")
            continue
        image = map_.imshow(weights_HxTxS[head], cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
        map_.set_title(f"{each} {head}", fontsize=9)
        map_.set_xticks(range(len(keys)), map(_shown, keys), rotation=90, fontsize=7)
        map_.set_yticks(range(len(queries)), map(_shown, queries), fontsize=7)
        map_.spines[:].set_visible(False)
        map_.tick_params(length=0)
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention")
    return figure


def attributions(scores_T: np.ndarray, tokens: Sequence[str], chosen: str) -> Figure:
    """A bar for each token: how much it adds to the log-probability of ``chosen`` coming next (nats)."""
    figure, (axes,) = new(7, 0.8 + 0.2 * len(tokens))
    colours = [COLOURS[0] if score >= 0 else COLOURS[1] for score in scores_T]
    axes.barh(range(len(tokens)), scores_T, color=colours)
    axes.set_yticks(range(len(tokens)), map(_shown, tokens), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_xlabel("nats for (right) and against it")
    axes.set_title(f"why {_shown(chosen)} comes next", fontsize=10, loc="left")
    return figure


def _shown(token: str) -> str:
    """A token with its blanks visible; a dollar would begin a formula."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("$", r"\$") or "∅"
