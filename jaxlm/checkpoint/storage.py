"""Parameters as the flat arrays of a safetensors file, and back bit for bit, whatever their representation.

A dense array that nothing makes smaller is stored as itself under its path. Everything else is a few byte arrays,
``<path>/<part>/<stream>``, and an entry in the metadata:

    {"format": 1, "tensors": {"<path>": {
        "shape": the dense shape, "dtype": of a dense array
        "bits", "group", "act_bits", "axis": of a quantized one (core.leaves.QArray), "codes": their dtype if not int8
        "bits", "group", "kind", "axis", "common": of values from a table (core.leaves.Codebook)
        "a", "b": entries without checksums, the factors of a product (core.leaves.LowRank)
        "parts": {"<part>": {"layout": ..., "streams": {"<stream>": method}, "gaps": entries of the gaps stream}},
        "crc32": of the entry itself and its arrays}}}

FORMAT.md beside this file has all that a reader of other making needs.

The parts are ``dense``, or ``codes``, ``scale``, ``zero``, ``act_scale`` and ``table``. See ``checkpoint.codec`` for
layouts, streams and methods. A part with the layout ``array`` is an array of its own dtype. Codes are stored minus the
zeros (minus the most common code, "common", where a table gives them their values), modulo ``2**bits``; floats of
``scale`` and ``table`` as what the part calls its "dtype": ``exponent`` (a byte ``e`` for ``2**(e - 127)``),
``float16`` or ``float32``, the first that holds all of them exactly.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxlm.checkpoint.codec import CodedArray, Codes, CorruptError, Planes, Words, decode, encode
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, LowRank, QArray, is_leaf
from jaxlm.core.tree import Leaf, Params, flatten, unflatten

FORMAT = 1
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
Tensors = dict[str, np.ndarray]


def pack_params(params: Params, storage: str = "plain") -> tuple[Tensors, dict[str, Any]]:
    """Arrays by name and their JSON metadata.

    ``plain`` packs codes and leaves out zeros; ``huffman`` also codes every stream in the cheapest way.
    """
    tensors: Tensors = {}
    entries = {}
    for path, leaf in flatten(params).items():
        entry, arrays = _pack(leaf, storage)
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
    entries = meta.get("tensors")
    if not isinstance(entries, dict):
        raise UserError("the metadata of the weights names no tensors; copy or download the model again")
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(like).items()}
    if missing := sorted(shapes.keys() - entries.keys()):
        raise UserError(f"the weights lack {missing[0]}; the file is damaged or of another model")
    if extra := sorted(entries.keys() - shapes.keys()):
        raise UserError(f"the weights hold {extra[0]}, which the model has no place for; check config.json")
    return unflatten(like, {path: _unpack(path, shape, tensors, entries[path]) for path, shape in shapes.items()})


def stored(tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """For each path its bytes in the file and how they are coded: ``codes mask (raw, huffman), scale array``."""
    sizes = tensor_bytes(lambda name: tensors[name].nbytes, meta)
    return {path: (sizes[path], ", ".join(_how(entry))) for path, entry in meta["tensors"].items()}


def tensor_bytes(size: Callable[[str], int], meta: Mapping[str, Any]) -> dict[str, int]:
    """For each path its bytes in the file, whose arrays have the bytes that ``size`` tells."""
    return {
        path: sum(size(_name(path, suffix)) for suffix in _suffixes(entry)) for path, entry in meta["tensors"].items()
    }


def leaf_bytes(leaf: Leaf, storage: str = "plain") -> int:
    """What ``pack_params`` would make of one leaf, in bytes."""
    return sum(array.nbytes for array in _pack(leaf, storage)[1].values())


def _how(entry: Mapping[str, Any], within: str = "") -> list[str]:
    """How each part of an entry is coded."""
    if "a" in entry:
        return _how(entry["a"], "a/") + _how(entry["b"], "b/")
    out = []
    for part, fields in entry["parts"].items():
        methods = ", ".join(fields["streams"].values())
        out.append(f"{within}{part} {fields['layout']}" + (f" ({methods})" if methods else ""))
    return out


def _name(path: str, suffix: str) -> str:
    return f"{path}/{suffix}" if suffix else path


def _suffixes(entry: Mapping[str, Any]) -> list[str]:
    """What the names of an entry's arrays add to its path, in order."""
    if "a" in entry:
        return [_name(factor, suffix) for factor in ("a", "b") for suffix in _suffixes(entry[factor])]
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


# Packing --------------------------------------------------------------------------------------------------------------


def _pack(leaf: Leaf, storage: str) -> tuple[dict[str, Any], Tensors]:
    if not is_leaf(leaf):
        array = np.asarray(leaf)
        fields, arrays = _pack_array("dense", array, storage)
        return {"shape": list(array.shape), "dtype": str(array.dtype), "parts": {"dense": fields}}, arrays
    if isinstance(leaf, QArray):
        return _pack_quantized(leaf, storage)
    if isinstance(leaf, Codebook):
        return _pack_codebook(leaf, storage)
    if isinstance(leaf, LowRank):
        (a, arrays_a), (b, arrays_b) = _pack(leaf.a, storage), _pack(leaf.b, storage)
        arrays = {_name("a", name): array for name, array in arrays_a.items()}
        arrays |= {_name("b", name): array for name, array in arrays_b.items()}
        return {"shape": list(leaf.shape), "a": a, "b": b}, arrays
    raise TypeError(f"a {type(leaf).__name__} is not stored; merge it first")


def _pack_quantized(leaf: QArray, storage: str) -> tuple[dict[str, Any], Tensors]:
    codes, grid = np.asarray(leaf.codes), {}
    if codes.dtype == _FLOAT8:
        codes, grid = codes.view(np.uint8), {"codes": str(_FLOAT8)}
    codes, zero = codes.astype(np.int16), 0
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
    for part in ("scale", "act_scale"):
        if getattr(leaf, part) is not None:
            fields[part], coded = _pack_floats(part, np.asarray(getattr(leaf, part)), storage)
            arrays |= coded
    grid |= {"bits": leaf.bits, "group": leaf.group, "act_bits": leaf.act_bits, "axis": leaf.axis}
    return {"shape": list(leaf.shape), **grid, "parts": fields}, arrays


def _pack_codebook(leaf: Codebook, storage: str) -> tuple[dict[str, Any], Tensors]:
    codes = np.asarray(leaf.codes).astype(np.int16)
    common = int(np.bincount(codes.reshape(-1), minlength=1).argmax())
    fields, arrays = {}, {}
    fields["codes"], arrays = _fields("codes", encode(_wrap(codes - common, leaf.bits), Codes(leaf.bits), storage))
    for part in ("table", "scale"):
        if getattr(leaf, part) is not None:
            fields[part], coded = _pack_floats(part, np.asarray(getattr(leaf, part)), storage)
            arrays |= coded
    grid = {"bits": leaf.bits, "group": leaf.group, "kind": leaf.kind, "axis": leaf.axis, "common": common}
    return {"shape": list(leaf.shape), **grid, "parts": fields}, arrays


def _pack_floats(part: str, array: np.ndarray, storage: str) -> tuple[dict[str, Any], Tensors]:
    """Float32 values in the first of the types that hold them exactly."""
    exponents = np.frexp(array)[1] + 126
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if ((exponents >= 0) & (exponents < 255)).all() and _same_bits(array, _from_exponents(exponents)):
        name, array = "exponent", exponents.astype(np.uint8)
    elif _same_bits(array, half.astype(np.float32)):
        name, array = "float16", half
    else:
        name = "float32"
    fields, arrays = _pack_array(part, array, storage)
    return fields | {"dtype": name}, arrays


def _from_exponents(exponents: np.ndarray) -> np.ndarray:
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def _pack_array(part: str, array: np.ndarray, storage: str) -> tuple[dict[str, Any], Tensors]:
    """As coded streams where those are smaller, else the array as it is."""
    kind = (Planes if storage == "huffman" else Words)(array.dtype)
    coded = encode(np.ascontiguousarray(array).reshape(-1).view(kind.dtype), kind, storage)
    if coded.nbytes < array.nbytes:
        return _fields(part, coded)
    return {"layout": "array", "streams": {}}, {"" if part == "dense" else part: array}


def _fields(part: str, coded: CodedArray) -> tuple[dict[str, Any], Tensors]:
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


# Unpacking ------------------------------------------------------------------------------------------------------------


def _unpack(path: str, shape: tuple[int, ...], tensors: Mapping[str, np.ndarray], entry: Mapping[str, Any]) -> Leaf:
    try:
        arrays = {suffix: np.asarray(tensors[_name(path, suffix)]) for suffix in _suffixes(entry)}
        if _checksum(entry, arrays) != entry["crc32"]:
            raise CorruptError("its checksum is wrong")
        if tuple(entry["shape"]) != shape:
            saved = tuple(entry["shape"])
            raise UserError(f"{path} is {saved} in the weights, {shape} in the model; check config.json")
        return jax.tree.map(jnp.asarray, _unpack_leaf(shape, entry, arrays))
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of a damaged entry
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}); copy or download the model again") from None


def _unpack_leaf(shape: tuple[int, ...], entry: Mapping[str, Any], arrays: Tensors) -> Leaf:
    if "a" in entry:
        return _unpack_low_rank(shape, entry, arrays)
    if "dtype" in entry:
        return _unpack_array("dense", shape, np.dtype(entry["dtype"]), entry, arrays)
    bits, group, axis = (_whole(entry[name], name) for name in ("bits", "group", "axis"))
    if not 1 <= bits <= 8 or group < 0 or axis not in (-1, -2):
        raise CorruptError(f"{bits} bits in groups of {group} along axis {axis}")
    *lead, n_out, n_in = (*shape[:-2], shape[-1], shape[-2]) if axis == -2 else shape
    codes = decode(_part("codes", entry, arrays), Codes(bits), math.prod(shape)).reshape(*lead, n_out, n_in)
    grid = (*lead, n_out, -(-n_in // group) if group else 1)
    unpack = _unpack_codebook if "kind" in entry else _unpack_quantized
    return unpack(codes, grid, entry, arrays)


def _whole(value: Any, name: str) -> int:
    if type(value) is not int:
        raise CorruptError(f"its {name} is {value!r}")
    return value


def _unpack_low_rank(shape: tuple[int, ...], entry: Mapping[str, Any], arrays: Tensors) -> LowRank:
    *lead, n_in, n_out = shape
    rank = _whole(entry["a"]["shape"][-1], "rank")
    if not 0 < rank <= max(n_in, n_out):
        raise CorruptError(f"a rank of {rank}")
    factors = {}
    for factor, dense in (("a", (*lead, n_in, rank)), ("b", (*lead, rank, n_out))):
        if tuple(entry[factor]["shape"]) != dense or factor in entry[factor]:
            raise CorruptError(f"a factor of the shape {entry[factor]['shape']} where {list(dense)} is due")
        within = {name: arrays[_name(factor, name)] for name in _suffixes(entry[factor])}
        factors[factor] = _unpack_leaf(dense, entry[factor], within)
    return LowRank(**factors)


def _unpack_quantized(codes: np.ndarray, grid: tuple[int, ...], entry: Mapping[str, Any], arrays: Tensors) -> QArray:
    bits, group, zero = entry["bits"], entry["group"], None
    floats = "codes" in entry
    if floats and (entry["codes"] != str(_FLOAT8) or bits != 8 or "zero" in entry["parts"]):
        raise CorruptError(f"codes of the type {entry['codes']} in {bits} bits")
    if "zero" in entry["parts"]:
        zero = decode(_part("zero", entry, arrays), Codes(bits), math.prod(grid)).astype(np.int16).reshape(grid)
        zero = _unwrap(zero, bits)
        codes = codes + _spread(zero, group, codes.shape[-1]).astype(np.int16)
    scale, act_scale = _unpack_floats("scale", grid, entry, arrays), None
    if "act_scale" in entry["parts"]:
        act_scale = _unpack_floats("act_scale", (*grid[:-2], 1, 1), entry, arrays)
    codes = codes.view(_FLOAT8) if floats else _unwrap(codes.astype(np.int16), bits)
    return QArray(codes, scale, zero, bits, group, entry["act_bits"], entry["axis"], act_scale)


def _unpack_codebook(codes: np.ndarray, grid: tuple[int, ...], entry: Mapping[str, Any], arrays: Tensors) -> Codebook:
    bits, kind = entry["bits"], entry["kind"]
    if kind not in ("nf4", "mxfp4", "shared"):
        raise CorruptError(f"a table of the kind {kind!r}")
    codes = _wrap(codes.astype(np.int16) + _whole(entry["common"], "common"), bits).reshape(codes.shape)
    table = _unpack_floats("table", (*grid[:-2], 2**bits), entry, arrays)
    scale = _unpack_floats("scale", grid, entry, arrays) if "scale" in entry["parts"] else None
    return Codebook(codes, table, scale, bits, entry["group"], kind, entry["axis"])


def _unpack_floats(part: str, shape: tuple[int, ...], entry: Mapping[str, Any], arrays: Tensors) -> np.ndarray:
    name = entry["parts"][part].get("dtype", "float32")
    if name not in ("exponent", "float16", "float32"):
        raise CorruptError(f"{part} of the type {name!r}")
    array = _unpack_array(part, shape, np.dtype(np.uint8 if name == "exponent" else name), entry, arrays)
    return _from_exponents(array) if name == "exponent" else array.astype(np.float32)


def _unpack_array(part: str, shape: tuple[int, ...], dtype: np.dtype, entry: Mapping[str, Any], arrays: Tensors):
    if entry["parts"][part]["layout"] == "array":
        array = arrays["" if part == "dense" else part]
        if array.shape != shape or array.dtype != dtype:
            raise CorruptError(f"{array.dtype}{list(array.shape)} where {dtype}{list(shape)} is due")
        return array
    streams = entry["parts"][part]["streams"]
    kind = (Planes if "plane0" in streams else Words)(dtype)
    return decode(_part(part, entry, arrays), kind, math.prod(shape)).view(dtype).reshape(shape)


def _part(part: str, entry: Mapping[str, Any], arrays: Tensors) -> CodedArray:
    fields = entry["parts"][part]
    streams = {name: (method, arrays[f"{part}/{name}"]) for name, method in fields["streams"].items()}
    return CodedArray(fields["layout"], streams, fields.get("gaps", 0))
