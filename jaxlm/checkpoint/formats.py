"""Parameters as the flat arrays of a safetensors file, and back bit for bit, whatever their representation.

A dense array that nothing makes smaller is stored as itself under its path. Everything else is a few byte arrays,
``<path>/<part>/<stream>``, and an entry in the metadata:

    {"format": 1, "tensors": {"<path>": {
        "shape": the dense shape, "dtype": of a dense array
        "bits", "group", "act_bits", "axis": of a quantized one (core.leaves.QArray),
        "parts": {"<part>": {"layout": ..., "streams": {"<stream>": method}, "gaps": entries of the gaps stream}},
        "crc32": of the entry itself and its arrays}}}

The parts are ``dense``, or ``codes`` (minus the zeros, modulo ``2**bits``), ``scale`` and ``zero``. See
``checkpoint.codec`` for layouts, streams and methods. A part with the layout ``array`` is an array of its own dtype.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.codec import Codes, Corrupt, Part, Planes, Words, decode, encode
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray, is_leaf
from jaxlm.core.tree import Leaf, Params, flatten, unflatten

FORMAT = 1
Tensors = dict[str, np.ndarray]


def pack_params(params: Params, storage: str = "plain") -> tuple[Tensors, dict[str, Any]]:
    """Arrays by name and their JSON metadata.

    ``plain`` packs codes and leaves out zeros; ``huffman`` also codes every stream in the cheapest way.
    """
    tensors: Tensors = {}
    entries = {}
    for path, leaf in flatten(params).items():
        entry, arrays = _pack_quantized(leaf, storage) if is_leaf(leaf) else _pack_dense(leaf, storage)
        entry["crc32"] = _checksum(entry, arrays)
        tensors |= {_name(path, suffix): array for suffix, array in arrays.items()}
        entries[path] = entry
    return tensors, {"format": FORMAT, "tensors": entries}


def unpack_params(like: Params, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Params:
    """The parameters that were packed; ``like`` gives the paths and the dense shapes (it may be abstract).

    Raises UserError naming the tensor where the arrays do not fit the metadata, the metadata the model, or a checksum
    fails. Nothing larger than the model asks for is allocated.
    """
    if meta.get("format") != FORMAT:
        raise UserError(f"the weights are in format {meta.get('format')!r}, this version reads {FORMAT}; update jaxlm")
    entries = meta["tensors"]
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(like).items()}
    if missing := sorted(shapes.keys() - entries.keys()):
        raise UserError(f"the weights lack {missing[0]}; the file is damaged or of another model")
    if extra := sorted(entries.keys() - shapes.keys()):
        raise UserError(f"the weights hold {extra[0]}, which the model has no place for; check config.json")
    return unflatten(like, {path: _unpack(path, shape, tensors, entries[path]) for path, shape in shapes.items()})


def stored(tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """For each path its bytes in the file and how they are coded: ``codes mask (raw, huffman), scale array``."""
    out = {}
    for path, entry in meta["tensors"].items():
        size = sum(tensors[_name(path, suffix)].nbytes for suffix in _suffixes(entry))
        methods = {part: ", ".join(fields["streams"].values()) for part, fields in entry["parts"].items()}
        coded = [f"{part} {entry['parts'][part]['layout']}" + (f" ({m})" if m else "") for part, m in methods.items()]
        out[path] = size, ", ".join(coded)
    return out


def _name(path: str, suffix: str) -> str:
    return f"{path}/{suffix}" if suffix else path


def _suffixes(entry: Mapping[str, Any]) -> list[str]:
    """What the names of an entry's arrays add to its path, in order."""
    out = []
    for part, fields in entry["parts"].items():
        if fields["layout"] == "array":
            out.append("" if part == "dense" else part)
        else:
            out.extend(f"{part}/{stream}" for stream in fields["streams"])
    return out


def _checksum(entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> int:
    fields = {key: value for key, value in entry.items() if key != "crc32"}
    crc = zlib.crc32(json.dumps(fields, sort_keys=True).encode())
    for suffix in _suffixes(entry):
        crc = zlib.crc32(_bytes(arrays[suffix]).data, crc)
    return crc


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _pack_dense(leaf: Leaf, storage: str) -> tuple[dict[str, Any], Tensors]:
    array = np.asarray(leaf)
    fields, arrays = _pack_array("dense", array, storage)
    return {"shape": list(array.shape), "dtype": str(array.dtype), "parts": {"dense": fields}}, arrays


def _pack_quantized(leaf: QArray, storage: str) -> tuple[dict[str, Any], Tensors]:
    codes, zero = np.asarray(leaf.codes).astype(np.int16), 0
    parts, arrays = {}, {}
    if leaf.zero is not None:
        zero = np.asarray(leaf.zero).astype(np.int16)
        parts["zero"] = _wrap(zero, leaf.bits)
        zero = _spread(zero, leaf.group, codes.shape[-1])
    parts["codes"] = _wrap(codes - zero, leaf.bits)
    fields = {}
    for part, values in parts.items():
        fields[part], coded = _fields(part, encode(values, Codes(leaf.bits), storage))
        arrays |= coded
    fields["scale"], coded = _pack_array("scale", np.asarray(leaf.scale), storage)
    arrays |= coded
    grid = {"bits": leaf.bits, "group": leaf.group, "act_bits": leaf.act_bits, "axis": leaf.axis}
    return {"shape": list(leaf.shape), **grid, "parts": fields}, arrays


def _pack_array(part: str, array: np.ndarray, storage: str) -> tuple[dict[str, Any], Tensors]:
    """As coded streams where those are smaller, else the array as it is."""
    kind = (Planes if storage == "huffman" else Words)(array.dtype)
    coded = encode(np.ascontiguousarray(array).reshape(-1).view(kind.dtype), kind, storage)
    if coded.nbytes < array.nbytes:
        return _fields(part, coded)
    return {"layout": "array", "streams": {}}, {"" if part == "dense" else part: array}


def _fields(part: str, coded: Part) -> tuple[dict[str, Any], Tensors]:
    fields = {"layout": coded.layout, "streams": {name: method for name, (method, _) in coded.streams.items()}}
    if coded.layout == "gaps":
        fields["gaps"] = coded.gaps
    return fields, {f"{part}/{name}": data for name, (_, data) in coded.streams.items()}


def _wrap(codes: np.ndarray, bits: int) -> np.ndarray:
    """Flat codes modulo ``2**bits``, as uint8."""
    return (codes & (2**bits - 1)).astype(np.uint8).reshape(-1)


def _unwrap(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes in ``[-2**(bits-1), 2**(bits-1))``, as int8."""
    half = 2 ** (bits - 1)
    return ((codes + half & (2**bits - 1)) - half).astype(np.int8)


def _spread(per_group: np.ndarray, group: int, n_in: int) -> np.ndarray:
    return per_group if per_group.shape[-1] == 1 else np.repeat(per_group, group, axis=-1)[..., :n_in]


def _unpack(path: str, shape: tuple[int, ...], tensors: Mapping[str, np.ndarray], entry: Mapping[str, Any]) -> Leaf:
    try:
        arrays = {suffix: np.asarray(tensors[_name(path, suffix)]) for suffix in _suffixes(entry)}
        if _checksum(entry, arrays) != entry["crc32"]:
            raise Corrupt("its checksum is wrong")
        if tuple(entry["shape"]) != shape:
            saved = tuple(entry["shape"])
            raise UserError(f"{path} is {saved} in the weights, {shape} in the model; check config.json")
        leaf = _unpack_quantized(shape, entry, arrays) if "bits" in entry else _unpack_dense(shape, entry, arrays)
        return jax.tree.map(jnp.asarray, leaf)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a damaged entry leads to
        raise UserError(f"{path} is damaged ({error}); copy or download the model again") from None


def _unpack_dense(shape: tuple[int, ...], entry: Mapping[str, Any], arrays: Tensors) -> np.ndarray:
    return _unpack_array("dense", shape, np.dtype(entry["dtype"]), entry, arrays)


def _unpack_quantized(shape: tuple[int, ...], entry: Mapping[str, Any], arrays: Tensors) -> QArray:
    bits, group, axis = entry["bits"], entry["group"], entry["axis"]
    *lead, n_out, n_in = (*shape[:-2], shape[-1], shape[-2]) if axis == -2 else shape
    grid = (*lead, n_out, -(-n_in // group) if group else 1)
    scale = _unpack_array("scale", grid, np.dtype(np.float32), entry, arrays)
    kind, zero = Codes(bits), None
    codes = decode(_part("codes", entry, arrays), kind, math.prod(shape)).astype(np.int16).reshape(*lead, n_out, n_in)
    if "zero" in entry["parts"]:
        zero = decode(_part("zero", entry, arrays), kind, math.prod(grid)).astype(np.int16).reshape(grid)
        zero = _unwrap(zero, bits)
        codes += _spread(zero, group, n_in)
    return QArray(_unwrap(codes, bits), scale, zero, bits, group, entry["act_bits"], axis)


def _unpack_array(part: str, shape: tuple[int, ...], dtype: np.dtype, entry: Mapping[str, Any], arrays: Tensors):
    if entry["parts"][part]["layout"] == "array":
        array = arrays["" if part == "dense" else part]
        if array.shape != shape or array.dtype != dtype:
            raise Corrupt(f"{array.dtype}{list(array.shape)} where {dtype}{list(shape)} is due")
        return array
    streams = entry["parts"][part]["streams"]
    kind = (Planes if "plane0" in streams else Words)(dtype)
    return decode(_part(part, entry, arrays), kind, math.prod(shape)).view(dtype).reshape(shape)


def _part(part: str, entry: Mapping[str, Any], arrays: Tensors) -> Part:
    fields = entry["parts"][part]
    streams = {name: (method, arrays[f"{part}/{name}"]) for name, method in fields["streams"].items()}
    return Part(fields["layout"], streams, fields.get("gaps", 0))
