"""What the tables of families are made of: fields of a config.json and names of tensors, and how they become ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.nn.config import ModelConfig

REQUIRED = object()  # in place of a default: the field must be there
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Field:
    """Some fields of config.json that together decide some of ours.

    ``theirs`` maps their names to what transformers takes where one is absent. ``read`` gets their values, of all
    names, and gives our fields; ``write`` gives theirs for a configuration of ours.
    """

    theirs: Values
    read: Callable[[Values], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Cut:
    """One of several parameters of ours that are stored as one tensor, side by side along its outputs.

    ``by_head``: side by side within each head, as GPT-NeoX does.
    """

    index: int
    sizes: Callable[[Any], tuple[int, ...]]  # of each, given our configuration
    by_head: bool = False

    def take(self, config: ModelConfig, whole: np.ndarray) -> np.ndarray:
        """Ours of the stored tensor, whose outputs come first here."""
        sizes = self.sizes(config)
        if self.by_head:
            heads = whole.reshape(-1, len(sizes), config.d_head, *whole.shape[1:])
            return heads[:, self.index].reshape(-1, *whole.shape[1:])
        start = sum(sizes[: self.index])
        return whole[start : start + sizes[self.index]]

    def join(self, config: ModelConfig, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The stored tensor from all that ``take`` gives, in order."""
        if self.by_head:
            heads = np.stack([part.reshape(-1, config.d_head, *part.shape[1:]) for part in parts], 1)
            return heads.reshape(-1, *heads.shape[3:])
        return np.concatenate(parts)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file. Each ``{}`` in its name is a number: of the layer, then of the expert.

    Ours is ``offset + scale(fields) * theirs``, theirs transposed or cut where these say so. ``fields`` are
    those of config.json, defaults included.
    """

    name: str | Callable[[Any], str]  # given our configuration
    transposed: bool = False  # stored [out, in], as torch does
    cut: Cut | None = None
    row: bool = False  # a vector stored as a matrix of one row
    offset: float = 0.0
    scale: Callable[[Values], float] | None = None
    aliases: tuple[str, ...] = ()  # other names of the same tensor: the first that a file has counts

    def named(self, config: ModelConfig) -> str:
        return self.name if isinstance(self.name, str) else self.name(config)


@dataclass(frozen=True)
class Family:
    """How the models of one ``model_type`` are told.

    ``tensors`` maps our paths to theirs; in our paths ``layers/`` stands for ``layers/GROUP/``, whose tensors are
    stacked over layers (and experts). Paths that a configuration does not have are not asked for.
    """

    config: type  # of ours
    architecture: str  # the class of transformers that a written config.json names
    fields: tuple[Field, ...]
    tensors: Mapping[str, Tensor]
    prefix: str = ""  # that names may lack, where the base model was saved
    head: str = "lm_head.weight"  # given, and different from the embedding, it unties them
    ignored: tuple[str, ...] = ()  # fields that this family's models do not depend on
    unused: tuple[str, ...] = ()  # tensors of some files that the model does not need: regular expressions


PLAIN = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "tanh": "tanh", "silu": "silu", "swish": "silu",
}
GATED = {
    "silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh",
    "relu": "reglu",
}

# One field ------------------------------------------------------------------------------------------------------------


def same(theirs: str, *ours: str, default: Any = REQUIRED, cast: type | None = None) -> Field:
    """A field that has the value of ours; null counts as absent."""

    def read(values: Values) -> dict[str, Any]:
        value = _present(theirs, default if values[theirs] is None else values[theirs])
        return dict.fromkeys(ours, cast(value) if cast else value)

    return Field({theirs: default}, read, lambda config: {theirs: getattr(config, ours[0])})


def size(theirs: str, ours: str, derived: str, default: Any = None) -> Field:
    """A size that is 0 in ours where it follows from others, and null in theirs."""

    def read(values: Values) -> dict[str, Any]:
        value = _present(theirs, values[theirs])
        return {ours: 0 if value is None else value}

    return Field({theirs: default}, read, lambda config: {theirs: getattr(config, derived)})


def _present(theirs: str, value: Any) -> Any:
    if value is REQUIRED:
        raise UserError(f"{theirs} is missing; it belongs in a configuration of this model_type")
    return value


def choice(theirs: str, ours: str, known: Mapping[Any, Any], default: Any = REQUIRED) -> Field:
    """A field whose values have other names in ours. Where several mean the same, the first is written."""

    def read(values: Values) -> dict[str, Any]:
        value = values[theirs]
        if not isinstance(value, str | bool) or value not in known:
            raise UserError(f"{theirs} = {value!r} is not supported; only {', '.join(map(str, known))}")
        return {ours: known[value]}

    def write(config: ModelConfig) -> dict[str, Any]:
        value = getattr(config, ours)
        return {theirs: next((name for name, mine in known.items() if mine == value), None)}

    return Field({theirs: default}, read, write)


def must(theirs: str, *allowed: Any, default: Any = None) -> Field:
    """A field of which only some values are understood, all alike; null is one of them."""

    def read(values: Values) -> dict[str, Any]:
        if values[theirs] not in (*allowed, None):
            raise UserError(f"{theirs} = {values[theirs]!r} is not supported; only {[*allowed, None]}")
        return {}

    return Field({theirs: default}, read, lambda config: {theirs: allowed[0] if allowed else None})


def constant(**ours: Any) -> Field:
    """What no field of theirs decides."""
    return Field({}, lambda values: ours, lambda config: {})


def echo(theirs: str, ours: str, default: Any) -> Field:
    """A rate of dropout for which we have no field of its own: written as that of ours which counts in its place."""
    return Field({theirs: default}, lambda values: {}, lambda config: {theirs: getattr(config, ours)})


def optional(theirs: str, ours: str, default: Any = None) -> Field:
    """A number that is 0 in ours where it is null in theirs."""
    return Field(
        {theirs: default},
        lambda values: {ours: float(values[theirs] or 0)},
        lambda config: {theirs: getattr(config, ours) or None},
    )


# Tensors --------------------------------------------------------------------------------------------------------------


def linear(ours: str, theirs: str, **options: Any) -> dict[str, Tensor]:
    """A kernel and its bias, stored ``[out, in]``."""
    options = {"transposed": True} | options
    return {
        f"{ours}/kernel": Tensor(f"{theirs}.weight", **options),
        f"{ours}/bias": Tensor(f"{theirs}.bias", **(options | {"transposed": False})),
    }


def norm(ours: str, theirs: str, **options: Any) -> dict[str, Tensor]:
    return {
        f"{ours}/scale": Tensor(f"{theirs}.weight", **options), f"{ours}/bias": Tensor(f"{theirs}.bias", **options)
    }


def fused(ours: tuple[str, ...], theirs: str, sizes: Callable[[Any], tuple[int, ...]], **options: Any):
    """Several linear maps in one tensor."""
    tensors: dict[str, Tensor] = {}
    by_head = options.pop("by_head", False)
    for index, path in enumerate(ours):
        tensors |= linear(path, theirs, cut=Cut(index, sizes, by_head), **options)
    return tensors
