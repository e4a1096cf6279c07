"""Writing a model as one of a Hugging Face family, which transformers loads: ``checkpoint.hf`` the other way round."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxlm import nn
from jaxlm.checkpoint.hf import RUNTIME, complete, convert_config, layer_path, pieces
from jaxlm.checkpoint.hf_fields import Tensor
from jaxlm.checkpoint.hf_maps import FAMILIES
from jaxlm.checkpoint.tensors import Lazy
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import dequantize, is_leaf
from jaxlm.core.tree import Params, flatten
from jaxlm.nn.config import DecoderConfig, LSTMConfig, ModelConfig, RopeScaling, Seq2SeqConfig, StackConfig
from jaxlm.nn.stack import layers_of

__all__ = ["express", "hf_config", "hf_tensors"]

# Without these a model is the same as with them at zero, so a family that always has them can hold it.
_ADDABLE = ("qkv_bias", "out_bias", "mlp_bias", "norm_bias", "logits_bias")


def express(config: ModelConfig, *, exactly: bool = True) -> dict[str, Any] | None:
    """``hf_config`` for the first family, plain ones first, that such a model is one of; None if there is none.

    ``exactly``: with the same parameters, none added.
    """
    for kind in ("llama", "gpt2", "m2m_100", "marian", *FAMILIES):
        try:
            fields = hf_config(config, kind)
        except UserError:
            continue
        if not exactly or _structure(convert_config(FAMILIES[kind], fields)) == _structure(config):
            return fields
    return None


def _structure(config: ModelConfig):
    """Of the parameters, in as few segments as possible."""
    names = ("segments", "encoder_segments", "decoder_segments")
    blank = {name: () for name in names if hasattr(config, name)}
    return jax.tree.structure(nn.abstract(dataclasses.replace(config, **blank))[1])


def hf_config(config: ModelConfig, kind: str) -> dict[str, Any]:
    """The config.json of the model as one of the family. UserError, naming the field, if the family cannot be it.

    That is found out by reading back what was written.
    """
    if kind not in FAMILIES:
        raise UserError(f"{kind!r} is not a format; choose from {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    if isinstance(config, LSTMConfig) or not isinstance(config, family.config):
        raise UserError(f"a {config.kind} model cannot be written as {kind}")
    fields = {"architectures": [family.architecture], "model_type": kind, "dtype": "float32"}
    for field in family.fields:
        fields |= field.write(config)
    fields |= {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    if isinstance(config, Seq2SeqConfig):
        fields |= {"decoder_start_token_id": config.bos_id, "is_encoder_decoder": True}
    try:
        _same(config, convert_config(family, fields))
    except UserError as error:
        raise UserError(f"this model cannot be written as {kind}: {error}") from None
    return fields


def _same(config: ModelConfig, back: ModelConfig) -> None:
    """UserError, naming a field, where a configuration came back as another model's."""
    ours, theirs = (dataclasses.asdict(_canonical(each)) for each in (config, back))
    for name, value in ours.items():
        added = name in _ADDABLE and theirs[name] and not value
        split = name == "src_vocab_size" and not value and theirs[name] == config.vocab_size  # see hf_translators
        untied = name == "tie_embeddings" and not value  # a head of its own in the file is enough: see hf._untie
        close = isinstance(value, float) and math.isclose(value, theirs[name], rel_tol=1e-9)
        if value != theirs[name] and not (added or split or untied or close):
            raise UserError(f"{name} is {value!r}, where such models have {theirs[name]!r}")


def _canonical(config: StackConfig) -> StackConfig:
    """The configuration with derived sizes told, and fields that do not count for it at their defaults."""
    blank = type(config)()
    changes = {name: getattr(blank, name) for name in RUNTIME if hasattr(config, name)}
    changes |= {"kv_heads": config.n_kv_heads, "head_dim": config.d_head, "ffn": config.d_ffn}
    changes["attention_scale"] = config.attention_scale or config.d_head**-0.5
    layers = config.layers if isinstance(config, DecoderConfig) else config.encoder_layers
    windows = tuple(itertools.islice(itertools.cycle(config.windows or (0,)), layers))
    changes["windows"] = windows if any(windows) else ()
    if config.norm == "rmsnorm":
        changes["norm_bias"] = False
    if config.positions == "rotary":
        changes["position_offset"] = 0
        changes["rope_local_theta"] = config.rope_local_theta if any(windows) else 0.0
    else:
        changes |= {"rope_theta": blank.rope_theta, "rope_scaling": RopeScaling(), "rotary_fraction": 1.0}
    if config.positions != "relative":
        changes |= {name: getattr(blank, name) for name in ("relative_buckets", "relative_max_distance")}
    if config.positions in ("relative", "none"):
        changes |= {"max_positions": 0, "position_offset": 0}
    if config.experts:
        changes["expert_ffn"] = config.d_expert
    else:
        changes |= {name: getattr(blank, name) for name in ("experts_per_token", "expert_ffn", "expert_renormalize")}
    if isinstance(config, Seq2SeqConfig):
        changes |= {"decoder_heads": config.decoder.heads, "decoder_ffn": config.decoder.d_ffn}
    return dataclasses.replace(config, **changes)


def hf_tensors(
    config: ModelConfig, params: Params, fields: Mapping[str, Any], dtype: Any = np.float32
) -> dict[str, Lazy]:
    """The tensors of the file by name, each made when it is asked for. ``fields`` are those of ``hf_config``.

    Compressed leaves are written as what they stand for.
    """
    family = FAMILIES[fields["model_type"]]
    target = dataclasses.replace(convert_config(family, fields), tie_embeddings=config.tie_embeddings)
    values, ours = complete(family, fields), flatten(params)
    parts: dict[str, list[tuple[Tensor, Callable[[], np.ndarray], tuple[int, ...]]]] = {}
    for path, leaf in flatten(nn.abstract(target)[1]).items():
        for piece in pieces(family, target, path, leaf.shape):
            shape = leaf.shape[len(piece.at) :]
            get = partial(_ours, ours, config, path, piece.layer, piece.at[1:], shape)
            parts.setdefault(piece.name, []).append((piece.tensor, get, shape))
    return {name: _tensor(target, values, found, np.dtype(dtype)) for name, found in parts.items()}


def _ours(ours: Mapping[str, Any], config: ModelConfig, path: str, layer: int | None, rest, shape) -> np.ndarray:
    """Our value of a parameter, of one layer and expert; zeros where it is one that the family adds."""
    if path == "src_embed/table" and path not in ours:
        path = "embed/table"
    at: tuple[int, ...] = ()
    if layer is not None:
        prefix, rest_of_path = layer_path(path)
        for segment, run in enumerate(layers_of(config, prefix.rstrip("/"))):
            if layer in run:
                path, at = f"{prefix}layers/{segment}/{rest_of_path}", (layer - run[0], *rest)
    if path not in ours:
        return np.zeros(shape, np.float32)
    leaf = ours[path]
    part = jax.tree.map(lambda array: array[at], leaf) if at else leaf
    return np.asarray(dequantize(part) if is_leaf(part) else part, np.float32)


def _tensor(config: ModelConfig, values: Mapping[str, Any], found: list, dtype: np.dtype) -> Lazy:
    """One tensor of the file from the parameters of ours that are cut from it."""
    tensor, _, shape = found[0]
    axis = 0 if tensor.transposed else len(shape) - 1

    def stored(tensor: Tensor, get: Callable[[], np.ndarray]) -> np.ndarray:
        scale = 1.0 if tensor.scale is None else tensor.scale(values)
        array = get()
        array = array.T if tensor.transposed else array
        return (array - tensor.offset) / scale if scale != 1.0 or tensor.offset else array

    def make() -> np.ndarray:
        if tensor.cut is None:
            array = stored(*found[0][:2])
        else:
            parts = [stored(*each[:2]) for each in sorted(found, key=lambda each: each[0].cut.index)]
            array = np.moveaxis(tensor.cut.join(config, [np.moveaxis(part, axis, 0) for part in parts]), 0, axis)
        return (array[None] if tensor.row else array).astype(dtype)

    whole = list(shape[::-1] if tensor.transposed else shape)
    if tensor.cut is not None:
        whole[axis] = sum(tensor.cut.sizes(config))
    return Lazy((1, *whole) if tensor.row else tuple(whole), dtype, make)
