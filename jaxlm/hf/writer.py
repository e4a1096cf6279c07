"""Writing a model as one of a Hugging Face family, which transformers loads: ``hf.reader`` the other way round."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray, dequantize, is_leaf
from jaxlm.core.tree import Leaf, Params, flatten
from jaxlm.hf.families.fields import Tensor
from jaxlm.hf.families.registry import FAMILIES
from jaxlm.hf.reader import RUNTIME, complete, convert_config, layer_path, pieces
from jaxlm.hf.tensor_files import Lazy
from jaxlm.nn.config import DecoderConfig, LSTMConfig, ModelConfig, RopeScaling, Seq2SeqConfig, StackConfig
from jaxlm.nn.stack import layer_groups_of

__all__ = ["Part", "Plan", "express", "hf_config", "hf_tensors", "joined", "plan"]

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
    """Of the parameters, in as few layer groups as possible."""
    names = ("layer_groups", "encoder_layer_groups", "decoder_layer_groups")
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


@dataclass(frozen=True)
class Part:
    """A parameter of ours, of one layer and expert, that is (a part of) a tensor of theirs.

    ``leaf`` is the whole parameter, layers and all, or None where the model has no such parameter: zeros.
    """

    path: str
    tensor: Tensor
    shape: tuple[int, ...]
    leaf: Leaf | None
    at: tuple[int, ...]

    def get(self) -> Leaf:
        """As it is represented."""
        if self.leaf is None:
            return np.zeros(self.shape, np.float32)
        return jax.tree.map(lambda array: array[self.at], self.leaf) if self.at else self.leaf

    def dense(self) -> np.ndarray:
        """As what it stands for."""
        part = self.get()
        return np.asarray(dequantize(part) if is_leaf(part) else part, np.float32)


@dataclass(frozen=True)
class Plan:
    """What the tensors of a family's file are made of: by name, parts in the order in which they lie side by side."""

    config: ModelConfig  # as the family has it
    values: Mapping[str, Any]  # of config.json, defaults included
    parts: Mapping[str, list[Part]]

    def lazy(self, name: str, dtype: np.dtype) -> Lazy:
        """A dense tensor."""
        return _tensor(self.config, self.values, self.parts[name], dtype)


def plan(config: ModelConfig, params: Params, fields: Mapping[str, Any]) -> Plan:
    """How the model is written as one of a family; ``fields`` are those of ``hf_config``."""
    family = FAMILIES[fields["model_type"]]
    target = dataclasses.replace(convert_config(family, fields), tie_embeddings=config.tie_embeddings)
    ours = flatten(params)
    parts: dict[str, list[Part]] = {}
    for path, leaf in flatten(nn.abstract(target)[1]).items():
        for piece in pieces(family, target, path, leaf.shape):
            mine, at = _place(ours, config, path, piece.layer, piece.at[1:])
            part = Part(path, piece.tensor, leaf.shape[len(piece.at) :], ours.get(mine), at)
            parts.setdefault(piece.name, []).append(part)
    for found in parts.values():
        found.sort(key=lambda part: part.tensor.cut.index if part.tensor.cut else 0)
    return Plan(target, complete(family, fields), parts)


def hf_tensors(
    config: ModelConfig, params: Params, fields: Mapping[str, Any], dtype: Any = np.float32
) -> dict[str, Lazy]:
    """The tensors of the file by name, each made when it is asked for. ``fields`` are those of ``hf_config``.

    Compressed leaves are written as what they stand for.
    """
    found = plan(config, params, fields)
    return {name: found.lazy(name, np.dtype(dtype)) for name in found.parts}


def _place(ours: Mapping[str, Any], config: ModelConfig, path: str, layer: int | None, rest: tuple[int, ...]):
    """(our path, index into its leading dimensions) of a parameter of one layer and expert."""
    if path == "src_embed/table" and path not in ours:
        path = "embed/table"
    if layer is not None:
        prefix, rest_of_path = layer_path(path)
        for layer_group, run in enumerate(layer_groups_of(config, prefix.rstrip("/"))):
            if layer in run:
                return f"{prefix}layers/{layer_group}/{rest_of_path}", (layer - run[0], *rest)
    return path, ()


def _tensor(config: ModelConfig, values: Mapping[str, Any], found: list[Part], dtype: np.dtype) -> Lazy:
    """One tensor of the file from the parameters of ours that are cut from it."""
    tensor, shape = found[0].tensor, found[0].shape
    axis = 0 if tensor.transposed else len(shape) - 1

    def stored(part: Part) -> np.ndarray:
        tensor, array = part.tensor, part.dense()
        scale = 1.0 if tensor.scale is None else tensor.scale(values)
        array = array.T if tensor.transposed else array
        return (array - tensor.offset) / scale if scale != 1.0 or tensor.offset else array

    def make() -> np.ndarray:
        if tensor.cut is None:
            array = stored(found[0])
        else:
            parts = [np.moveaxis(stored(part), axis, 0) for part in found]
            array = np.moveaxis(tensor.cut.join(config, parts), 0, axis)
        return (array[None] if tensor.row else array).astype(dtype)

    whole = list(shape[::-1] if tensor.transposed else shape)
    if tensor.cut is not None:
        whole[axis] = sum(tensor.cut.sizes(config))
    return Lazy((1, *whole) if tensor.row else tuple(whole), dtype, make)


def joined(plan: Plan, name: str) -> QArray:
    """The quantized matrix that a tensor of the file is, its codes ``[out, in]``, from leaves of one grid."""
    found, leaves = plan.parts[name], []
    for part in found:
        scale = 1.0 if part.tensor.scale is None else part.tensor.scale(plan.values)
        leaf = jax.tree.map(np.asarray, part.get())
        leaves.append(dataclasses.replace(leaf, scale=leaf.scale / np.float32(scale)))
    if found[0].tensor.cut is None:
        return leaves[0]

    def join(field: str) -> np.ndarray | None:
        parts = [getattr(leaf, field) for leaf in leaves]
        return None if parts[0] is None else found[0].tensor.cut.join(plan.config, parts)

    return dataclasses.replace(leaves[0], codes=join("codes"), scale=join("scale"), zero=join("zero"))
