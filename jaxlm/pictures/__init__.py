"""Pictures of trainings and models: a function each, from data to a matplotlib figure (``figure.savefig(path)``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlm.core.lazy import lazy

if TYPE_CHECKING:
    from jaxlm.pictures.attention import attention_maps, attributions
    from jaxlm.pictures.curves import size_quality, training_curves
    from jaxlm.pictures.html_page import Picture, page
    from jaxlm.pictures.layers import LayerGrid, heatmap
    from jaxlm.pictures.mesh import sharded
    from jaxlm.pictures.model_pictures import album
    from jaxlm.pictures.style import Figure
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__, attention="attention_maps attributions", curves="size_quality training_curves",
        html_page="Picture page", layers="LayerGrid heatmap", mesh="sharded", model_pictures="album", style="Figure",
    )  # fmt: skip
