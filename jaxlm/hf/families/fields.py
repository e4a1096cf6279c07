"""What the tables of model families are made of: fields of config.json, tensors, and how both become jaxlm's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.nn.config import ModelConfig

REQUIRED = object()  # stands where a default would, for a field that every config.json must have
HfFields = Mapping[str, Any]


@dataclass(frozen=True)
class ConfigField:
    """One or more fields of config.json that together decide one or more fields of our configuration.

    - ``hf_defaults`` maps the names of the config.json fields to the values that transformers takes for absent ones.
    - ``from_hf`` gets a value for each of these names and returns our fields.
    - ``to_hf`` gets our configuration and returns the config.json fields.
    """

    hf_defaults: HfFields
    from_hf: Callable[[HfFields], dict[str, Any]]
    to_hf: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class FusedSlice:
    """The place of one parameter in a stored tensor that fuses several, side by side along its outputs.

    - ``index`` is the position of the parameter among the fused ones.
    - ``sizes`` gives the number of outputs of each, for our configuration.
    - ``turns`` gives how often they take turns: in GPT-NeoX and Falcon each key/value head has its queries, its key and
      its value side by side. None: each lies in one piece.
    """

    index: int
    sizes: Callable[[Any], tuple[int, ...]]
    turns: Callable[[Any], int] | None = None

    def extract(self, config: ModelConfig, fused: np.ndarray) -> np.ndarray:
        """The parameter ``[outputs, ...]`` from the stored tensor ``[all outputs, ...]``."""
        sizes, turns = self.sizes(config), 1 if self.turns is None else self.turns(config)
        start, size = sum(sizes[: self.index]) // turns, sizes[self.index] // turns
        by_turn = fused.reshape(turns, -1, *fused.shape[1:])
        return by_turn[:, start : start + size].reshape(-1, *fused.shape[1:])

    def fuse(self, config: ModelConfig, params: Sequence[np.ndarray]) -> np.ndarray:
        """The stored tensor from all of its parameters, in the order of their indices: undoes ``extract``."""
        turns = 1 if self.turns is None else self.turns(config)
        by_turn = np.concatenate([param.reshape(turns, -1, *param.shape[1:]) for param in params], 1)
        return by_turn.reshape(-1, *by_turn.shape[2:])


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor of the weights file becomes one parameter: ``offset + scale(fields) * stored``.

    - ``name`` is the tensor's name, or a function that gives it for our configuration. Each ``{}`` in the name is a
      number: first the layer's, then the expert's.
    - ``transposed``: the file stores the matrix ``[out, in]``, as torch does, or those of all experts ``[experts, out,
      in]``.
    - ``fused`` is set where the parameter is a slice of the stored tensor.
    - ``as_row``: the file stores the vector as a matrix of one row.
    - ``scale`` gets the fields of config.json, defaults included.
    - ``aliases`` are further names of the tensor. The first name that a file contains is read.
    """

    name: str | Callable[[Any], str]
    transposed: bool = False
    fused: FusedSlice | None = None
    as_row: bool = False
    offset: float = 0.0
    scale: Callable[[HfFields], float] | None = None
    aliases: tuple[str, ...] = ()

    def name_for(self, config: ModelConfig) -> str:
        return self.name if isinstance(self.name, str) else self.name(config)

    def stored(self, dimensions: tuple) -> tuple:
        """The dimensions of a parameter in the order in which the file has them, and the other way round."""
        return (*dimensions[:-2], *dimensions[:-3:-1]) if self.transposed else dimensions

    def stored_array(self, array: np.ndarray) -> np.ndarray:
        """A parameter as the file has it, and the other way round."""
        return array.swapaxes(-1, -2) if self.transposed else array

    @property
    def output_axis(self) -> int:
        """The dimension of the stored tensor that counts outputs."""
        return -2 if self.transposed else -1


@dataclass(frozen=True)
class Family:
    """The table of one ``model_type``.

    - ``config_class`` is the class of our configuration.
    - ``architecture`` is the class of transformers that an exported config.json names.
    - ``tensors`` maps the paths of our parameters to stored tensors. In these paths ``layers/`` stands for
      ``layers/GROUP/``, whose parameters are stacked over layers (and experts). A path that a model does not have is
      not looked up.
    - ``prefix`` starts the tensor names, except in files that were saved from the base model alone.
    - ``head`` is the tensor of the output head. A file whose head differs from its embedding has untied embeddings.
    - ``unused_tensors`` are regular expressions of tensor names that the model does not need.
    - ``buffers`` are numbers that all models of the family have in the file, by tensor name, ``{}`` for the layer.
    """

    config_class: type[ModelConfig]
    architecture: str
    fields: tuple[ConfigField, ...]
    tensors: Mapping[str, TensorSpec]
    prefix: str = ""
    head: str = "lm_head.weight"
    unused_tensors: tuple[str, ...] = ()
    buffers: Mapping[str, float] = field(default_factory=dict)


# transformers' name of an activation -> our name.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "relu2": "relu2", "tanh": "tanh", "silu": "silu", "swish": "silu",
}
GATED_ACTIVATIONS = {
    "silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh",
    "relu": "reglu",
}

# One field ------------------------------------------------------------------------------------------------------------


def renamed(hf_name: str, *names: str, default: Any = REQUIRED, cast: type | None = None) -> ConfigField:
    """A field with the same value under our name, or under several of our names; null counts as absent."""

    def from_hf(fields: HfFields) -> dict[str, Any]:
        value = _present(hf_name, default if fields[hf_name] is None else fields[hf_name])
        return dict.fromkeys(names, cast(value) if cast else value)

    return ConfigField({hf_name: default}, from_hf, lambda config: {hf_name: getattr(config, names[0])})


def optional_size(hf_name: str, name: str, resolved: str, default: Any = None) -> ConfigField:
    """A size that follows from others where config.json has null and our field is 0. Our property ``resolved`` gives
    the size in both cases, and it is what is written."""

    def from_hf(fields: HfFields) -> dict[str, Any]:
        value = _present(hf_name, fields[hf_name])
        return {name: 0 if value is None else value}

    return ConfigField({hf_name: default}, from_hf, lambda config: {hf_name: getattr(config, resolved)})


def _present(hf_name: str, value: Any) -> Any:
    if value is REQUIRED:
        raise UserError(f"{hf_name} is missing; config.json must have it for this model_type")
    return value


def choice(hf_name: str, name: str, values: Mapping[Any, Any], default: Any = REQUIRED) -> ConfigField:
    """A field whose values have other names here: ``values`` maps values of config.json to
    ours. Where several mean the same, the first is written."""

    def from_hf(fields: HfFields) -> dict[str, Any]:
        value = fields[hf_name]
        if not isinstance(value, str | bool) or value not in values:
            raise UserError(f"{hf_name} = {value!r} is not supported; only {', '.join(map(str, values))}")
        return {name: values[value]}

    def to_hf(config: ModelConfig) -> dict[str, Any]:
        value = getattr(config, name)
        return {hf_name: next((hf_value for hf_value, other in values.items() if other == value), None)}

    return ConfigField({hf_name: default}, from_hf, to_hf)


def require_value(hf_name: str, *allowed: Any, default: Any = None) -> ConfigField:
    """A field of which only the values ``allowed`` and null are supported, and all of them mean the same."""

    def from_hf(fields: HfFields) -> dict[str, Any]:
        if fields[hf_name] not in (*allowed, None):
            raise UserError(f"{hf_name} = {fields[hf_name]!r} is not supported; only {[*allowed, None]}")
        return {}

    return ConfigField({hf_name: default}, from_hf, lambda config: {hf_name: allowed[0] if allowed else None})


def constant(**ours: Any) -> ConfigField:
    """Fields of ours that are the same for all models of the family, whatever config.json says."""
    return ConfigField({}, lambda fields: ours, lambda config: {})


def write_only(hf_name: str, name: str, default: Any) -> ConfigField:
    """A field that is not read, and written as our field ``name``: a dropout rate that jaxlm has no field for."""
    return ConfigField({hf_name: default}, lambda fields: {}, lambda config: {hf_name: getattr(config, name)})


def unread(hf_name: str) -> ConfigField:
    """A field that transformers' configuration class overwrites."""
    return ConfigField({hf_name: None}, lambda fields: {}, lambda config: {})


def reciprocal(hf_name: str, name: str, default: float = 1.0) -> ConfigField:
    """A divisor in config.json that is a factor here."""

    def from_hf(fields: HfFields) -> dict[str, Any]:
        return {name: 1.0 / (default if fields[hf_name] is None else fields[hf_name])}

    return ConfigField({hf_name: default}, from_hf, lambda config: {hf_name: 1.0 / getattr(config, name)})


def zero_if_null(hf_name: str, name: str, default: Any = None) -> ConfigField:
    """A number that is 0 in our configuration where config.json has null."""
    return ConfigField(
        {hf_name: default},
        lambda fields: {name: float(fields[hf_name] or 0)},
        lambda config: {hf_name: getattr(config, name) or None},
    )


# Tensors --------------------------------------------------------------------------------------------------------------


def linear(path: str, hf_module: str, **options: Any) -> dict[str, TensorSpec]:
    """The kernel and bias of a linear map, stored ``[out, in]`` unless ``transposed=False`` is given."""
    options = {"transposed": True} | options
    return {
        f"{path}/kernel": TensorSpec(f"{hf_module}.weight", **options),
        f"{path}/bias": TensorSpec(f"{hf_module}.bias", **(options | {"transposed": False})),
    }


def norm(path: str, hf_module: str, **options: Any) -> dict[str, TensorSpec]:
    """The scale and bias of a normalization."""
    return {
        f"{path}/scale": TensorSpec(f"{hf_module}.weight", **options),
        f"{path}/bias": TensorSpec(f"{hf_module}.bias", **options),
    }


def fused_linear(
    paths: Sequence[str], hf_module: str, sizes: Callable[[Any], tuple[int, ...]], *,
    turns: Callable[[Any], int] | None = None, **options: Any,
) -> dict[str, TensorSpec]:
    """Several linear maps of the same input that are stored as one tensor; see ``FusedSlice``."""
    tensors: dict[str, TensorSpec] = {}
    for index, path in enumerate(paths):
        tensors |= linear(path, hf_module, fused=FusedSlice(index, sizes, turns), **options)
    return tensors


def fused_qkv(hf_module: str, **options: Any) -> dict[str, TensorSpec]:
    """Queries, keys and values of a decoder's self-attention that are stored as one tensor."""

    def sizes(config: Any) -> tuple[int, int, int]:
        kv = config.n_kv_heads * config.d_head
        return config.heads * config.d_head, kv, kv

    return fused_linear([f"decoder/layers/attn/{name}" for name in "qkv"], hf_module, sizes, **options)
