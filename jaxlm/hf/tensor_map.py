"""Which tensors of a Hugging Face weights file make up which of our parameters, by the table of the family."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from jaxlm.core.errors import UserError
from jaxlm.hf.families.fields import Family, TensorSpec
from jaxlm.nn.config import ModelConfig, layer_groups_of

__all__ = ["HfTensor", "buffers_of", "split_layer_path", "tensors_of_param"]

_LAYERS = re.compile(r"(.*?)layers/(\d+)/(.*)")


@dataclass(frozen=True)
class HfTensor:
    """A tensor of the file and the part of our parameter that it fills.

    - ``name`` is its full name: that of ``spec`` with the numbers of layer and expert.
    - ``index`` selects the part: () is the whole parameter, (i,) its i-th layer, (i, e) expert e of its i-th layer.
    - ``layer`` is the number of the layer in the model, None outside layers.
    """

    spec: TensorSpec
    name: str
    index: tuple[int, ...]
    layer: int | None


def tensors_of_param(family: Family, config: ModelConfig, path: str, shape: tuple[int, ...]) -> Iterator[HfTensor]:
    """The tensors that make up our parameter at ``path``, which has this shape.

    Raises:
        UserError: the family has no such tensor.
    """
    match = _LAYERS.fullmatch(path)
    key = path if match is None else f"{match[1]}layers/{match[3]}"
    if key not in family.tensors:
        raise UserError(f"models of this model_type have no {key}; its config.json asks for one")
    spec = family.tensors[key]
    name = spec.name_for(config)
    if match is None:
        yield HfTensor(spec, name, (), None)
        return
    layers = layer_groups_of(config, match[1].rstrip("/"))[int(match[2])]
    for i, layer in enumerate(layers):
        if name.count("{}") == 1:
            yield HfTensor(spec, name.format(layer), (i,), layer)
        else:
            for expert in range(shape[1]):
                yield HfTensor(spec, name.format(layer, expert), (i, expert), layer)


def buffers_of(family: Family, config: ModelConfig) -> dict[str, float]:
    """The numbers that a file of the family has besides parameters, by the full names of their tensors."""
    layers = config.num_layers if family.buffers else 0
    return {name.format(layer): value for name, value in family.buffers.items() for layer in range(layers)}


def split_layer_path(path: str) -> tuple[str, str]:
    """``decoder/layers/1/attn/q/kernel`` as (``decoder/``, ``attn/q/kernel``)."""
    match = _LAYERS.fullmatch(path)
    return match[1], match[3]
