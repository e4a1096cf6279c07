"""LoRA adapters (arXiv:2106.09685) in the format of PEFT: applying them to a model, and saving those of a model.

An adapter names tensors as the Hugging Face family of its base model does, and the table of the family says to which
parameters they belong here. The deltas of all layers become one leaf of a stack (``core.leaves.LoRA``), with zeros for
layers that have none.
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
from jaxlm.hf.config import family_of, with_defaults
from jaxlm.hf.families.fields import Family, FusedSlice
from jaxlm.hf.families.registry import FAMILIES
from jaxlm.hf.peft.adapter_files import ADAPTER_CONFIG, Adapter, LoraDelta, read_adapter, write_adapter
from jaxlm.hf.tensor_map import HfTensor, tensors_of_param
from jaxlm.hf.writer import simplest_hf_config, to_hf_config
from jaxlm.nn.config import ModelConfig

__all__ = ["ADAPTER_CONFIG", "Adapter", "LoraDelta", "apply_adapter", "read_adapter", "save_adapter"]

_TABLES = ("embed/table", "src_embed/table", "head/kernel")  # parameters with a row (or column) for each token
_BIASES = ("logits_bias", "head/bias")

# Applying -------------------------------------------------------------------------------------------------------------


def apply_adapter(
    adapter: Adapter, config: ModelConfig, params: Params, fields: Mapping[str, Any] | None = None
) -> tuple[ModelConfig, Params]:
    """The model with an adapter in ``LoRA`` leaves, which ``core.leaves.merge_adapters`` merges.

    Tied embeddings become two parameters where the adapter changes only the embedding or only the output head, or both
    in different ways, because PEFT computes that. Where its tables have another number of rows, the model gets as many
    tokens. The result is on no mesh.

    Args:
        adapter: the adapter.
        config, params: the base model.
        fields: the fields of its config.json. Without them, the family is one that can hold the model and that has a
            place for every tensor of the adapter.

    Raises:
        UserError: the adapter belongs to another model; the message names the tensor.
    """
    adapter, base = _base_model(adapter, config, params, fields)
    base = _resized(adapter, base)
    leaves = flatten(base.params)
    for name, array in {**adapter.base_layer_tensors, **adapter.saved_modules}.items():
        for path, tensor in base.find(name):
            leaves[path] = _replace_slice(adapter, base, name, array, leaves[path], tensor)
    deltas: dict[str, list[tuple[HfTensor, LoraDelta]]] = {}
    for module, delta in adapter.deltas.items():
        for path, tensor in base.find(f"{module}.weight"):
            part = _slice_delta(adapter, base, module, delta, path, leaves[path], tensor)
            deltas.setdefault(path, []).append((tensor, part))
    leaves |= {path: _stack(leaves[path], parts) for path, parts in deltas.items()}
    return base.config, unflatten(base.params, leaves)


@dataclass(frozen=True)
class _BaseModel:
    """A model as one of its Hugging Face family.

    - ``hf_fields`` are the fields of its config.json, defaults included.
    - ``targets`` maps names of tensors to the parameters of ours that they fill, by path and part.
    """

    family: Family
    hf_fields: Mapping[str, Any]
    config: ModelConfig
    params: Params
    targets: Mapping[str, list[tuple[str, HfTensor]]]

    def find(self, name: str) -> list[tuple[str, HfTensor]]:
        """The parameters that a tensor fills; none where the model has no such tensor. The name may lack the prefix of
        the family."""
        return self.targets.get(name) or self.targets.get(self.family.prefix + name, [])

    def scale(self, tensor: HfTensor) -> float:
        return 1.0 if tensor.spec.scale is None else tensor.spec.scale(self.hf_fields)


def _base_model(
    given: Adapter, config: ModelConfig, params: Params, fields: Mapping[str, Any] | None
) -> tuple[Adapter, _BaseModel]:
    """The model as one of the first family that has a place for every name of the adapter, with untied embeddings where
    the adapter asks for them; and the adapter, without an output head that stays tied."""
    lacking: list[str] = []
    known = fields is not None and fields.get("model_type") in FAMILIES
    for candidate in [fields] if known else _possible_configs(config):
        family = FAMILIES[candidate["model_type"]]
        adapter, *untied = _untied(family, given, config, params)
        base = _BaseModel(family, with_defaults(candidate), *untied, _targets(family, *untied))
        names = [f"{module}.weight" for module in adapter.deltas]
        lacking = [
            name for name in (*names, *adapter.base_layer_tensors, *adapter.saved_modules) if not base.find(name)
        ]
        if not lacking:
            return adapter, base
    what = f"tensor {lacking[0]!r} has" if lacking else "its tensors have"
    raise UserError(f"{given.file}: {what} no place in this model; the adapter is of another one")


def _possible_configs(config: ModelConfig) -> Iterator[Mapping[str, Any]]:
    """The config.json of the model in each family that can hold it without further parameters."""
    like = nn.abstract(config)[1]
    for model_type in FAMILIES:
        try:
            fields = to_hf_config(config, model_type)
            _targets(FAMILIES[model_type], config, like)
        except UserError:
            continue
        yield fields


def _targets(family: Family, config: ModelConfig, params: Params) -> Mapping[str, list[tuple[str, HfTensor]]]:
    """See ``_BaseModel``. Where a name is also an alias of another tensor, the name counts."""
    named: dict[str, list[tuple[str, HfTensor]]] = {}
    aliased: dict[str, list[tuple[str, HfTensor]]] = {}
    for path, leaf in flatten(params).items():
        for tensor in tensors_of_param(family, config, path, leaf.shape):
            named.setdefault(tensor.name, []).append((path, tensor))
            for alias in tensor.spec.aliases:
                aliased.setdefault(alias, []).append((path, tensor))
    return aliased | named


def _untied(
    family: Family, adapter: Adapter, config: ModelConfig, params: Params
) -> tuple[Adapter, ModelConfig, Params]:
    """The adapter, and the model with an output head of its own, equal to the embedding, where the adapter changes one
    of the two. Where it replaces both by the same table, they stay tied, and the adapter loses the head."""
    if not config.tie_embeddings:
        return adapter, config, params
    table = family.tensors["embed/table"]
    names = {family.head, table.name_for(config), *table.aliases}
    names |= {name.removeprefix(family.prefix) for name in names}
    adapted, saved = {f"{module}.weight" for module in adapter.deltas}, names & set(adapter.saved_modules)
    if names.isdisjoint(adapted) and not saved:
        return adapter, config, params
    tables = [adapter.saved_modules[name] for name in saved]
    if names.isdisjoint(adapted) and len(saved) > 1 and all(np.array_equal(tables[0], each) for each in tables[1:]):
        heads = {family.head, family.head.removeprefix(family.prefix)}
        rest = {name: array for name, array in adapter.saved_modules.items() if name not in heads}
        return dataclasses.replace(adapter, saved_modules=rest), config, params
    leaves = flatten(params)
    tied = leaves["embed/table"]
    head = dataclasses.replace(tied, axis=-2) if isinstance(tied, QArray) else dequantize(tied).swapaxes(-1, -2)
    config = dataclasses.replace(config, tie_embeddings=False)
    # A table that was saved because it was resized is the base model's, so the other one is the same.
    resized = names & set(adapter.base_layer_tensors)
    if len(resized) == 1:
        array = adapter.base_layer_tensors[next(iter(resized))]
        both = dict.fromkeys((table.name_for(config), family.head), array)
        adapter = dataclasses.replace(adapter, base_layer_tensors={**both, **adapter.base_layer_tensors})
    return adapter, config, unflatten(nn.abstract(config)[1], leaves | {"head/kernel": head})


def _resized(adapter: Adapter, base: _BaseModel) -> _BaseModel:
    """The model with as many tokens as the adapter's tables have rows. Those that it must bring are zeros for now.

    Raises:
        UserError: the adapter lacks one of the tables, or they have different numbers of rows.
    """
    rows = {}  # by parameter
    for name, array in {**adapter.base_layer_tensors, **adapter.saved_modules}.items():
        rows |= {path: (len(array), name) for path, _ in base.find(name) if path in _TABLES and array.ndim == 2}
    counts = {count for count, _ in rows.values()}
    old = {path: flatten(base.params)[path].shape for path in rows}
    if all(old[path][0 if path.endswith("/table") else -1] == count for path, (count, _) in rows.items()):
        return base
    if len(counts) > 1:
        said = ", ".join(f"{name} {count}" for count, name in rows.values())
        raise UserError(f"{adapter.file}: its tables have different numbers of rows ({said}); save it again")
    changes = {"vocab_size": counts.pop()}
    if "src_embed/table" in rows:
        changes["src_vocab_size"] = changes["vocab_size"]
    config = dataclasses.replace(base.config, **changes)
    leaves, like = flatten(base.params), nn.abstract(config)[1]
    for path, leaf in flatten(like).items():
        have = leaves[path]
        if have.shape != leaf.shape and path in _BIASES:  # transformers appends zeros
            kept = have[..., : leaf.shape[-1]]
            leaves[path] = jnp.pad(kept, [(0, 0)] * (kept.ndim - 1) + [(0, leaf.shape[-1] - kept.shape[-1])])
        elif have.shape != leaf.shape:
            if path not in rows:
                name = next(name for name, found in base.targets.items() if any(path == each for each, _ in found))
                raise UserError(
                    f"{adapter.file}: its tables are for {config.vocab_size} tokens, {name!r} of the base model is for "
                    f"{base.config.vocab_size} and is not among them; train it with both tables in modules_to_save"
                )
            leaves[path] = jnp.zeros(leaf.shape, have.dtype)
    params = unflatten(like, leaves)
    return dataclasses.replace(base, config=config, params=params, targets=_targets(base.family, config, params))


def _slice_delta(
    adapter: Adapter, base: _BaseModel, module: str, delta: LoraDelta, path: str, leaf: Leaf, tensor: HfTensor
) -> LoraDelta:
    """The part of a module's delta that belongs to one of our parameters."""
    n_in, n_out = leaf.shape[-2:]
    found, expected = (len(delta.a), delta.b.shape[1]), (n_in, _num_outputs(tensor, base.config, n_out))
    if found != expected or delta.linear == path.endswith("/table"):
        raise UserError(
            f"{adapter.file}: the LoRA tensors of {module!r} are for {found[0]} inputs and {found[1]} outputs, the "
            f"model's are {expected[0]} and {expected[1]}; the adapter is of another model"
        )
    scale, magnitude = base.scale(tensor), delta.magnitude
    b = _extract(tensor.spec.fused, base.config, delta.b.T).T
    magnitude = None if magnitude is None else scale * _extract(tensor.spec.fused, base.config, magnitude)
    return dataclasses.replace(delta, b=b, scale=scale * delta.scale, magnitude=magnitude)


def _stack(leaf: Leaf, parts: list[tuple[HfTensor, LoraDelta]]) -> LoRA:
    """A LoRA leaf from the deltas of its layers, with zeros for lower ranks and for layers without a delta."""
    *lead, n_in, n_out = leaf.shape
    rank = max(delta.a.shape[1] for _, delta in parts)
    a, b = np.zeros((*lead, n_in, rank), np.float32), np.zeros((*lead, rank, n_out), np.float32)
    scale, magnitude = np.zeros((*lead, 1, 1), np.float32), None
    if any(delta.magnitude is not None for _, delta in parts):  # layers without a delta need their norms too
        magnitude = np.array(column_norms(dequantize(leaf, jnp.float32)))
    for tensor, delta in parts:
        r, index = delta.a.shape[1], tensor.index
        a[index][:, :r], b[index][:r], scale[index] = delta.a, delta.b, delta.scale
        if magnitude is not None:
            magnitude[index] = delta.magnitude
    return LoRA(leaf, *map(jnp.asarray, (a, b, scale)), None if magnitude is None else jnp.asarray(magnitude))


def _replace_slice(
    adapter: Adapter, base: _BaseModel, name: str, array: np.ndarray, leaf: Leaf, tensor: HfTensor
) -> Leaf:
    """The parameter, made dense, with the part that a tensor fills taken from the adapter."""
    spec, shape = tensor.spec, leaf.shape[len(tensor.index) :]
    stored = array.astype(np.float32)
    stored = stored[0] if spec.as_row and len(stored) == 1 else stored
    stored = stored.T if spec.transposed else stored
    expected = (*shape[:-1], _num_outputs(tensor, base.config, shape[-1]))
    if stored.shape != expected:
        expected = expected[::-1] if spec.transposed else expected
        raise UserError(
            f"{adapter.file}: tensor {name!r} is {list(array.shape)}, the base model's is {list(expected)}"
        )
    part = np.moveaxis(_extract(spec.fused, base.config, np.moveaxis(stored, -1, 0)), 0, -1)
    value = jnp.asarray(part * base.scale(tensor) + spec.offset, leaf.dtype)
    return (dequantize(leaf) if is_leaf(leaf) else leaf).at[tensor.index].set(value) if tensor.index else value


def _extract(fused: FusedSlice | None, config: ModelConfig, outputs_first: np.ndarray) -> np.ndarray:
    """The rows of one parameter in a stored tensor, which may fuse several."""
    return outputs_first if fused is None else fused.extract(config, outputs_first)


def _num_outputs(tensor: HfTensor, config: ModelConfig, n_out: int) -> int:
    """The number of outputs of the stored tensor; ``n_out`` of them belong to one parameter."""
    return n_out if tensor.spec.fused is None else sum(tensor.spec.fused.sizes(config))


# Saving ---------------------------------------------------------------------------------------------------------------


def save_adapter(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    fields: Mapping[str, Any] | None = None,
    *,
    base: str = "",
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Writes the ``LoRA`` leaves of a model as a PEFT directory, which PEFT applies to the base model of that family.

    Parameters that are one tensor of the family, such as the queries, keys and values of GPT-2, share one A there.
    Where they have different ones here, the tensor gets the sum of their ranks.

    Args:
        directory: is created, with its parents; where it exists it must be empty or hold an adapter.
        config, params: the model. Leaves that are not ``LoRA`` are not written.
        fields: the fields of the base model's config.json; by default of the simplest family that can hold the model.
        base: where the base model is: a directory, or ``hf://org/name``, maybe with ``@revision``.
        tokenizer: is written beside the adapter.

    Returns:
        The directory.

    Raises:
        UserError: no parameter has an adapter, or no family can hold the model.
    """
    directory = Path(directory).expanduser()
    if directory.is_dir() and any(directory.iterdir()) and not (directory / ADAPTER_CONFIG).is_file():
        raise UserError(f"{directory} exists and is not an adapter directory; choose another")
    if fields is None:
        fields = simplest_hf_config(config, exact=False)
        if fields is None:
            raise UserError(f"no family of transformers can be this {config.kind} model, so an adapter has no names")
    family = family_of(fields)
    modules = _deltas_by_module(_BaseModel(family, with_defaults(fields), config, params, {}))
    if not modules:
        raise UserError("no parameter of this model has an adapter; there is nothing to save")
    base, _, revision = base.removeprefix("hf://").partition("@") if base.startswith("hf://") else (base, "", "")
    settings = {
        "base_model_name_or_path": base, "revision": revision or None,
        "task_type": "CAUSAL_LM" if config.kind == "decoder" else "SEQ_2_SEQ_LM",
        "fan_in_fan_out": any(
            delta.linear and not tensor.spec.transposed for parts in modules.values() for tensor, delta in parts
        ),
    }
    write_adapter(directory, settings, {module: _fuse(config, parts) for module, parts in modules.items()}, tokenizer)
    return directory


def _deltas_by_module(base: _BaseModel) -> dict[str, list[tuple[HfTensor, LoraDelta]]]:
    """The deltas of a model's ``LoRA`` leaves, by the names of the family's modules that they belong to."""
    modules: dict[str, list[tuple[HfTensor, LoraDelta]]] = {}
    for path, leaf in flatten(base.params).items():
        if isinstance(leaf, LoRA):
            if isinstance(leaf.base, LoRA):
                raise UserError(f"{path} has two adapters, one upon the other; merge the first before saving")
            for tensor in tensors_of_param(base.family, base.config, path, leaf.shape):
                delta = _delta_of_layer(leaf, tensor, base.scale(tensor), linear=not path.endswith("/table"))
                if delta is not None:
                    modules.setdefault(tensor.name.removesuffix(".weight"), []).append((tensor, delta))
    return modules


def _delta_of_layer(leaf: LoRA, tensor: HfTensor, scale: float, *, linear: bool) -> LoraDelta | None:
    """The delta of one layer without the zeros that pad its rank; None where the layer has none."""
    a, b, scales = (np.asarray(part[tensor.index], np.float32) for part in (leaf.a, leaf.b, leaf.scale))
    used = np.flatnonzero(a.any(0) | b.any(1))
    if not len(used):
        return None
    rank = used[-1] + 1
    magnitude = leaf.magnitude
    magnitude = None if magnitude is None else np.asarray(magnitude[tensor.index], np.float32)[0] / scale
    return LoraDelta(a[:, :rank], b[:rank], float(scales[0, 0]) / scale, linear, magnitude)


def _fuse(config: ModelConfig, parts: list[tuple[HfTensor, LoraDelta]]) -> LoraDelta:
    """The delta of a stored tensor from those of the parameters that it fuses."""
    first, delta = parts[0]
    fused = first.spec.fused
    if fused is None:
        return delta
    shared = all(np.array_equal(each.a, delta.a) and each.scale == delta.scale for _, each in parts)
    a = delta.a if shared else np.concatenate([each.a for _, each in parts], 1)
    b = np.zeros((sum(fused.sizes(config)), a.shape[1]), np.float32)
    magnitude = None if delta.magnitude is None else np.full(len(b), np.nan, np.float32)
    start = 0
    for tensor, each in parts:
        rank = each.a.shape[1]
        rows = _extract(tensor.spec.fused, config, np.arange(len(b)))
        if magnitude is not None:
            magnitude[rows] = each.magnitude
        b[rows, start : start + rank] = each.b.T if shared else each.b.T * each.scale
        start += 0 if shared else rank
    if magnitude is not None and np.isnan(magnitude).any():
        raise UserError(f"{first.name} is fused in this family, and DoRA adapts a part of it; let its target match all")
    return LoraDelta(a, b.T, delta.scale if shared else 1.0, delta.linear, magnitude)
