"""All pictures of a model, for its page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.core.leaves import is_leaf
from jaxlm.core.sharding import abstract_mesh, describe_mesh, shardings
from jaxlm.core.tree import Params, flatten
from jaxlm.core.untrusted import read_json_if_there
from jaxlm.evaluation.comparison import Comparison
from jaxlm.evaluation.insight import inspect_tokens
from jaxlm.inference.translation import decoder_start_token, encode_sources, translate_tokens
from jaxlm.pictures import layers, mesh
from jaxlm.pictures.attention import attention_maps, attributions
from jaxlm.pictures.curves import size_quality, training_curves
from jaxlm.pictures.html_page import Picture
from jaxlm.training.metrics import read_metrics

__all__ = ["album"]

_OTHER_LAYER_GROUP = re.compile(r"layers/[1-9]\d*/")


def album(
    lm: Any, source: Path, *, dense: Any = None, compared: Sequence[Comparison] = (), preset: str = "fsdp+tp",
    devices: int = 8, text: str = "",
) -> list[Picture]:
    """All figures that fit a model.

    Args:
        lm: the model (``jaxlm.load(..., expand=False)``).
        source: its directory, with the metrics of its training and what compression chose.
        dense: the model that it was compressed from, if there is one.
        compared: figures of this model and others (``evaluation.comparison``).
        preset, devices: the mesh for which the sharding is drawn.
        text: a text whose attention and attributions are drawn; a translation model translates it.
    """
    found = []
    rows = read_metrics(source / "metrics.jsonl") if (source / "metrics.jsonl").is_file() else []
    if rows:
        found.append(Picture("Training", "From metrics.jsonl of the run.", [training_curves(rows)]))
    if compared:
        note = "Measured on the same data, one point a model. The line joins those that no smaller one equals."
        found.append(Picture("Size and quality", note, [size_quality(compared)]))
    if lm.config.kind != "lstm":
        found += _layers(lm.params, source, dense)
    found.append(_mesh(lm.params, preset, devices))
    return found + (_insight(lm, text) if text else [])


def _layers(params: Params, source: Path, dense: Any) -> list[Picture]:
    maps = []
    share = layers.zeros(params)
    compressed = any(is_leaf(leaf) for leaf in flatten(params).values())
    if compressed:
        maps.append(layers.bits(params))
    if (share.values_KxL > 1).any():
        maps.append(share)
    if dense is not None:
        try:
            maps.append(layers.errors(params, dense.params))
        except ValueError:
            pass  # a smaller architecture: its weights have no counterparts
    if costs := _costs(source):
        maps.append(layers.losses(costs))
    if not maps:
        return []
    note = "A cell for each kernel of each layer."
    if costs:
        note += " How much the loss minds was measured when the model was fitted to its budget."
    return [Picture("Layers", note, [layers.heatmap(each) for each in maps])]


def _costs(source: Path) -> Mapping[str, float]:
    """What each kernel costs, where a model was fitted to a budget."""
    path = source / "compression.json"
    choices = read_json_if_there(path).get("choices", [])
    try:
        return {str(row["kernel"]): float(row["final"]) for row in choices}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: its choices name no kernels with their losses; compress again") from None


def _mesh(params: Params, preset: str, devices: int) -> Picture:
    there = abstract_mesh(preset, {}, devices)
    lies = flatten(shardings(params, there))
    drawn = {}
    for path, leaf in flatten(params).items():
        if _OTHER_LAYER_GROUP.search(path) or len(leaf.shape) < 2 or "norm" in path:
            continue  # other layer groups lie as the first does, and norms everywhere
        part = next((name for name in ("codes", "base", "a") if is_leaf(leaf) and hasattr(leaf, name)), None)
        array, place = (leaf, lies[path]) if part is None else (getattr(leaf, part), getattr(lies[path], part))
        drawn[path.removesuffix("/kernel")] = (tuple(array.shape), place)
    note = (f"Which slice of which weight lies on which of {devices} devices under the preset {preset} "
            f"({describe_mesh(there.shape)}). Compressed weights are drawn as their codes: layers, outputs, inputs.")
    return Picture("Sharding", note, [mesh.sharded(drawn)])


def _insight(lm: Any, text: str) -> list[Picture]:
    """Attention of every layer, and why the next token comes next; of a translation, after its first half."""
    if lm.config.kind == "lstm" or lm.tokenizer is None:
        raise UserError("there is no attention to draw in this model: leave --text out")
    if lm.config.kind != "seq2seq":
        rows = [lm.tokenizer.encode_prompt(text)]
    else:
        rows = encode_sources(lm, [text], None)
        best = translate_tokens(lm, rows, lm.generation)[0][0]
        rows.append([decoder_start_token(lm.config, lm.generation), *best[: max(1, len(best) // 2)]])
    if not rows[0]:
        raise UserError("--text is empty")
    insight = inspect_tokens(lm, rows)
    names = [[lm.tokenizer.decode([token], skip_special=False) for token in row] for row in rows]
    sides = {"self": (names[-1], names[-1]), "encoder": (names[0], names[0]), "cross": (names[-1], names[0])}
    maps = [attention_maps(weights.mean(1), *sides[name], each=f"{name} attention, layer")
            for name, weights in insight.attention.items()]
    chosen = lm.tokenizer.decode([insight.token], skip_special=False)
    why = attributions(np.concatenate(insight.scores), sum(names, []), chosen)
    seen = "Each layer's mean over its heads: what each token (rows) looks at (columns)."
    said = (f"{chosen!r} comes next with probability {insight.probability:.2f}. Integrated gradients of its "
            "log-probability to the tokens before it.")
    return [Picture("Attention", seen, maps), Picture("Attribution", said, [why])]
