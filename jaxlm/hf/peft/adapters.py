"""LoRA adapters (arXiv:2106.09685) in the format of PEFT: a directory with adapter_config.json and its tensors.

An adapter names tensors as the Hugging Face family of its base model does; the family's table (``hf_maps``) says where
they go here. The layers of one name become one leaf of a stack (``core.leaves.LoRA``), zero where a layer has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import LoRA, QArray, column_norms, dequantize, is_leaf
from jaxlm.core.tree import Leaf, Params, flatten, unflatten
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.families.fields import Cut, Family
from jaxlm.hf.families.registry import FAMILIES
from jaxlm.hf.peft.files import CONFIG, Adapter, Delta, read_adapter, write_adapter
from jaxlm.hf.reader import Piece, complete, family_of, pieces
from jaxlm.hf.writer import express, hf_config
from jaxlm.nn.config import ModelConfig

__all__ = ["CONFIG", "Adapter", "Delta", "apply_adapter", "read_adapter", "save_adapter"]

# Applying -------------------------------------------------------------------------------------------------------------


def apply_adapter(
    adapter: Adapter, config: ModelConfig, params: Params, fields: Mapping[str, Any] | None = None
) -> tuple[ModelConfig, Params]:
    """The model with its adapter kept apart, in ``LoRA`` leaves (``core.leaves.merge_adapters`` merges them).

    ``fields`` are those of the base model's config.json; without them the family is one that the configuration fits and
    that has a place for each of the adapter's tensors. Where embeddings are tied and only the embedding or only the
    head is adapted they become two, which is what PEFT computes. Whoever has a mesh puts the result on it.

    UserError, naming the tensor, where the adapter is of another model.
    """
    base = _base_of(adapter, config, params, fields)
    leaves = flatten(base.params)
    for name, array in {**adapter.replaced, **adapter.own}.items():
        for path, piece in base.find(name):
            leaves[path] = _replaced(adapter, base, name, array, leaves[path], piece)
    found: dict[str, list[tuple[Piece, Delta]]] = {}
    for module, delta in adapter.deltas.items():
        for path, piece in base.find(f"{module}.weight"):
            part = _part(adapter, base, module, delta, path, leaves[path], piece)
            found.setdefault(path, []).append((piece, part))
    leaves |= {path: _stack(leaves[path], parts) for path, parts in found.items()}
    return base.config, unflatten(base.params, leaves)


@dataclass(frozen=True)
class _Base:
    """A model as one of its family: which of our parameters each of the family's tensors goes to."""

    family: Family
    values: Mapping[str, Any]  # the fields of its config.json, defaults included
    config: ModelConfig
    params: Params
    places: Mapping[str, list[tuple[str, Piece]]]

    def find(self, name: str) -> list[tuple[str, Piece]]:
        """Paths and pieces; none where the model has no such tensor. The prefix of the family may be lacking."""
        return self.places.get(name) or self.places.get(self.family.prefix + name, [])

    def scale(self, piece: Piece) -> float:
        return 1.0 if piece.tensor.scale is None else piece.tensor.scale(self.values)


def _base_of(
    adapter: Adapter, config: ModelConfig, params: Params, fields: Mapping[str, Any] | None
) -> _Base:
    """The model as one of the family in which all of the adapter's names have a place, untied where that must be."""
    names = [*(f"{module}.weight" for module in adapter.deltas), *adapter.replaced, *adapter.own]
    lacking = names[:1]
    for candidate in [fields] if fields is not None and fields.get("model_type") in FAMILIES else _expressions(config):
        family = FAMILIES[candidate["model_type"]]
        untied = _untie(family, adapter, config, params)
        base = _Base(family, complete(family, candidate), *untied, _places(family, *untied))
        lacking = [name for name in names if not base.find(name)]
        if not lacking:
            return base
    what = f"tensor {lacking[0]!r} has" if lacking else "its tensors have"
    raise UserError(f"{adapter.file}: {what} no place in this model; the adapter is of another one")


def _expressions(config: ModelConfig) -> Iterator[Mapping[str, Any]]:
    """The config.json of the model in each family that it can be written as, with nothing added."""
    like = nn.abstract(config)[1]
    for kind in FAMILIES:
        try:
            fields = hf_config(config, kind)
            _places(FAMILIES[kind], config, like)
        except UserError:
            continue
        yield fields


def _places(family: Family, config: ModelConfig, params: Params) -> Mapping[str, list[tuple[str, Piece]]]:
    """Tensor name -> our paths and pieces that are made of it. A tensor's own name goes before others' aliases."""
    named: dict[str, list[tuple[str, Piece]]] = {}
    aliased: dict[str, list[tuple[str, Piece]]] = {}
    for path, leaf in flatten(params).items():
        for piece in pieces(family, config, path, leaf.shape):
            named.setdefault(piece.name, []).append((path, piece))
            for alias in piece.tensor.aliases:
                aliased.setdefault(alias, []).append((path, piece))
    return aliased | named


def _untie(family: Family, adapter: Adapter, config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """With a head of its own, equal to the embedding, where the adapter changes one of the two."""
    if not config.tie_embeddings:
        return config, params
    table = family.tensors["embed/table"]
    ends = {family.head, table.named(config), *table.aliases}
    ends |= {name.removeprefix(family.prefix) for name in ends}
    if ends.isdisjoint({f"{module}.weight" for module in adapter.deltas} | set(adapter.own)):
        return config, params
    leaves = flatten(params)
    tied = leaves["embed/table"]
    head = dataclasses.replace(tied, axis=-2) if isinstance(tied, QArray) else dequantize(tied).swapaxes(-1, -2)
    config = dataclasses.replace(config, tie_embeddings=False)
    return config, unflatten(nn.abstract(config)[1], leaves | {"head/kernel": head})


def _part(
    adapter: Adapter, base: _Base, module: str, delta: Delta, path: str, leaf: Leaf, piece: Piece
) -> Delta:
    """The part of a module's delta that falls to one of our parameters."""
    n_in, n_out = leaf.shape[-2:]
    found, due = (len(delta.a), delta.b.shape[1]), (n_in, _outputs(piece, base.config, n_out))
    if found != due or delta.linear == path.endswith("/table"):
        raise UserError(
            f"{adapter.file}: the LoRA tensors of {module!r} are for {found[0]} inputs and {found[1]} outputs, the "
            f"model's are {due[0]} and {due[1]}; the adapter is of another model"
        )
    scale, magnitude = base.scale(piece), delta.magnitude
    b = _cut(piece.tensor.cut, base.config, delta.b.T).T
    magnitude = None if magnitude is None else scale * _cut(piece.tensor.cut, base.config, magnitude)
    return dataclasses.replace(delta, b=b, scale=scale * delta.scale, magnitude=magnitude)


def _stack(leaf: Leaf, parts: list[tuple[Piece, Delta]]) -> LoRA:
    """A leaf from the deltas of its layers; those of lower rank, and layers without, are filled up with zeros."""
    *lead, n_in, n_out = leaf.shape
    rank = max(delta.a.shape[1] for _, delta in parts)
    a, b = np.zeros((*lead, n_in, rank), np.float32), np.zeros((*lead, rank, n_out), np.float32)
    scale, magnitude = np.zeros((*lead, 1, 1), np.float32), None
    if any(delta.magnitude is not None for _, delta in parts):  # of layers without an adapter too
        magnitude = np.array(column_norms(dequantize(leaf, jnp.float32)))
    for piece, delta in parts:
        r = delta.a.shape[1]
        a[piece.at][:, :r], b[piece.at][:r], scale[piece.at] = delta.a, delta.b, delta.scale
        if magnitude is not None:
            magnitude[piece.at] = delta.magnitude
    return LoRA(leaf, *map(jnp.asarray, (a, b, scale)), None if magnitude is None else jnp.asarray(magnitude))


def _replaced(adapter: Adapter, base: _Base, name: str, array: np.ndarray, leaf: Leaf, piece: Piece) -> Leaf:
    """The parameter with one of its pieces taken from the adapter; it is dense then."""
    tensor, shape = piece.tensor, leaf.shape[len(piece.at) :]
    theirs = array.astype(np.float32)
    theirs = theirs[0] if tensor.row and len(theirs) == 1 else theirs
    theirs = theirs.T if tensor.transposed else theirs
    due = (*shape[:-1], _outputs(piece, base.config, shape[-1]))
    if theirs.shape != due:
        due = due[::-1] if tensor.transposed else due
        raise UserError(f"{adapter.file}: tensor {name!r} is {list(array.shape)}, the base model's is {list(due)}")
    ours = np.moveaxis(_cut(tensor.cut, base.config, np.moveaxis(theirs, -1, 0)), 0, -1)
    value = jnp.asarray(ours * base.scale(piece) + tensor.offset, leaf.dtype)
    return (dequantize(leaf) if is_leaf(leaf) else leaf).at[piece.at].set(value) if piece.at else value


def _cut(cut: Cut | None, config: ModelConfig, outputs_first: np.ndarray) -> np.ndarray:
    """Our rows of a tensor that may be fused."""
    return outputs_first if cut is None else cut.take(config, outputs_first)


def _outputs(piece: Piece, config: ModelConfig, mine: int) -> int:
    """Of the stored tensor of which ``mine`` are ours."""
    return mine if piece.tensor.cut is None else sum(piece.tensor.cut.sizes(config))


# Writing --------------------------------------------------------------------------------------------------------------


def save_adapter(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    fields: Mapping[str, Any] | None = None,
    *,
    base: str = "",
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Writes the ``LoRA`` leaves of a model as a PEFT directory, which PEFT puts on the base model of that family.

    Args:
        directory: made, with its parents; where it exists it must be empty or hold an adapter.
        config, params: the model. Leaves that are not ``LoRA`` are not written.
        fields: those of the base model's config.json; by default of the first family it can be (see ``hf_export``).
        base: where the base model is: a directory, or ``hf://org/name``, maybe with ``@revision``.
        tokenizer: is written beside it.

    Parameters that are one tensor of the family, such as GPT-2's queries, keys and values, share one A; where theirs
    differ, the tensor gets the sum of their ranks. UserError where nothing is adapted, or no family fits.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not (directory / CONFIG).is_file() and any(directory.iterdir()):
        raise UserError(f"{directory} exists and is not an adapter directory; choose another")
    if fields is None:
        fields = express(config, exactly=False)
        if fields is None:
            raise UserError(f"no family of transformers can be this {config.kind} model, so an adapter has no names")
    family = family_of(fields)
    base_model = _Base(family, complete(family, fields), config, params, {})
    modules: dict[str, list[tuple[Piece, Delta]]] = {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, LoRA):
            if isinstance(leaf.base, LoRA):
                raise UserError(f"{path} has two adapters, one upon the other; merge the first before saving")
            for piece in pieces(family, config, path, leaf.shape):
                delta = _used(leaf, piece, base_model.scale(piece), linear=not path.endswith("/table"))
                if delta is not None:
                    modules.setdefault(piece.name.removesuffix(".weight"), []).append((piece, delta))
    if not modules:
        raise UserError("no parameter of this model has an adapter; there is nothing to save")
    base, _, revision = base.removeprefix("hf://").partition("@") if base.startswith("hf://") else (base, "", "")
    settings = {
        "base_model_name_or_path": base, "revision": revision or None,
        "task_type": "CAUSAL_LM" if config.kind == "decoder" else "SEQ_2_SEQ_LM",
        "fan_in_fan_out": any(
            delta.linear and not piece.tensor.transposed for parts in modules.values() for piece, delta in parts
        ),
    }
    write_adapter(directory, settings, {module: _joined(config, parts) for module, parts in modules.items()}, tokenizer)
    return directory


def _used(leaf: LoRA, piece: Piece, scale: float, *, linear: bool) -> Delta | None:
    """The delta of one layer without what fills it up; None where it has none."""
    a, b, ours = (np.asarray(part[piece.at], np.float32) for part in (leaf.a, leaf.b, leaf.scale))
    used = np.flatnonzero(a.any(0) | b.any(1))
    if not len(used):
        return None
    rank = used[-1] + 1
    magnitude = None if leaf.magnitude is None else np.asarray(leaf.magnitude[piece.at], np.float32)[0] / scale
    return Delta(a[:, :rank], b[:rank], float(ours[0, 0]) / scale, linear, magnitude)


def _joined(config: ModelConfig, parts: list[tuple[Piece, Delta]]) -> Delta:
    """The delta of a tensor of the family from those of the parameters that are cut from it."""
    first, delta = parts[0]
    if first.tensor.cut is None:
        return delta
    one = all(np.array_equal(each.a, delta.a) and each.scale == delta.scale for _, each in parts)
    a = delta.a if one else np.concatenate([each.a for _, each in parts], 1)
    b = np.zeros((sum(first.tensor.cut.sizes(config)), a.shape[1]), np.float32)
    magnitude = None if delta.magnitude is None else np.full(len(b), np.nan, np.float32)
    start = 0
    for piece, each in parts:
        rank = each.a.shape[1]
        rows = _cut(piece.tensor.cut, config, np.arange(len(b)))
        if magnitude is not None:
            magnitude[rows] = each.magnitude
        b[rows, start : start + rank] = each.b.T if one else each.b.T * each.scale
        start += 0 if one else rank
    if magnitude is not None and np.isnan(magnitude).any():
        raise UserError(f"{first.name} is fused in this family, and DoRA adapts a part of it; let its target match all")
    return Delta(a, b.T, delta.scale if one else 1.0, delta.linear, magnitude)
