"""The compressed-tensors layout (github.com/vllm-project/compressed-tensors): what a scheme says, and reading matrices.

``quantization_config`` of config.json has groups, each a scheme and the modules it is for. By its format a linear map
``NAME`` of ``out`` times ``in`` weights is

    pack-quantized      NAME.weight_packed, int32 [out, words]: codes from 0 on, each row's bits one after the other;
                        NAME.weight_shape; NAME.weight_zero_point, int32 [words, groups], packed along the outputs
    int-quantized       NAME.weight int8 and NAME.weight_zero_point int8 [out, groups]
    float-quantized     NAME.weight float8_e4m3fn
    sparse-bitmask      NAME.compressed, the weights that are not zero, row by row; NAME.bitmask, uint8
                        [out, ceil(in / 8)], which those are, the lowest bit first; NAME.shape; NAME.row_offsets
    sparse-24-bitmask   the same of 2:4 sparsity: NAME.compressed [out, in / 2], and no offsets

with NAME.weight_scale, and NAME.input_scale where activations have a fixed scale. A weight is
``(code - zero point) * scale``, codes and zero points counted from ``-2**(bits-1)`` on. Releases from 0.15 on have no
sparse formats any more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.hf.quantized.matrices import Matrix, Values, as_qarray, check_part, unpack_words
from jaxlm.hf.tensor_files import TensorFiles

__all__ = ["Scheme", "find_compressed"]

_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_SPARSE = ("sparse-bitmask", "sparse-24-bitmask")
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
_SUFFIXES = (".weight_packed", ".weight_scale", ".bitmask")


@dataclass(frozen=True)
class Scheme:
    """How a linear map is quantized.

    ``group`` is 0 for a scale an output (or a tensor); ``rows`` outputs share a scale. ``activations`` are "" (as they
    are), "dynamic" (rounded a token) or "static" (by one scale); they have the type and bits of int8 or float8.
    """

    bits: int
    floats: bool = False
    symmetric: bool = True
    group: int = 0
    rows: int = 1
    strategy: str = "channel"
    activations: str = ""

    @property
    def layout(self) -> str:
        """The format that it is written in."""
        if self.floats:
            return "float-quantized"
        return "int-quantized" if self.activations else "pack-quantized"

    def to_json(self) -> dict[str, Any]:
        """Its fields in a group of ``quantization_config``, but for the targets."""
        kind = "float" if self.floats else "int"
        weights = {"num_bits": self.bits, "type": kind, "symmetric": self.symmetric, "strategy": self.strategy}
        weights |= {"group_size": self.group or None, "dynamic": False}
        inputs = None
        if self.activations:
            dynamic = self.activations == "dynamic"
            inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token" if dynamic else "tensor"}
            inputs |= {"group_size": None, "dynamic": dynamic}
        return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": self.layout}

    @classmethod
    def from_json(cls, name: str, fields: Any) -> Scheme:
        """The scheme of a group. UserError on what is not understood, or has no like in jaxlm."""
        if not isinstance(fields, dict) or not isinstance(fields.get("weights"), dict):
            raise UserError(f"config_groups: {name} has no weights; only groups that spell out their weights are read")
        if fields.get("output_activations") is not None:
            raise UserError(f"config_groups: {name} quantizes output activations, which is not supported")
        if fields.get("format") not in (None, *_FORMATS):
            raise UserError(f"config_groups: {name} has the format {fields['format']!r}, which is not supported")
        weights = fields["weights"]
        bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
        floats, symmetric = kind == "float", weights.get("symmetric", True)
        if type(bits) is not int or not 1 <= bits <= 8 or kind not in ("int", "float") or (floats and bits != 8):
            raise UserError(f"config_groups: {name} has weights of the type {kind!r} in {bits!r} bits; not supported")
        if type(symmetric) is not bool or (floats and not symmetric):
            raise UserError(f"config_groups: {name} has symmetric = {symmetric!r}, which is not supported there")
        if weights.get("dynamic"):
            raise UserError(f"config_groups: {name} quantizes weights dynamically, which is not supported")
        group, rows, strategy = _groups(name, weights)
        return cls(bits, floats, symmetric, group, rows, strategy, _activations(name, fields, kind, group))


def _groups(name: str, weights: Mapping[str, Any]) -> tuple[int, int, str]:
    """(inputs that share a scale, outputs that do, strategy)."""
    group, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if group is None else "group" if group != -1 else "channel"
    if strategy in ("tensor", "channel"):
        return 0, 1, strategy
    if strategy == "group" and type(group) is int and group > 0:
        return group, 1, strategy
    block = weights.get("block_structure")
    if strategy == "block" and isinstance(block, list) and len(block) == 2:
        if all(type(size) is int and size > 0 for size in block):
            return block[1], block[0], strategy
    raise UserError(f"config_groups: {name} has the strategy {strategy!r} with groups of {group!r}; not supported")


def _activations(name: str, fields: Mapping[str, Any], kind: str, group: int) -> str:
    args = fields.get("input_activations")
    if args is None:
        return ""
    if not isinstance(args, dict):
        raise UserError(f"config_groups: {name} has input_activations {args!r}, which is not an object")
    how = (args.get("strategy"), args.get("dynamic"))
    found = {("token", True): "dynamic", ("tensor", False): "static"}.get(how if all(map(_hashable, how)) else None)
    like = args.get("num_bits", 8) == 8 and args.get("type", "int") == kind and args.get("symmetric", True) is True
    if found is None or not like or group:
        raise UserError(
            f"config_groups: {name} rounds activations in a way that is not supported; only symmetric ones of 8 bits a "
            f"token or with one fixed scale, of the type of the weights, these with one scale an output"
        )
    return found


def _hashable(value: Any) -> bool:
    return isinstance(value, str | bool | None)


# Reading --------------------------------------------------------------------------------------------------------------


def find_compressed(files: TensorFiles, config: Mapping[str, Any]) -> tuple[dict[str, Matrix], list[str]]:
    """The matrices of a model whose quantization_config is this one, and notes on what is not carried over.

    UserError on what is not understood.
    """
    layout = config.get("format", "dense")
    if layout not in _FORMATS:
        raise UserError(f"format = {layout!r} is not supported; only {', '.join(_FORMATS)}")
    sparsity = config.get("sparsity_config") or {}
    if sparsity and sparsity.get("format") not in (*_SPARSE, "dense"):
        raise UserError(f"sparsity_config: format = {sparsity.get('format')!r} is not supported; {', '.join(_SPARSE)}")
    if config.get("transform_config"):
        raise UserError("transform_config, transforms of activations, is not supported")
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise UserError("config_groups is not an object with named groups")
    schemes = [(_targets(name, fields), Scheme.from_json(name, fields)) for name, fields in groups.items()]
    modules = {name.removesuffix(suffix) for name in files for suffix in _SUFFIXES if name.endswith(suffix)}
    matrices = {f"{module}.weight": _matrix(files, module, schemes) for module in sorted(modules)}
    notes = ["kv_cache_scheme: keys and values are kept as they are"] if config.get("kv_cache_scheme") else []
    return matrices, notes


def _targets(name: str, fields: Any) -> list[str]:
    targets = fields.get("targets") if isinstance(fields, dict) else None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f"config_groups: {name} has no list of targets")
    return targets


def _scheme(module: str, schemes: list[tuple[list[str], Scheme]]) -> Scheme:
    """That of the group which names the module, else of one whose pattern fits, else of one for a class of modules."""

    def fits(target: str) -> int:
        if target == module:
            return 3
        if target.startswith("re:"):
            try:
                return 2 * bool(re.match(target.removeprefix("re:"), module))
            except re.error:
                raise UserError(f"config_groups: {target!r} is not a regular expression") from None
        return int("." not in target)

    ranked = [(max(map(fits, targets), default=0), scheme) for targets, scheme in schemes]
    best = max((rank for rank, _ in ranked), default=0)
    if not best:
        raise UserError(f"config_groups has no group for {module}, which is quantized")
    found = {scheme for rank, scheme in ranked if rank == best}
    if len(found) > 1:
        raise UserError(f"config_groups has several groups for {module}; name its modules")
    return found.pop()


def _matrix(files: TensorFiles, module: str, schemes: list[tuple[list[str], Scheme]]) -> Matrix:
    sparse = f"{module}.bitmask" in files
    if sparse:
        shape, parts, codes = _bitmask(files, module)
    if f"{module}.weight_scale" not in files and sparse:
        return Matrix(parts, shape, None, codes)
    scheme = _scheme(module, schemes)
    if not sparse:
        shape, parts, codes = (_packed if f"{module}.weight_packed" in files else _plain)(files, module, scheme)
    n_out, n_in = shape
    groups = -(-n_in // scheme.group) if scheme.group else 1
    group = 0 if scheme.group >= n_in else scheme.group
    rows = -(-n_out // scheme.rows) if scheme.strategy != "tensor" else 1

    def more(name: str, kinds: str, *allowed: tuple[int | None, ...]) -> np.ndarray:
        """A small tensor of the module, which is read now."""
        nonlocal parts
        full = f"{module}.{name}"
        rank = len(files.shape(full))
        check_part(files, full, kinds, next((shape for shape in allowed if len(shape) == rank), allowed[0]))
        parts = (*parts, full)
        return files.read(full)

    one = ((1,), ()) if scheme.strategy == "tensor" else ((rows,),) if groups == 1 else ()
    scale = more("weight_scale", "fV", (rows, groups), *one)
    zero = None
    if not scheme.symmetric:
        packed = f"{module}.weight_packed" in files and scheme.strategy in ("group", "channel")
        zero = more("weight_zero_point", "i", *(((None, groups),) if packed else ((rows, groups), *one)))
        if packed:
            zero = _signed(_words(files, f"{module}.weight_zero_point", zero.T, scheme.bits, n_out).T, scheme.bits)
    elif f"{module}.weight_zero_point" in files and more("weight_zero_point", "ifV", (None, None), (None,), ()).any():
        raise UserError(f"{files.file(parts[-1])}: {parts[-1]!r} is not zero in a symmetric scheme")
    act_scale = None
    if scheme.activations == "static":
        act_scale = more("input_scale", "fV", (1,), ()).astype(np.float32).reshape(1, 1)
    for name in ("input_scale", "input_zero_point"):  # of dynamic or symmetric activations: no part in the result
        if f"{module}.{name}" in files and f"{module}.{name}" not in parts:
            more(name, "ifV", (1,), ())
    order = None
    if f"{module}.weight_g_idx" in files:
        order = more("weight_g_idx", "i", (n_in,))
        if (order == -1).all() or np.array_equal(order, np.arange(n_in) // max(scheme.group, 1)):
            order = None
        elif not 0 <= order.min() <= order.max() < groups:
            raise UserError(f"{files.file(parts[-1])}: {parts[-1]!r} names groups that there are not")

    def full(values: np.ndarray) -> np.ndarray:
        values = values.reshape(rows, groups)
        return np.repeat(values, n_out if rows == 1 else scheme.rows, axis=0)[:n_out]

    def read() -> Values:
        scales, zeros = full(scale), None if zero is None else full(zero)
        if order is not None:
            values = codes().astype(np.float32) - (0 if zeros is None else zeros[:, order].astype(np.float32))
            return values * scales[:, order].astype(np.float32)
        found = codes()
        dtype = _FLOAT8 if scheme.floats else np.dtype(np.int8)
        if found.dtype != dtype:
            raise UserError(f"{files.file(parts[0])}: {parts[0]!r} is {found.dtype}, where its scheme asks for {dtype}")
        return as_qarray(found, scales, zeros, scheme.bits, group, 8 if scheme.activations else 0, act_scale)

    grid = (scheme.bits, scheme.floats, group, scheme.symmetric, scheme.activations)
    note = "its inputs are in the order of their importance (actorder)" if order is not None else ""
    return Matrix(parts, shape, None if note else grid, read, note)


def _plain(files: TensorFiles, module: str, scheme: Scheme):
    name = f"{module}.weight"
    if files.dtype(name) not in (np.dtype(np.int8), _FLOAT8):
        raise UserError(
            f"{files.file(name)}: tensor {name!r} is {files.dtype(name)} beside a weight_scale; only models that were "
            "saved compressed are read"
        )
    return check_part(files, name, "iV", (None, None)), (name,), partial(files.read, name)


def _packed(files: TensorFiles, module: str, scheme: Scheme):
    packed, size = f"{module}.weight_packed", f"{module}.weight_shape"
    n_out, words = check_part(files, packed, "i", (None, None))
    check_part(files, size, "i", (2,))
    shape = tuple(int(each) for each in files.read(size))
    fits = words in (-(-shape[1] * scheme.bits // 32), -(-shape[1] // (32 // scheme.bits)))
    if shape[0] != n_out or shape[1] < 1 or not fits or files.dtype(packed).itemsize != 4:
        raise UserError(f"{files.file(packed)}: {packed!r} does not hold {list(shape)} codes of {scheme.bits} bits")

    def codes() -> np.ndarray:
        return _signed(_words(files, packed, files.read(packed), scheme.bits, shape[1]), scheme.bits)

    return shape, (packed, size), codes


def _words(files: TensorFiles, name: str, words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    try:
        return unpack_words(words, bits, columns)
    except ValueError as error:
        raise UserError(f"{files.file(name)}: tensor {name!r}: {error}; copy the model again") from None


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    return (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def _bitmask(files: TensorFiles, module: str):
    """(shape, parts, how to read) of what has a bitmask, whatever its type."""
    mask, values, size = (f"{module}.{part}" for part in ("bitmask", "compressed", "shape"))
    n_out, columns = check_part(files, mask, "u", (None, None))
    shape = tuple(int(each) for each in files.read(size).reshape(-1)) if files.dtype(size).kind == "i" else ()
    if len(shape) != 2 or shape[0] != n_out or shape[1] < 1 or -(-shape[1] // 8) != columns:
        raise UserError(f"{files.file(mask)}: {mask!r} does not fit the shape {list(shape)}; copy the model again")
    parts = (values, mask, size, *([f"{module}.row_offsets"] if f"{module}.row_offsets" in files else []))

    def read() -> np.ndarray:
        where = np.unpackbits(files.read(mask), axis=1, bitorder="little")[:, : shape[1]].view(bool)
        kept = files.read(values).reshape(-1)
        if np.count_nonzero(where) != len(kept):
            raise UserError(f"{files.file(values)}: {values!r} has {len(kept)} weights, its mask {where.sum()}")
        dense = np.zeros(shape, kept.dtype)
        dense[where] = kept
        return dense

    return shape, parts, read
