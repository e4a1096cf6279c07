"""One leaf of the parameters as arrays and an entry of metadata, and back; ``checkpoint.storage`` has the format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.checkpoint.codec import CodedArray, CodedStream, Codes, CorruptError, Planes, Words, decode, encode
from jaxlm.core.leaves import Codebook, LowRank, QArray, expand_groups, is_leaf
from jaxlm.core.tree import Leaf

__all__ = ["Entry", "Streams", "Tensors", "array_name", "array_suffixes", "pack_leaf", "unpack_leaf"]

Entry = dict[str, Any]  # the metadata of a leaf, JSON-safe
Streams = dict[str, np.ndarray | CodedStream]  # its arrays, by what their names add to its path
Tensors = dict[str, np.ndarray]
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


def array_name(path: str, suffix: str) -> str:
    return f"{path}/{suffix}" if suffix else path


def array_suffixes(entry: Mapping[str, Any]) -> list[str]:
    """What the names of an entry's arrays add to its path, in the order of the checksum."""
    if "a" in entry:
        return [array_name(factor, suffix) for factor in ("a", "b") for suffix in array_suffixes(entry[factor])]
    out = []
    for part, fields in entry["parts"].items():
        if fields["layout"] == "array":
            out.append("" if part == "dense" else part)
        else:
            out.extend(f"{part}/{stream}" for stream in fields["streams"])
    return out


# Packing --------------------------------------------------------------------------------------------------------------


def pack_leaf(leaf: Leaf, storage: str) -> tuple[Entry, Streams]:
    """The entry of a leaf, without a checksum yet, and its arrays; coded arrays are made when they are asked for.

    Raises:
        TypeError: the leaf is one that is not stored, such as an adapter.
    """
    if not is_leaf(leaf):
        array = np.asarray(leaf)
        fields, arrays = _pack_array("dense", array, storage)
        return {"shape": list(array.shape), "dtype": str(array.dtype), "parts": {"dense": fields}}, arrays
    if isinstance(leaf, QArray):
        return _pack_quantized(leaf, storage)
    if isinstance(leaf, Codebook):
        return _pack_codebook(leaf, storage)
    if isinstance(leaf, LowRank):
        (a, arrays_a), (b, arrays_b) = pack_leaf(leaf.a, storage), pack_leaf(leaf.b, storage)
        arrays = {array_name("a", name): array for name, array in arrays_a.items()}
        arrays |= {array_name("b", name): array for name, array in arrays_b.items()}
        return {"shape": list(leaf.shape), "a": a, "b": b}, arrays
    raise TypeError(f"a {type(leaf).__name__} is not stored; merge it first")


def _pack_quantized(leaf: QArray, storage: str) -> tuple[Entry, Streams]:
    codes, grid = np.asarray(leaf.codes), {}
    if codes.dtype == _FLOAT8:
        codes, grid = codes.view(np.uint8), {"codes": str(_FLOAT8)}
    codes, zero = codes.astype(np.int16), 0
    parts, arrays = {}, {}
    if leaf.zero is not None:
        zero = np.asarray(leaf.zero).astype(np.int16)
        parts["zero"] = _wrap(zero, leaf.bits)
        zero = expand_groups(zero, leaf.group, codes.shape[-1])
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


def _pack_codebook(leaf: Codebook, storage: str) -> tuple[Entry, Streams]:
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


def _pack_floats(part: str, array: np.ndarray, storage: str) -> tuple[Entry, Streams]:
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


def _pack_array(part: str, array: np.ndarray, storage: str) -> tuple[Entry, Streams]:
    """Coded streams where those are smaller, else the array as it is."""
    symbolizer = (Planes if storage == "huffman" else Words)(array.dtype)
    coded = encode(np.ascontiguousarray(array).reshape(-1).view(symbolizer.dtype), symbolizer, storage)
    if coded.nbytes < array.nbytes:
        return _fields(part, coded)
    return {"layout": "array", "streams": {}}, {"" if part == "dense" else part: array}


def _fields(part: str, coded: CodedArray) -> tuple[Entry, Streams]:
    fields = {"layout": coded.layout, "streams": {name: stream.method for name, stream in coded.streams.items()}}
    if coded.layout == "gaps":
        fields["gaps"] = coded.gaps
    return fields, {f"{part}/{name}": stream for name, stream in coded.streams.items()}


def _wrap(codes: np.ndarray, bits: int) -> np.ndarray:
    """Flat codes modulo ``2**bits``, as uint8."""
    return (codes & (2**bits - 1)).astype(np.uint8).reshape(-1)


def _unwrap(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes in ``[-2**(bits-1), 2**(bits-1))``, as int8."""
    half = 2 ** (bits - 1)
    return ((codes + half & (2**bits - 1)) - half).astype(np.int8)


# Unpacking ------------------------------------------------------------------------------------------------------------


def unpack_leaf(shape: tuple[int, ...], entry: Mapping[str, Any], arrays: Tensors) -> Leaf:
    """The leaf of the dense ``shape`` that was packed, as NumPy arrays.

    Raises:
        CorruptError: the entry or an array is not what it should be. A damaged entry may also raise KeyError, TypeError
            and the like.
    """
    if "a" in entry:
        return _unpack_low_rank(shape, entry, arrays)
    if "dtype" in entry:
        return _unpack_array("dense", shape, np.dtype(entry["dtype"]), entry, arrays)
    bits, group, axis = (_whole(entry[name], name) for name in ("bits", "group", "axis"))
    if not 1 <= bits <= 8 or group < 0 or axis not in (-1, -2):
        raise CorruptError(f"{bits} bits in groups of {group} along axis {axis}")
    *lead, n_out, n_in = (*shape[:-2], shape[-1], shape[-2]) if axis == -2 else shape
    codes = decode(_coded("codes", entry, arrays), Codes(bits), math.prod(shape)).reshape(*lead, n_out, n_in)
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
        within = {name: arrays[array_name(factor, name)] for name in array_suffixes(entry[factor])}
        factors[factor] = unpack_leaf(dense, entry[factor], within)
    return LowRank(**factors)


def _unpack_quantized(codes: np.ndarray, grid: tuple[int, ...], entry: Mapping[str, Any], arrays: Tensors) -> QArray:
    bits, group, zero = entry["bits"], entry["group"], None
    floats = "codes" in entry
    if floats and (entry["codes"] != str(_FLOAT8) or bits != 8 or "zero" in entry["parts"]):
        raise CorruptError(f"codes of the type {entry['codes']} in {bits} bits")
    if "zero" in entry["parts"]:
        zero = decode(_coded("zero", entry, arrays), Codes(bits), math.prod(grid)).astype(np.int16).reshape(grid)
        zero = _unwrap(zero, bits)
        codes = codes + expand_groups(zero, group, codes.shape[-1]).astype(np.int16)
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
    symbolizer = (Planes if "plane0" in streams else Words)(dtype)
    return decode(_coded(part, entry, arrays), symbolizer, math.prod(shape)).view(dtype).reshape(shape)


def _coded(part: str, entry: Mapping[str, Any], arrays: Tensors) -> CodedArray:
    fields = entry["parts"][part]
    streams = {name: CodedStream.of(method, arrays[f"{part}/{name}"]) for name, method in fields["streams"].items()}
    return CodedArray(fields["layout"], streams, fields.get("gaps", 0))
