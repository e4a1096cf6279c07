"""Reading a Hugging Face model directory by the table of its family (``jaxlm.hf.families.registry``)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm import nn
from jaxlm.core.config import current_names, from_dict, to_dict
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import is_leaf
from jaxlm.core.sharding import shardings
from jaxlm.core.tree import Leaf, Params, flatten, unflatten
from jaxlm.hf.assemble import assemble, copy
from jaxlm.hf.families.fields import REQUIRED, Family, Tensor
from jaxlm.hf.families.registry import FAMILIES, NEUTRAL
from jaxlm.hf.quantized.coded_leaves import coded_leaf, dense_part, outputs_first, split_layer_groups
from jaxlm.hf.quantized.layouts import open_weights
from jaxlm.hf.quantized.matrices import Matrix, MatrixFiles
from jaxlm.hf.validate import check_sizes, layer_counts
from jaxlm.nn.config import DecoderConfig, ModelConfig
from jaxlm.nn.stack import layer_groups_of

__all__ = [
    "RUNTIME", "complete", "convert_config", "family_of", "layer_path", "ours", "pieces", "read_config", "read_hf",
]

# Fields of ours that belong to training or to a process, not to the model: kept beside the family's own.
RUNTIME = (
    "dtype", "kv_cache", "scan_layers", "remat", "ring_min_keys", "microbatches", "expert_routing", "capacity_factor",
    "dropout", "attention_dropout", "ffn_dropout", "layer_groups", "encoder_layer_groups", "decoder_layer_groups",
)
_LAYERS = re.compile(r"(.*?)layers/(\d+)/(.*)")


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a model whose config.json holds ``fields``.

    UserError where the family is unknown, or a field may change results in a way that is not understood.
    """
    return _with_runtime(convert_config(family_of(fields), fields), ours(fields).get("runtime", {}))


def read_hf(
    directory: Path, fields: Mapping[str, Any], config: ModelConfig, *, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, Params, dict[str, Any]]:
    """Configuration, untied where the file has a head of its own, parameters of a directory, and facts about them.

    ``fields`` are those of its config.json and ``config`` what they say (``read_config``). Each tensor is read once, on
    a mesh each device's part by itself, and put where it belongs on the device: this process's memory holds at most one
    tensor besides the parameters. Quantized matrices stay so, and layers quantized in another way than their neighbours
    become layer groups of their own. The facts are ``bytes_on_disk`` (of the weights), ``tensor_bytes`` (of each parameter)
    and ``notes``.

    UserError where a tensor is missing, superfluous or of the wrong shape.
    """
    family = family_of(fields)
    files, notes = open_weights(directory, fields.get("quantization_config"))
    for name in layer_counts(config):
        count = getattr(config, name)
        if count > len(files):  # before they are listed and traced one by one
            raise UserError(f"{directory / 'config.json'}: {name} is {count}, but the files hold {len(files)} tensors")
    files = _Prefixed(family, files)
    config = _untie(family, config, files)
    like, rows = _plan(family, config, files)
    if files.files.matrices and (split := split_layer_groups(config, _grids(files, rows))) != config:
        config = split
        like, rows = _plan(family, config, files)
    values, flat = complete(family, fields), flatten(like)
    targets = flatten(shardings(like, mesh)) if mesh is not None else dict.fromkeys(flat)
    leaves = {
        path: _leaf(files, config, values, path, rows[path], leaf.shape, targets[path], jnp.dtype(dtype))
        for path, leaf in flat.items()
    }
    mixed = [path for path, found in rows.items() if not is_leaf(leaves[path]) and any(map(files.matrix, found))]
    mixed = [path for path in mixed if all((m := files.matrix(piece)) and m.grid for piece in rows[path])]
    notes += [f"{path} is read as dense: its experts are quantized in different ways" for path in mixed]
    params = unflatten(like, leaves)
    if mesh is not None and files.files.matrices:
        params = jax.device_put(params, shardings(params, mesh))
    sizes = {path: _bytes(files, found, flat[path].shape) for path, found in rows.items()}
    return config, params, {"bytes_on_disk": files.files.nbytes, "tensor_bytes": sizes, "notes": notes}


def ours(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What we wrote into a config.json beside the family's fields."""
    added = fields.get("jaxlm")
    return added if isinstance(added, dict) else {}


def _with_runtime(config: ModelConfig, runtime: Mapping[str, Any]) -> ModelConfig:
    """The configuration with the fields of ``RUNTIME`` as they were saved."""
    runtime = current_names(runtime, RUNTIME) if isinstance(runtime, dict) else runtime
    if not isinstance(runtime, dict) or not set(runtime) <= set(RUNTIME):
        raise UserError(f"jaxlm: runtime = {runtime!r} is not understood; remove it")
    config = from_dict(type(config), to_dict(config) | runtime)
    check_sizes(config)
    return config


def family_of(fields: Mapping[str, Any]) -> Family:
    """The family of a config.json. UserError if there is none."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def complete(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the family reads, defaults in place of absent ones."""
    known = {name: default for field in family.fields for name, default in field.theirs.items()}
    return {name: fields.get(name, None if default is REQUIRED else default) for name, default in known.items()}


def convert_config(family: Family, fields: Mapping[str, Any]) -> ModelConfig:
    """Our configuration from the fields of a config.json. UserError on one that is not understood."""
    values = complete(family, fields)
    for name, value in sorted(fields.items()):
        if value is not None and name not in values and name not in NEUTRAL and name not in family.ignored:
            raise UserError(f"{name} = {value!r} is not known, and might change what the model computes")
    ours: dict[str, Any] = {}
    for field in family.fields:
        try:
            ours |= field.read({name: fields.get(name, default) for name, default in field.theirs.items()})
        except UserError:
            raise
        except (TypeError, ValueError, OverflowError, ZeroDivisionError):
            given = ", ".join(f"{name} = {fields[name]!r}" for name in field.theirs if name in fields)
            raise UserError(f"{given} makes no sense in a configuration of this model_type") from None
    config = _typed(family.config, ours | _special_ids(family, fields))
    check_sizes(config)
    return config


def _typed(cls: type, ours: Mapping[str, Any]) -> ModelConfig:
    """The configuration, with the types of its fields checked."""
    plain = {name: to_dict(value) if dataclasses.is_dataclass(value) else value for name, value in ours.items()}
    try:
        return from_dict(cls, plain)
    except UserError as error:
        raise UserError(f"a field has a value of the wrong type: {error}") from None


def _special_ids(family: Family, fields: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens; of several end tokens the first. A model without padding pads with its end token; an
    encoder-decoder begins with what config.json names for that, else with padding (as T5 does)."""
    ids = {}
    for role in ("bos", "eos"):
        value = fields.get(f"{role}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            ids[f"{role}_id"] = value
    pad = fields.get("pad_token_id")
    pad = pad if isinstance(pad, int) and pad >= 0 else ids.get("eos_id", 0)
    if not issubclass(family.config, DecoderConfig):
        start = fields.get("decoder_start_token_id")
        ids["bos_id"] = start if isinstance(start, int) else pad
    return ids | {"pad_id": pad}


# Tensors --------------------------------------------------------------------------------------------------------------


class _Prefixed:
    """The files of a model, whose names may lack the prefix of its family."""

    def __init__(self, family: Family, files: MatrixFiles):
        self.files = files
        prefix = family.prefix
        self.bare = bool(prefix) and not any(name.startswith(prefix) for name in files)
        self.prefix = prefix

    def name(self, name: str, aliases: tuple[str, ...] = ()) -> str:
        """The name that the file has, of several."""
        options = [each.removeprefix(self.prefix) if self.bare else each for each in (name, *aliases)]
        return next((each for each in options if each in self.files), options[0])

    def matrix(self, piece: Piece) -> Matrix | None:
        """The quantized matrix that a piece is, if it is one."""
        return self.files.matrices.get(self.name(piece.name, piece.tensor.aliases))

    def known(self, name: str) -> bool:
        return self.name(name) in self.files


@dataclass(frozen=True)
class Piece:
    """A tensor of the file and where it goes in a parameter: the whole, or a layer's or an expert's part."""

    tensor: Tensor
    name: str
    at: tuple[int, ...]
    layer: int | None


def pieces(family: Family, config: ModelConfig, path: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """What a parameter of ours is made of. UserError if the family has nothing of the kind."""
    match = _LAYERS.fullmatch(path)
    key = path if match is None else f"{match[1]}layers/{match[3]}"
    if key not in family.tensors:
        raise UserError(f"models of this model_type have no {key}; its config.json asks for one")
    tensor = family.tensors[key]
    name = tensor.named(config)
    if match is None:
        yield Piece(tensor, name, (), None)
        return
    layers = layer_groups_of(config, match[1].rstrip("/"))[int(match[2])]
    for i, layer in enumerate(layers):
        if name.count("{}") == 1:
            yield Piece(tensor, name.format(layer), (i,), layer)
        else:
            for expert in range(shape[1]):
                yield Piece(tensor, name.format(layer, expert), (i, expert), layer)


def layer_path(path: str) -> tuple[str, str]:
    """``decoder/layers/1/attn/q/kernel`` as (``decoder/``, ``attn/q/kernel``)."""
    match = _LAYERS.fullmatch(path)
    return match[1], match[3]


def _untie(family: Family, config: ModelConfig, files: _Prefixed) -> ModelConfig:
    """A head of its own in the file unties the embeddings, whatever config.json says: so does transformers."""
    if not config.tie_embeddings or not files.known(family.head):
        return config
    table = family.tensors["embed/table"]
    table_name = files.name(table.named(config), table.aliases)
    if table_name not in files.files or files.name(family.head) == table_name:
        return config
    shape = (config.vocab_size, config.width)
    names = (files.name(family.head), table_name)
    same = np.array_equal(*(files.files.view(name, shape) for name in names))
    for name in names:
        files.files.release(name)
    return config if same else dataclasses.replace(config, tie_embeddings=False)


def _plan(family: Family, config: ModelConfig, files: _Prefixed) -> tuple[Params, dict[str, list[Piece]]]:
    """The abstract parameters, and what each is made of."""
    like = nn.abstract(config)[1]
    return like, _find(family, config, files, {path: leaf.shape for path, leaf in flatten(like).items()})


def _grids(files: _Prefixed, rows: Mapping[str, list[Piece]]) -> dict[tuple[str, int], list[Any]]:
    """For each side and layer, how its parameters are quantized."""
    grids: dict[tuple[str, int], list[Any]] = {}
    for path, found in rows.items():
        if found[0].layer is not None:
            side, rest = layer_path(path)
            for piece in found:
                matrix = files.matrix(piece)
                grid = (rest, piece.at[1:], None if matrix is None else matrix.grid)
                grids.setdefault((side, piece.layer), []).append(grid)
    return {place: sorted(grid, key=repr) for place, grid in grids.items()}


def _bytes(files: _Prefixed, found: list[Piece], shape: tuple[int, ...]) -> int:
    """What a parameter takes in the files: of tensors that it is cut from, its share."""
    total = 0
    for piece in found:
        name = files.name(piece.name, piece.tensor.aliases)
        whole = math.prod(files.files.shape(name))
        total += files.files.size(name) * math.prod(shape[len(piece.at) :]) // max(whole, 1)
    return total


def _find(
    family: Family, config: ModelConfig, files: _Prefixed, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Piece]]:
    """What each parameter is made of. UserError unless all of it is there, of its shape, and nothing else.

    Stops at the first piece that is wrong, and nothing is allocated before: sizes in a config.json are only claims.
    """
    rows: dict[str, list[Piece]] = {}
    wanted = set()
    for path, shape in shapes.items():
        rows[path] = []
        for piece in pieces(family, config, path, shape):
            name = files.name(piece.name, piece.tensor.aliases)
            found, due = files.files.shape(name), _stored(config, piece.tensor, shape[len(piece.at) :])
            if files.matrix(piece) is not None and not outputs_first(path, piece.tensor):
                due = due[::-1]
            if found != due:
                file = files.files.file(name)
                raise UserError(f"{file}: tensor {name!r} is {list(found)}, by config.json it should be {list(due)}")
            rows[path].append(piece)
            wanted.add(name)
    unused = [re.compile(pattern) for pattern in family.unused]
    if config.tie_embeddings:
        unused.append(re.compile(re.escape(family.head)))
    for name in files.files:
        whole = files.prefix + name if files.bare else name
        if name not in wanted and not any(each.fullmatch(whole) or each.fullmatch(name) for each in unused):
            raise UserError(f"{files.files.file(name)}: tensor {name!r} has no place in a model of this config.json")
    return rows


def _stored(config: ModelConfig, tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of a tensor of which ours has this shape."""
    stored = shape[::-1] if tensor.transposed else shape
    if tensor.cut is not None:
        outputs = (sum(tensor.cut.sizes(config)),)
        stored = outputs + stored[1:] if tensor.transposed else stored[:-1] + outputs
    return (1, *stored) if tensor.row else stored


def _leaf(files, config, values, path: str, found: list[Piece], shape, target: NamedSharding | None, dtype) -> Leaf:
    """A parameter, from its pieces. Without a target it is not bound to a device."""
    matrices = [(piece.tensor, files.matrix(piece)) for piece in found]
    if None not in {matrix and matrix.grid for _, matrix in matrices} and len({m.grid for _, m in matrices}) == 1:
        return coded_leaf(config, values, path, shape[: len(found[0].at)], matrices)
    fills = {piece.at: partial(_fill, files, config, values, path, piece, shape[len(piece.at) :]) for piece in found}
    return assemble(shape, dtype, fills, target)


def _fill(
    files: _Prefixed, config: ModelConfig, values, path: str, piece: Piece, shape: tuple[int, ...],
    out: np.ndarray, index: tuple[slice, ...],
) -> None:
    """Writes what the index gives of a piece, which has this shape."""
    tensor, name = piece.tensor, files.name(piece.name, piece.tensor.aliases)
    index = tuple(slice(*each.indices(size)) for each, size in zip(index, shape, strict=True))
    stored = index[::-1] if tensor.transposed else index
    axis = 0 if tensor.transposed else len(shape) - 1  # of the outputs
    if (matrix := files.matrix(piece)) is not None:
        array = dense_part(config, tensor, matrix)
        array = (array if outputs_first(path, tensor) else array.T)[stored]
    elif tensor.cut is not None and tensor.cut.by_head:
        whole = np.moveaxis(files.files.read_slice(name, ()), axis, 0)
        array = np.moveaxis(tensor.cut.take(config, whole), 0, axis)[stored]
    else:
        start = 0 if tensor.cut is None else sum(tensor.cut.sizes(config)[: tensor.cut.index])
        outputs = slice(start + stored[axis].start, start + stored[axis].stop)
        stored = (*stored[:axis], outputs, *stored[axis + 1 :])
        array = files.files.read_slice(name, (slice(0, 1), *stored) if tensor.row else stored)
        array = array[0] if tensor.row else array
    array = array.T if tensor.transposed else array
    scale = 1.0 if tensor.scale is None else tensor.scale(values)
    if scale != 1.0 or tensor.offset:
        array = array.astype(np.float32) * np.float32(scale) + np.float32(tensor.offset)
    copy(out, array)
    files.files.release(name)
