"""Reading a Hugging Face model directory by the table of its family (``jaxlm.checkpoint.hf_maps``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm import nn
from jaxlm.checkpoint.hf_maps import FAMILIES, NEUTRAL, REQUIRED, Family, Tensor
from jaxlm.checkpoint.tensors import TensorFiles
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params, flatten, unflatten
from jaxlm.nn.config import DecoderConfig

__all__ = ["read_hf"]

_LAYERS = re.compile(r"(.*?)layers/(\d+)/(.*)")


def read_hf(directory: Path, fields: Mapping[str, Any]) -> tuple[DecoderConfig, Params]:
    """Configuration and float32 parameters of a directory whose config.json holds ``fields``.

    UserError where the family is unknown, a field may change results in a way that is not understood, or a tensor is
    missing, superfluous or of the wrong shape.
    """
    path = directory / "config.json"
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    try:
        config = convert_config(family, fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, read_params(family, config, TensorFiles(directory))


def convert_config(family: Family, fields: Mapping[str, Any]) -> DecoderConfig:
    """Our configuration from the fields of a config.json; None counts as absent there."""
    given = {name: value for name, value in fields.items() if value is not None and name not in NEUTRAL}
    unknown = sorted(set(given) - set(family.fields))
    if unknown:
        raise UserError(f"{unknown[0]} = {given[unknown[0]]!r} is not known, and might change what the model computes")
    ours = dict(family.fixed)
    for name, field in family.fields.items():
        if name not in given and field.default is REQUIRED:
            raise UserError(f"{name} is missing; it belongs in a configuration of this model_type")
        if name in given or not set(field.ours) & set(ours):  # two spellings of one thing: the given one counts
            value = field.convert(given.get(name, field.default))
            ours |= dict.fromkeys(field.ours, value)
    return DecoderConfig(**ours, **_special_ids(fields))


def _special_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens; of several end tokens the first. A model without padding pads with its end token."""
    ids = {}
    for role in ("bos", "eos"):
        value = fields.get(f"{role}_token_id")
        value = value[0] if isinstance(value, list) else value
        if value is not None:
            ids[f"{role}_id"] = value
    pad = fields.get("pad_token_id")
    pad = ids.get("eos_id", 0) if pad is None or pad < 0 else pad
    return ids | {"pad_id": pad}


def read_params(family: Family, config: DecoderConfig, files: TensorFiles) -> Params:
    """The parameters of the model, each tensor read once, in float32."""
    like = nn.abstract(config)[1]
    wanted: set[str] = set()

    def read(tensor: Tensor, shape: tuple[int, ...], layer: int | None = None) -> np.ndarray:
        name = tensor.name if layer is None else tensor.name.format(layer)
        wanted.add(name)
        array = files.read(name, shape[::-1] if tensor.transposed else shape)
        return array.T if tensor.transposed else array

    leaves, first = {}, 0
    segments = config.segments or (config.layers,)
    for path, leaf in flatten(like).items():
        match = _LAYERS.fullmatch(path)
        if match is None:
            leaves[path] = jnp.asarray(read(family.tensors[path], leaf.shape), jnp.float32)
            continue
        prefix, segment, rest = match.groups()
        tensor, first = family.tensors[f"{prefix}layers/{rest}"], sum(segments[: int(segment)])
        stacked = np.empty(leaf.shape, np.float32)
        for i in range(leaf.shape[0]):
            stacked[i] = read(tensor, leaf.shape[1:], first + i)
        leaves[path] = jnp.asarray(stacked)
    for name in files:
        if name not in wanted and not any(re.fullmatch(pattern, name) for pattern in family.unused):
            raise UserError(f"{files.file(name)}: tensor {name!r} has no place in a model of this config.json")
    return unflatten(like, leaves)
