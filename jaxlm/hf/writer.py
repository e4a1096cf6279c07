"""Writing a model as one of a Hugging Face family, which transformers loads: the inverse of ``hf.config`` and
``hf.reader``."""

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
from jaxlm.core.leaves import Codebook, QArray, dequantize, is_leaf
from jaxlm.core.tree import Leaf, Params, flatten
from jaxlm.hf.config import RUNTIME_FIELDS, from_hf_config, with_defaults
from jaxlm.hf.families.fields import TensorSpec
from jaxlm.hf.families.registry import FAMILIES
from jaxlm.hf.tensor_files import LazyTensor
from jaxlm.hf.tensor_map import buffers_of, split_layer_path, tensors_of_param
from jaxlm.nn.config import (
    DecoderConfig,
    LSTMConfig,
    ModelConfig,
    RopeScaling,
    Seq2SeqConfig,
    StackConfig,
    layer_groups_of,
)

__all__ = ["ExportPlan", "ParamSlice", "plan_export", "simplest_hf_config", "to_hf_config", "to_hf_tensors"]

# A model without these parameters computes the same with them at zero, so a family that always has them can hold it.
_ADDABLE = ("qkv_bias", "out_bias", "mlp_bias", "norm_bias", "logits_bias")

# Fields that do not matter without experts.
_EXPERT_FIELDS = (
    "experts_per_token", "expert_ffn", "expert_renormalize", "expert_bias", "scale_expert_inputs", "router_scores",
    "router_bias", "correction_bias", "n_group", "topk_group", "routed_scaling_factor", "shared_expert_ffn",
    "shared_expert_gate", "dense_layers",
)


def simplest_hf_config(config: ModelConfig, *, exact: bool = True) -> dict[str, Any] | None:
    """``to_hf_config`` for the first family that the model can be written as, plain families first; None if there is
    none. With ``exact``, only families that have the same parameters and add none."""
    for model_type in ("llama", "gpt2", "m2m_100", "marian", *FAMILIES):
        try:
            fields = to_hf_config(config, model_type)
        except UserError:
            continue
        if not exact or _same_parameters(config, from_hf_config(fields)):
            return fields
    return None


def _same_parameters(config: ModelConfig, read_back: ModelConfig) -> bool:
    """Whether the models have the same parameters, apart from layer groups."""
    return _canonical(config) == _canonical(read_back) or _structure(config) == _structure(read_back)


def _structure(config: ModelConfig) -> jax.tree_util.PyTreeDef:
    """The tree of the parameters, in as few layer groups as possible."""
    names = ("layer_groups", "encoder_layer_groups", "decoder_layer_groups")
    merged = {name: () for name in names if hasattr(config, name)}
    return jax.tree.structure(nn.abstract(dataclasses.replace(config, **merged))[1])


def to_hf_config(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The config.json of the model as one of the family ``model_type``.

    Whether the family can hold the model is found out by reading back what was written.

    Raises:
        UserError: it cannot; the message names the field.
    """
    if model_type not in FAMILIES:
        raise UserError(f"{model_type!r} is not a format; choose from {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    if isinstance(config, LSTMConfig) or not isinstance(config, family.config_class):
        raise UserError(f"a {config.kind} model cannot be written as {model_type}")
    fields = {"architectures": [family.architecture], "model_type": model_type, "dtype": "float32"}
    for field in family.fields:
        fields |= field.to_hf(config)
    fields |= {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    if isinstance(config, Seq2SeqConfig):
        fields |= {"decoder_start_token_id": config.bos_id, "is_encoder_decoder": True}
    try:
        _check_same_model(config, from_hf_config(fields))
    except UserError as error:
        raise UserError(f"this model cannot be written as {model_type}: {error}") from None
    return fields


def _check_same_model(config: ModelConfig, read_back: ModelConfig) -> None:
    """Raises UserError, naming a field, where the two configurations are not of the same model."""
    given, found = (dataclasses.asdict(_canonical(each)) for each in (config, read_back))
    for name, value in given.items():
        added = name in _ADDABLE and found[name] and not value
        # Untied families have a source vocabulary of their own; a shared one is written twice (hf.families.bart).
        split = name == "src_vocab_size" and not value and found[name] == config.vocab_size
        untied = name == "tie_embeddings" and not value  # the head in the file is enough (hf.reader)
        close = isinstance(value, float) and math.isclose(value, found[name], rel_tol=1e-9)
        if value != found[name] and not (added or split or untied or close):
            raise UserError(f"{name} is {value!r}, where such models have {found[name]!r}")


def _canonical(config: StackConfig) -> StackConfig:
    """The configuration with derived sizes filled in, and with the defaults of fields that do not matter to the model,
    so that equal models have equal configurations."""
    blank = type(config)()
    changes = {name: getattr(blank, name) for name in RUNTIME_FIELDS if hasattr(config, name)}
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
        if not config.shared_expert_ffn:
            changes["shared_expert_gate"] = False
        if config.n_group == 1:
            changes["topk_group"] = 1
    else:
        changes |= {name: getattr(blank, name) for name in _EXPERT_FIELDS}
    if config.activation != "clamped_swiglu":
        changes |= {name: getattr(blank, name) for name in ("swiglu_alpha", "swiglu_limit")}
    if isinstance(config, Seq2SeqConfig):
        changes |= {"decoder_heads": config.decoder.heads, "decoder_ffn": config.decoder.d_ffn}
    return dataclasses.replace(config, **changes)


@dataclass(frozen=True)
class ParamSlice:
    """The part of one of our parameters, of one layer and expert, that is written into one tensor of the file.

    - ``path`` is the path of the parameter in the family's configuration.
    - ``shape`` is that of the part.
    - ``leaf`` is the whole parameter, layers and all; None where the model has none and zeros are written.
    - ``index`` selects the part of ``leaf``.
    """

    path: str
    spec: TensorSpec
    shape: tuple[int, ...]
    leaf: Leaf | None
    index: tuple[int, ...]

    def get(self) -> Leaf:
        """The part in the representation of the parameter: quantized if that is."""
        if self.leaf is None:
            return np.zeros(self.shape, np.float32)
        return jax.tree.map(lambda array: array[self.index], self.leaf) if self.index else self.leaf

    def dense(self) -> np.ndarray:
        """The part as float32 values."""
        part = self.get()
        return np.asarray(dequantize(part) if is_leaf(part) else part, np.float32)


@dataclass(frozen=True)
class ExportPlan:
    """What each tensor of an exported file is made of.

    - ``config`` is the configuration of the model as one of the family.
    - ``hf_fields`` are the fields of config.json, defaults included.
    - ``slices`` maps the names of tensors to what they hold, in the order in which it lies side by side.
    - ``buffers`` are the numbers in the file that are no parameters (``Family.buffers``).
    """

    config: ModelConfig
    hf_fields: Mapping[str, Any]
    slices: Mapping[str, list[ParamSlice]]
    buffers: Mapping[str, float]

    def buffer_tensors(self, dtype: np.dtype) -> dict[str, np.ndarray]:
        return {name: np.asarray(value, dtype) for name, value in self.buffers.items()}

    def dense_tensor(self, name: str, dtype: np.dtype) -> LazyTensor:
        """A tensor of the file, dense, which is made when it is written."""
        spec, shape = self.slices[name][0].spec, self.slices[name][0].shape
        stored = list(spec.stored(shape))
        if spec.fused is not None:
            stored[spec.output_axis] = sum(spec.fused.sizes(self.config))
        return LazyTensor((1, *stored) if spec.as_row else tuple(stored), dtype, lambda: self._dense(name, dtype))

    def _dense(self, name: str, dtype: np.dtype) -> np.ndarray:
        slices = self.slices[name]
        spec = slices[0].spec
        if spec.fused is None:
            array = self._stored(slices[0])
        else:
            axis = spec.output_axis
            parts = [np.moveaxis(self._stored(each), axis, 0) for each in slices]
            array = np.moveaxis(spec.fused.fuse(self.config, parts), 0, axis)
        return (array[None] if spec.as_row else array).astype(dtype)

    def _stored(self, part: ParamSlice) -> np.ndarray:
        """A part as the file stores it: transposed, scaled and offset."""
        array = part.spec.stored_array(part.dense())
        scale = self._scale(part.spec)
        return (array - part.spec.offset) / scale if scale != 1.0 or part.spec.offset else array

    def _scale(self, spec: TensorSpec) -> float:
        return 1.0 if spec.scale is None else spec.scale(self.hf_fields)

    def quantized_matrix(self, name: str) -> QArray | Codebook:
        """A tensor of the file with codes ``[out, in]``, of NumPy arrays; all that it holds must be quantized alike."""
        slices, leaves = self.slices[name], []
        for part in slices:
            leaf = jax.tree.map(np.asarray, part.get())
            leaves.append(dataclasses.replace(leaf, scale=leaf.scale / np.float32(self._scale(part.spec))))
        if slices[0].spec.fused is None:
            return leaves[0]

        def fuse(field: str) -> np.ndarray | None:
            parts = [getattr(leaf, field) for leaf in leaves]
            return None if parts[0] is None else slices[0].spec.fused.fuse(self.config, parts)

        fields = ("codes", "scale") if isinstance(leaves[0], Codebook) else ("codes", "scale", "zero")
        return dataclasses.replace(leaves[0], **{field: fuse(field) for field in fields})


def plan_export(config: ModelConfig, params: Params, fields: Mapping[str, Any]) -> ExportPlan:
    """How the model is written as one of a family; ``fields`` are those of ``to_hf_config``."""
    family = FAMILIES[fields["model_type"]]
    target = dataclasses.replace(from_hf_config(fields), tie_embeddings=config.tie_embeddings)
    leaves = flatten(params)
    slices: dict[str, list[ParamSlice]] = {}
    for path, like in flatten(nn.abstract(target)[1]).items():
        for tensor in tensors_of_param(family, target, path, like.shape):
            source, index = _locate(leaves, config, path, tensor.layer, tensor.index[1:])
            part = ParamSlice(path, tensor.spec, like.shape[len(tensor.index) :], leaves.get(source), index)
            slices.setdefault(tensor.name, []).append(part)
    for parts in slices.values():
        parts.sort(key=lambda part: part.spec.fused.index if part.spec.fused else 0)
    return ExportPlan(target, with_defaults(fields), slices, buffers_of(family, target))


def _locate(
    leaves: Mapping[str, Leaf], config: ModelConfig, path: str, layer: int | None, expert: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
    """(path in our model, index into its leading dimensions) of a parameter of one layer and expert, which has ``path``
    in a model without layer groups."""
    if path == "src_embed/table" and path not in leaves:
        path = "embed/table"
    if layer is not None:
        side, param = split_layer_path(path)
        for group, run in enumerate(layer_groups_of(config, side.rstrip("/"))):
            if layer in run:
                return f"{side}layers/{group}/{param}", (layer - run[0], *expert)
    return path, ()


def to_hf_tensors(
    config: ModelConfig, params: Params, fields: Mapping[str, Any], dtype: Any = np.float32
) -> dict[str, LazyTensor | np.ndarray]:
    """The tensors of the file by name, each made when it is written. Compressed leaves are written dense.

    ``fields`` are those of ``to_hf_config``.
    """
    plan = plan_export(config, params, fields)
    tensors = {name: plan.dense_tensor(name, np.dtype(dtype)) for name in plan.slices}
    return tensors | plan.buffer_tensors(np.dtype(dtype))
