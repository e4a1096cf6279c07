"""What tokens look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlm.pictures.style import MAP, Figure, new

__all__ = ["attention_maps"]


def attention_maps(weights_HxTxS: np.ndarray, queries: Sequence[str], keys: Sequence[str] | None = None) -> Figure:
    """A map for each head of a layer: how much each of the queries' tokens (rows) attends to each of the keys'
    (columns; by default the queries themselves). Rows sum to 1."""
    keys = queries if keys is None else keys
    heads = len(weights_HxTxS)
    columns = min(4, heads)
    rows = -(-heads // columns)
    side = max(1.9, 0.16 * max(len(keys), len(queries)))
    figure, axes = new(side * columns + 1.2, side * rows + 0.8, rows, columns, sharex=True, sharey=True)
    for head, each in enumerate(axes):
        if head >= heads:
            each.axis("off")
            continue
        image = each.imshow(weights_HxTxS[head], cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
        each.set_title(f"head {head}", fontsize=9)
        each.set_xticks(range(len(keys)), map(_shown, keys), rotation=90, fontsize=7)
        each.set_yticks(range(len(queries)), map(_shown, queries), fontsize=7)
        each.spines[:].set_visible(False)
        each.tick_params(length=0)
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention")
    return figure


def _shown(token: str) -> str:
    """A token with its blanks visible; a dollar would begin a formula."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("$", r"\$") or "∅"
