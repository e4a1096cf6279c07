"""Quantized matrices of a Hugging Face directory as leaves of ours: cut, stacked, and in layer groups of one grid."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.leaves import QArray
from jaxlm.hf.families.fields import Tensor
from jaxlm.hf.quantized.matrices import Matrix, Values, matrix_values
from jaxlm.nn.config import DecoderConfig, ModelConfig
from jaxlm.nn.stack import layer_groups_of

__all__ = ["coded_leaf", "dense_part", "outputs_first", "split_layer_groups"]


def outputs_first(path: str, tensor: Tensor) -> bool:
    """Whether the file's tensor has the outputs of a matrix first, as codes do: kernels of torch, and tables."""
    return tensor.transposed or path.endswith("/table")


def split_layer_groups(config: ModelConfig, grids: Mapping[tuple[str, int], Any]) -> ModelConfig:
    """The configuration with a layer group for every run of layers that are quantized alike.

    ``grids`` tells for each side ("decoder/", "encoder/") and layer how.
    """
    changes = {}
    sides: dict[str, dict[int, Any]] = defaultdict(dict)
    for (side, layer), grid in grids.items():
        sides[side][layer] = grid
    for side, found in sides.items():
        lengths = [
            len(list(run))
            for layer_group in layer_groups_of(config, side.rstrip("/"))
            for _, run in itertools.groupby(layer_group, key=lambda layer, found=found: found[layer])
        ]
        if len(lengths) > len(layer_groups_of(config, side.rstrip("/"))):
            name = "layer_groups" if isinstance(config, DecoderConfig) else f"{side.rstrip('/')}_layer_groups"
            changes[name] = tuple(lengths)
    return dataclasses.replace(config, **changes)


def coded_leaf(
    config: ModelConfig, values: Mapping[str, Any], path: str, lead: tuple[int, ...],
    found: Sequence[tuple[Tensor, Matrix]],
) -> QArray:
    """The leaf of matrices of one grid, in the order of its leading dimensions ``lead`` (layers, experts)."""
    leaves = [_ours(config, values, tensor, matrix.read()) for tensor, matrix in found]
    leaf = jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts).reshape(*lead, *parts[0].shape)), *leaves)
    return dataclasses.replace(leaf, axis=-1 if path.endswith("/table") else -2)


def dense_part(config: ModelConfig, tensor: Tensor, matrix: Matrix) -> np.ndarray:
    """What a parameter of ours is in a matrix, as values ``[out, in]``."""
    values = matrix_values(matrix.read())
    return values if tensor.cut is None else tensor.cut.take(config, values)


def _ours(config: ModelConfig, values: Mapping[str, Any], tensor: Tensor, matrix: Values) -> QArray:
    scale = 1.0 if tensor.scale is None else tensor.scale(values)
    parts = {"codes": matrix.codes, "scale": matrix.scale * np.float32(scale), "zero": matrix.zero}
    if tensor.cut is not None:
        parts = {name: None if part is None else tensor.cut.take(config, part) for name, part in parts.items()}
    return dataclasses.replace(matrix, **parts)
