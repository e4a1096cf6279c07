"""Quantized matrices of a Hugging Face directory as our parameters: sliced, stacked over layers, and with layer groups
of equal quantization."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.leaves import Codebook, QArray
from jaxlm.hf.families.fields import TensorSpec
from jaxlm.hf.quantized.matrix import QuantizedMatrix, dequantize_matrix
from jaxlm.nn.config import DecoderConfig, ModelConfig, layer_groups_of

__all__ = ["dense_slice", "outputs_first", "split_layer_groups", "stack_matrices"]


def outputs_first(path: str, spec: TensorSpec) -> bool:
    """Whether the file stores the outputs of a matrix first, as QArray stores codes: kernels of torch, and tables."""
    return spec.transposed or path.endswith("/table")


def split_layer_groups(config: ModelConfig, quantization: Mapping[tuple[str, int], Any]) -> ModelConfig:
    """The configuration with a layer group for every run of layers that are quantized alike.

    ``quantization`` says for each side ("decoder/", "encoder/") and layer how its parameters are quantized.
    """
    changes = {}
    sides: dict[str, dict[int, Any]] = defaultdict(dict)
    for (side, layer), how in quantization.items():
        sides[side][layer] = how
    for side, by_layer in sides.items():
        groups = layer_groups_of(config, side.rstrip("/"))
        lengths = [
            len(list(run)) for group in groups for _, run in itertools.groupby(group, key=by_layer.__getitem__)
        ]
        if len(lengths) > len(groups):
            name = "layer_groups" if isinstance(config, DecoderConfig) else f"{side.rstrip('/')}_layer_groups"
            changes[name] = tuple(lengths)
    return dataclasses.replace(config, **changes)


def stack_matrices(
    config: ModelConfig, hf_fields: Mapping[str, Any], path: str, lead: tuple[int, ...],
    matrices: Sequence[tuple[TensorSpec, QuantizedMatrix]],
) -> QArray | Codebook:
    """The parameter at ``path`` of matrices with one ``stack_key``, in the order of its leading dimensions ``lead``
    (layers, experts). ``hf_fields`` are those of config.json, defaults included."""
    leaves = [_slice(config, hf_fields, spec, matrix.read()) for spec, matrix in matrices]
    leaf = jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts).reshape(*lead, *parts[0].shape)), *leaves)
    return dataclasses.replace(leaf, axis=-1 if path.endswith("/table") else -2)


def dense_slice(config: ModelConfig, spec: TensorSpec, matrix: QuantizedMatrix) -> np.ndarray:
    """The dense values ``[out, in]`` of the parameter that a matrix holds, alone or fused with others."""
    values = dequantize_matrix(matrix.read())
    return values if spec.fused is None else spec.fused.extract(config, values)


def _slice(
    config: ModelConfig, hf_fields: Mapping[str, Any], spec: TensorSpec, matrix: QArray | Codebook
) -> QArray | Codebook:
    """The parameter that a matrix holds, in codes."""
    scale = 1.0 if spec.scale is None else spec.scale(hf_fields)
    parts = {"codes": matrix.codes, "scale": matrix.scale * np.float32(scale)}
    parts |= {"zero": matrix.zero} if isinstance(matrix, QArray) else {}
    if spec.fused is not None:
        parts = {name: None if part is None else spec.fused.extract(config, part) for name, part in parts.items()}
    return dataclasses.replace(matrix, **parts)
