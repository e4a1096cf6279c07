"""Reading the weights of a Hugging Face model directory, by the table of its family (``hf.families.registry``)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import is_leaf
from jaxlm.core.sharding import shardings
from jaxlm.core.tree import Leaf, Params, flatten, unflatten
from jaxlm.hf.assemble import assemble_array, copy_into
from jaxlm.hf.config import family_of, with_defaults
from jaxlm.hf.families.fields import Family, TensorSpec
from jaxlm.hf.families.known_fields import config_notes
from jaxlm.hf.quantized.layouts import open_weights
from jaxlm.hf.quantized.matrix import QuantizedMatrix, QuantizedTensorFiles
from jaxlm.hf.quantized.qarrays import dense_slice, outputs_first, split_layer_groups, stack_matrices
from jaxlm.hf.tensor_map import HfTensor, buffers_of, split_layer_path, tensors_of_param
from jaxlm.hf.validate import layer_count_fields
from jaxlm.hf.wrappers import Wrapper
from jaxlm.nn.config import ModelConfig

__all__ = ["read_hf_model"]


def read_hf_model(
    directory: Path, fields: Mapping[str, Any], config: ModelConfig, *, mesh: Mesh | None = None,
    dtype: str = "float32", wrapper: Wrapper | None = None,
) -> tuple[ModelConfig, Params, dict[str, Any]]:
    """Reads the weights of a directory.

    Each tensor is read once, on a mesh each device's part by itself, and put where it belongs on the device: the memory
    of this process holds at most one tensor besides the parameters. Quantized matrices keep their codes. Layers that
    are quantized in another way than their neighbours become layer groups of their own.

    Args:
        directory: has the weights.
        fields: the fields of its config.json.
        config: the configuration that ``hf.config.read_config`` made of them.
        mesh: where the parameters go; None leaves them on the default device.
        dtype: the type of dense parameters.
        wrapper: what the model is the text model of; its other parts are left out, with a note.

    Returns:
        The configuration (untied where the file has an output head that differs from its embedding), the parameters,
        and facts about them: ``bytes_on_disk`` (all weights), ``tensor_bytes`` (of each parameter) and ``notes``.

    Raises:
        UserError: a tensor is missing, superfluous or of the wrong shape.
    """
    family = family_of(fields)
    files, notes = open_weights(directory, fields.get("quantization_config"))
    notes = config_notes(fields, with_defaults(fields)) + notes
    for name in layer_count_fields(config):
        count = getattr(config, name)
        if count > len(files):  # a claim that no file can meet, found before the layers are listed and traced
            raise UserError(f"{directory / 'config.json'}: {name} is {count}, but the files hold {len(files)} tensors")
    named = _FamilyFiles(family, files, wrapper)
    if left_out := sorted({part for name in files if (part := named.other_part(name))}):
        notes.append(f"left out: {', '.join(left_out)}; only the text model is read")
    config = _untied(family, config, named)
    like, sources = _find_sources(family, config, named)
    if files.matrices and (split := split_layer_groups(config, _quantization_by_layer(named, sources))) != config:
        config = split
        like, sources = _find_sources(family, config, named)
    flat = flatten(like)
    targets = flatten(shardings(like, mesh)) if mesh is not None else dict.fromkeys(flat)
    loader = _Loader(named, config, with_defaults(fields), jnp.dtype(dtype))
    leaves = {path: loader.leaf(path, sources[path], leaf.shape, targets[path]) for path, leaf in flat.items()}
    mixed = [path for path, found in sources.items() if not is_leaf(leaves[path]) and any(map(named.matrix, found))]
    mixed = [path for path in mixed if all((m := named.matrix(each)) and m.stack_key for each in sources[path])]
    notes += [f"{path} is read as dense: its experts are quantized in different ways" for path in mixed]
    params = unflatten(like, leaves)
    if mesh is not None and files.matrices:
        params = jax.device_put(params, shardings(params, mesh))
    sizes = {path: _stored_bytes(named, found, flat[path].shape) for path, found in sources.items()}
    return config, params, {"bytes_on_disk": files.nbytes, "tensor_bytes": sizes, "notes": notes}


class _FamilyFiles:
    """The tensors of a model under the names of its family: files may lack the family's prefix, or use aliases."""

    def __init__(self, family: Family, files: QuantizedTensorFiles, wrapper: Wrapper | None):
        self.files, self.wrapper = files, wrapper
        self.prefix = family.prefix
        self.lacks_prefix = bool(self.prefix) and not any(name.startswith(self.prefix) for name in files)

    def name(self, name: str, aliases: tuple[str, ...] = ()) -> str:
        """The one of several names that the files have; the first if they have none."""
        options = [each.removeprefix(self.prefix) if self.lacks_prefix else each for each in (name, *aliases)]
        if self.wrapper is not None:
            options = [stored for each in options for stored in self.wrapper.names(each)]
        return next((each for each in options if each in self.files), options[0])

    def other_part(self, name: str) -> str | None:
        """The part of a multimodal model, besides its text model, that a tensor belongs to; None if there is none."""
        return None if self.wrapper is None else self.wrapper.other_part(name)

    def name_of(self, tensor: HfTensor) -> str:
        return self.name(tensor.name, tensor.spec.aliases)

    def matrix(self, tensor: HfTensor) -> QuantizedMatrix | None:
        """The quantized matrix that the files hold for a tensor; None where it is dense."""
        return self.files.matrices.get(self.name_of(tensor))

    def __contains__(self, name: str) -> bool:
        return self.name(name) in self.files


def _untied(family: Family, config: ModelConfig, files: _FamilyFiles) -> ModelConfig:
    """The configuration with untied embeddings where the file has an output head that differs from the embedding.
    transformers too unties them then, whatever config.json says."""
    if not config.tie_embeddings or family.head not in files:
        return config
    table = family.tensors["embed/table"]
    table_name = files.name(table.name_for(config), table.aliases)
    if table_name not in files.files or files.name(family.head) == table_name:
        return config
    shape = (config.vocab_size, config.width)
    names = (files.name(family.head), table_name)
    equal = np.array_equal(*(files.files.view(name, shape) for name in names))
    for name in names:
        files.files.release(name)
    return config if equal else dataclasses.replace(config, tie_embeddings=False)


def _find_sources(
    family: Family, config: ModelConfig, files: _FamilyFiles
) -> tuple[Params, dict[str, list[HfTensor]]]:
    """The abstract parameters, and by their paths the tensors that each is made of.

    Nothing is allocated before all tensors have been found with the right shapes, and the search stops at the first
    that is wrong: the sizes in a config.json are only claims.

    Raises:
        UserError: a tensor is missing or of another shape, or the files have one that the model does not need, or a
            buffer of another value.
    """
    like = nn.abstract(config)[1]
    sources: dict[str, list[HfTensor]] = {}
    needed = set()
    for path, leaf in flatten(like).items():
        sources[path] = []
        for tensor in tensors_of_param(family, config, path, leaf.shape):
            name = files.name_of(tensor)
            found = files.files.shape(name)
            expected = _stored_shape(config, tensor.spec, leaf.shape[len(tensor.index) :])
            if files.matrix(tensor) is not None and not outputs_first(path, tensor.spec):
                expected = expected[::-1]
            if found != expected:
                raise UserError(
                    f"{files.files.path_of(name)}: tensor {name!r} is {list(found)}, by config.json it should be "
                    f"{list(expected)}"
                )
            if files.matrix(tensor) is None:
                files.files.raw.check_floats(name)
            sources[path].append(tensor)
            needed.add(name)
    for each, value in buffers_of(family, config).items():
        name = files.name(each)
        if name in files.files:
            found = np.asarray(files.files.raw.read_floats(name), np.float32)
            if found.size != 1 or not math.isclose(found.item(), value, rel_tol=0.01):  # a bfloat16 is 0.4% off
                raise UserError(f"{files.files.path_of(name)}: tensor {name!r} is not {value}, as in all such models")
            needed.add(name)
    unused = [re.compile(pattern) for pattern in family.unused_tensors]
    if config.tie_embeddings:
        unused.append(re.compile(rf"(language_model\.)?{re.escape(family.head)}"))
    for name in files.files:
        full = files.prefix + name if files.lacks_prefix else name
        if name in needed or files.other_part(name):
            continue
        if not any(each.fullmatch(full) or each.fullmatch(name) for each in unused):
            raise UserError(
                f"{files.files.path_of(name)}: tensor {name!r} has no place in a model of this config.json"
            )
    return like, sources


def _stored_shape(config: ModelConfig, spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of a tensor that makes a (part of a) parameter of this shape."""
    stored = list(spec.stored(shape))
    if spec.fused is not None:
        stored[spec.output_axis] = sum(spec.fused.sizes(config))
    return (1, *stored) if spec.as_row else tuple(stored)


def _quantization_by_layer(
    files: _FamilyFiles, sources: Mapping[str, list[HfTensor]]
) -> dict[tuple[str, int], list[Any]]:
    """(side, layer) -> how its parameters are quantized, comparable between layers."""
    by_layer: dict[tuple[str, int], list[Any]] = {}
    for path, tensors in sources.items():
        if tensors[0].layer is not None:
            side, param = split_layer_path(path)
            for tensor in tensors:
                matrix = files.matrix(tensor)
                entry = (param, tensor.index[1:], None if matrix is None else matrix.stack_key)
                by_layer.setdefault((side, tensor.layer), []).append(entry)
    return {place: sorted(entries, key=repr) for place, entries in by_layer.items()}


def _stored_bytes(files: _FamilyFiles, tensors: list[HfTensor], shape: tuple[int, ...]) -> int:
    """The bytes of a parameter in the files; of a fused tensor its share."""
    total = 0
    for tensor in tensors:
        name = files.name_of(tensor)
        stored = math.prod(files.files.shape(name))
        total += files.files.nbytes_of(name) * math.prod(shape[len(tensor.index) :]) // max(stored, 1)
    return total


@dataclass(frozen=True)
class _Loader:
    """Makes parameters of tensors. ``hf_fields`` are those of config.json, defaults included."""

    files: _FamilyFiles
    config: ModelConfig
    hf_fields: Mapping[str, Any]
    dtype: np.dtype

    def leaf(
        self, path: str, tensors: list[HfTensor], shape: tuple[int, ...], target: NamedSharding | None
    ) -> Leaf:
        """The parameter at ``path``; without a target it is not bound to a device."""
        matrices = [(tensor.spec, self.files.matrix(tensor)) for tensor in tensors]
        keys = {matrix and matrix.stack_key for _, matrix in matrices}
        if len(keys) == 1 and None not in keys:
            return stack_matrices(self.config, self.hf_fields, path, shape[: len(tensors[0].index)], matrices)
        parts = {
            tensor.index: partial(self._fill, path, tensor, shape[len(tensor.index) :]) for tensor in tensors
        }
        return assemble_array(shape, self.dtype, parts, target)

    def _fill(
        self, path: str, tensor: HfTensor, shape: tuple[int, ...], out: np.ndarray, index: tuple[slice, ...]
    ) -> None:
        """Writes ``index`` of the part of a parameter that a tensor fills, which has this shape, into ``out``."""
        spec, name, files = tensor.spec, self.files.name_of(tensor), self.files.files
        index = tuple(slice(*each.indices(size)) for each, size in zip(index, shape, strict=True))
        stored, axis = spec.stored(index), spec.output_axis % len(shape)
        if (matrix := self.files.matrix(tensor)) is not None:
            array = dense_slice(self.config, spec, matrix)
            array = (array if outputs_first(path, spec) else array.T)[stored]
        elif spec.fused is not None and spec.fused.turns is not None:
            fused = np.moveaxis(files.read_slice(name, ()), axis, 0)
            array = np.moveaxis(spec.fused.extract(self.config, fused), 0, axis)[stored]
        else:
            start = 0 if spec.fused is None else sum(spec.fused.sizes(self.config)[: spec.fused.index])
            outputs = slice(start + stored[axis].start, start + stored[axis].stop)
            stored = (*stored[:axis], outputs, *stored[axis + 1 :])
            array = files.read_slice(name, (slice(0, 1), *stored) if spec.as_row else stored)
            array = array[0] if spec.as_row else array
        array = spec.stored_array(array)
        scale = 1.0 if spec.scale is None else spec.scale(self.hf_fields)
        if scale != 1.0 or spec.offset:
            array = array.astype(np.float32) * np.float32(scale) + np.float32(spec.offset)
        copy_into(out, array)
        files.release(name)
