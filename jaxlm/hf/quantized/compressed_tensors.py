"""Reading the compressed-tensors layout (github.com/vllm-project/compressed-tensors).

``quantization_config`` of config.json has groups: each is a scheme and the modules that it is for. By the format of the
scheme a linear map ``NAME`` of ``out`` times ``in`` weights is stored as

    pack-quantized      NAME.weight_packed, int32 [out, words]: codes counted from 0, the bits of each row one after the
                        other; NAME.weight_shape; NAME.weight_zero_point, int32 [words, groups], packed along outputs
    int-quantized       NAME.weight int8 and NAME.weight_zero_point int8 [out, groups]
    float-quantized     NAME.weight float8_e4m3fn
    mxfp4-pack-quantized    NAME.weight_packed, uint8 [out, in / 2]: two e2m1 codes a byte, the first in the low bits;
                        NAME.weight_scale, uint8 [out, in / 32]: exponents of two, plus 127
    sparse-bitmask      NAME.compressed, the weights that are not zero, row by row; NAME.bitmask, uint8
                        [out, ceil(in / 8)], a bit for each weight, the lowest bit first; NAME.shape; NAME.row_offsets
    sparse-24-bitmask   the same for 2:4 sparsity: NAME.compressed is [out, in / 2], and there are no offsets

with NAME.weight_scale, and NAME.input_scale where activations have a fixed scale. A weight is
``(code - zero point) * scale``, with codes and zero points counted from ``-2**(bits-1)``. Releases from 0.15 on do not
have the sparse formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.compression.quantize.codebook import E2M1
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook
from jaxlm.core.untrusted import Pattern
from jaxlm.hf.quantized.compressed_tensors_scheme import FORMATS, Scheme
from jaxlm.hf.quantized.matrix import MatrixValues, QuantizedMatrix, check_tensor, make_qarray
from jaxlm.hf.quantized.packing import unpack_int32
from jaxlm.hf.tensor_files import TensorFiles

__all__ = ["compressed_tensors_matrices"]

_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_MX_GROUP = 32  # inputs with one exponent
_SPARSE_FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
_SUFFIXES = (".weight_packed", ".weight_scale", ".bitmask")  # a module with one of these tensors is quantized

Target = str | Pattern  # the name of a module or of a class of modules, or an expression for names of modules
SchemeTargets = list[tuple[list[Target], Scheme]]  # the targets of each group, and its scheme


def compressed_tensors_matrices(files: TensorFiles, config: Mapping[str, Any]) -> dict[str, QuantizedMatrix]:
    """The quantized matrices of a model with this quantization_config.

    Raises:
        UserError: something in it is not supported, or tensors do not fit it.
    """
    layout = config.get("format", "dense")
    if layout not in FORMATS:
        raise UserError(f"format = {layout!r} is not supported; only {', '.join(FORMATS)}")
    sparsity = config.get("sparsity_config") or {}
    if sparsity and sparsity.get("format") not in (*_SPARSE_FORMATS, "dense"):
        supported = ", ".join(_SPARSE_FORMATS)
        raise UserError(f"sparsity_config: format = {sparsity.get('format')!r} is not supported; only {supported}")
    if config.get("transform_config"):
        raise UserError("transform_config, transforms of activations, is not supported")
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise UserError("config_groups is not an object with named groups")
    schemes = [(_targets(name, fields), Scheme.from_json(name, fields)) for name, fields in groups.items()]
    modules = {name.removesuffix(suffix) for name in files for suffix in _SUFFIXES if name.endswith(suffix)}
    return {f"{module}.weight": _matrix(files, module, schemes) for module in sorted(modules)}


def _targets(name: str, fields: Any) -> list[Target]:
    targets = fields.get("targets") if isinstance(fields, dict) else None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f"config_groups: {name} has no list of targets")
    where = f"the targets of config_groups: {name}"
    return [Pattern(each[3:], where) if each.startswith("re:") else each for each in targets]


def _scheme_of(module: str, schemes: SchemeTargets) -> Scheme:
    """The scheme of the group that names the module, else of one with a pattern that fits, else of one for a class of
    modules."""

    def rank(target: Target) -> int:
        if isinstance(target, Pattern):
            return 2 * target.match(module)
        return 3 if target == module else int("." not in target)

    ranked = [(max(map(rank, targets), default=0), scheme) for targets, scheme in schemes]
    best = max((rank for rank, _ in ranked), default=0)
    if not best:
        raise UserError(f"config_groups has no group for {module}, which is quantized")
    found = {scheme for rank, scheme in ranked if rank == best}
    if len(found) > 1:
        raise UserError(f"config_groups has several groups for {module}; name its modules")
    return found.pop()


@dataclass(frozen=True)
class _StoredCodes:
    """The codes (or values) of a matrix: the dense shape ``(out, in)``, the tensors, and how to read them."""

    shape: tuple[int, int]
    names: tuple[str, ...]
    read: Callable[[], np.ndarray]


class _SmallTensors:
    """The tensors of a module beside its codes. They are read at once; ``names`` collects what was read."""

    def __init__(self, files: TensorFiles, module: str):
        self._files, self._module = files, module
        self.names: list[str] = []

    def __contains__(self, part: str) -> bool:
        return f"{self._module}.{part}" in self._files

    def read(self, part: str, kinds: str, *shapes: tuple[int | None, ...]) -> np.ndarray:
        """A tensor that must be of one of these kinds and shapes; see ``check_tensor``."""
        name = f"{self._module}.{part}"
        rank = len(self._files.shape(name))
        check_tensor(self._files, name, kinds, next((shape for shape in shapes if len(shape) == rank), shapes[0]))
        self.names.append(name)
        return self._files.read(name)

    def error(self, problem: str) -> UserError:
        """What is wrong with the tensor that was read last."""
        return UserError(f"{self._files.path_of(self.names[-1])}: {self.names[-1]!r} {problem}")


def _matrix(files: TensorFiles, module: str, schemes: SchemeTargets) -> QuantizedMatrix:
    small = _SmallTensors(files, module)
    if "bitmask" in small:
        codes = _bitmask(files, module)
        if "weight_scale" not in small:  # pruned, not quantized
            files.check_floats(codes.names[0])
            return QuantizedMatrix(codes.names, codes.shape, None, codes.read)
        scheme = _scheme_of(module, schemes)
    else:
        scheme = _scheme_of(module, schemes)
        if scheme.mxfp4:
            return _mxfp4(files, module, small)
        codes = (_packed if "weight_packed" in small else _plain)(files, module, scheme)
    n_out, n_in = codes.shape
    groups = -(-n_in // scheme.group) if scheme.group else 1
    rows = -(-n_out // scheme.rows) if scheme.strategy != "tensor" else 1
    flat = ((1,), ()) if scheme.strategy == "tensor" else ((rows,),) if groups == 1 else ()
    shapes = ((rows, groups), *flat)
    scale = small.read("weight_scale", "fV", *shapes)
    zero = _zero_points(files, module, scheme, small, shapes, n_out)
    act_scale = None
    if scheme.activations == "static":
        act_scale = small.read("input_scale", "fV", (1,), ()).astype(np.float32).reshape(1, 1)
    for part in ("input_scale", "input_zero_point"):  # dynamic or symmetric activations do not use them
        if part in small and f"{module}.{part}" not in small.names:
            small.read(part, "ifV", (1,), ())
    group_of_input = _group_of_input(small, n_in, groups, scheme)

    def per_output(values: np.ndarray) -> np.ndarray:
        values = values.reshape(rows, groups)
        return np.repeat(values, n_out if rows == 1 else scheme.rows, axis=0)[:n_out]

    group = 0 if scheme.group >= n_in else scheme.group

    def read() -> MatrixValues:
        scales, zeros = per_output(scale), None if zero is None else per_output(zero)
        found = codes.read()
        dtype = _FLOAT8 if scheme.floats else np.dtype(np.int8)
        if found.dtype != dtype:
            name = codes.names[0]
            raise UserError(f"{files.path_of(name)}: {name!r} is {found.dtype}, where its scheme asks for {dtype}")
        if not scheme.floats:
            _check_range(files, codes.names[0], found, scheme.bits)
        if group_of_input is not None:  # a QArray has no such order: dense values
            shift = 0 if zeros is None else zeros[:, group_of_input].astype(np.float32)
            return (found.astype(np.float32) - shift) * scales[:, group_of_input].astype(np.float32)
        return make_qarray(found, scales, zeros, scheme.bits, group, 8 if scheme.activations else 0, act_scale)

    stack_key = (scheme.bits, scheme.floats, group, scheme.symmetric, scheme.activations)
    reason = "" if group_of_input is None else "its inputs are in the order of their importance (actorder)"
    names = (*codes.names, *small.names)
    return QuantizedMatrix(names, codes.shape, None if reason else stack_key, read, reason)


def _zero_points(
    files: TensorFiles, module: str, scheme: Scheme, small: _SmallTensors, shapes: tuple[tuple[int, ...], ...],
    n_out: int,
) -> np.ndarray | None:
    """Zero points of one of ``shapes`` ([rows, groups] first), counted from ``-2**(bits-1)``; None if symmetric."""
    if scheme.symmetric:
        if "weight_zero_point" in small and small.read("weight_zero_point", "ifV", (None, None), (None,), ()).any():
            raise small.error("is not zero in a symmetric scheme")
        return None
    if "weight_packed" not in small or scheme.strategy not in ("group", "channel"):
        zero = small.read("weight_zero_point", "i", *shapes)
        _check_range(files, f"{module}.weight_zero_point", zero, scheme.bits)
        return zero
    words = small.read("weight_zero_point", "int32", (None, shapes[0][1]))
    return _signed(_unpack(files, f"{module}.weight_zero_point", words.T, scheme.bits, n_out).T, scheme.bits)


def _group_of_input(small: _SmallTensors, n_in: int, groups: int, scheme: Scheme) -> np.ndarray | None:
    """The group of each input, where groups are not runs of inputs; else None."""
    if "weight_g_idx" not in small:
        return None
    found = small.read("weight_g_idx", "i", (n_in,))
    if (found == -1).all() or np.array_equal(found, np.arange(n_in) // max(scheme.group, 1)):
        return None
    if not 0 <= found.min() <= found.max() < groups:
        raise small.error("names groups that do not exist")
    return found


def _plain(files: TensorFiles, module: str, scheme: Scheme) -> _StoredCodes:
    """int-quantized and float-quantized."""
    name = f"{module}.weight"
    if files.dtype(name) not in (np.dtype(np.int8), _FLOAT8):
        raise UserError(
            f"{files.path_of(name)}: tensor {name!r} is {files.dtype(name)} beside a weight_scale; only models that "
            "were saved compressed are read"
        )
    return _StoredCodes(check_tensor(files, name, "iV", (None, None)), (name,), partial(files.read, name))


def _packed(files: TensorFiles, module: str, scheme: Scheme) -> _StoredCodes:
    """pack-quantized."""
    packed, size = f"{module}.weight_packed", f"{module}.weight_shape"
    n_out, words = check_tensor(files, packed, "int32", (None, None))
    check_tensor(files, size, "i", (2,))
    shape = tuple(int(each) for each in files.read(size))
    fits = words in (-(-shape[1] * scheme.bits // 32), -(-shape[1] // (32 // scheme.bits)))
    if shape[0] != n_out or shape[1] < 1 or not fits:
        raise UserError(f"{files.path_of(packed)}: {packed!r} does not hold {list(shape)} codes of {scheme.bits} bits")

    def read() -> np.ndarray:
        return _signed(_unpack(files, packed, files.read(packed), scheme.bits, shape[1]), scheme.bits)

    return _StoredCodes(shape, (packed, size), read)


def _mxfp4(files: TensorFiles, module: str, small: _SmallTensors) -> QuantizedMatrix:
    """mxfp4-pack-quantized."""
    name = f"{module}.weight_packed"
    n_out, pairs = check_tensor(files, name, "uint8", (None, None))
    n_in = 2 * pairs
    exponents = small.read("weight_scale", "uint8", (n_out, -(-n_in // _MX_GROUP)))
    if exponents.size and exponents.max() > 254:
        raise small.error("has 255 in it, which is no exponent")

    def read() -> Codebook:
        packed = files.read(name)
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(n_out, n_in)
        scale = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
        return Codebook(codes, E2M1.copy(), scale, 4, _MX_GROUP, "mxfp4")

    return QuantizedMatrix((name, *small.names), (n_out, n_in), ("mxfp4",), read)


def _bitmask(files: TensorFiles, module: str) -> _StoredCodes:
    """sparse-bitmask and sparse-24-bitmask: codes or values, with zeros where the mask has none."""
    mask, values, size = (f"{module}.{part}" for part in ("bitmask", "compressed", "shape"))
    n_out, columns = check_tensor(files, mask, "u", (None, None))
    shape = tuple(int(each) for each in files.read(size).reshape(-1)) if files.dtype(size).kind == "i" else ()
    if len(shape) != 2 or shape[0] != n_out or shape[1] < 1 or -(-shape[1] // 8) != columns:
        raise UserError(f"{files.path_of(mask)}: {mask!r} does not fit the shape {list(shape)}; copy the model again")
    names = (values, mask, size, *([f"{module}.row_offsets"] if f"{module}.row_offsets" in files else []))

    def read() -> np.ndarray:
        kept = np.unpackbits(files.read(mask), axis=1, bitorder="little")[:, : shape[1]].view(bool)
        stored = files.read(values).reshape(-1)
        if np.count_nonzero(kept) != len(stored):
            raise UserError(f"{files.path_of(values)}: {values!r} has {len(stored)} weights, its mask {kept.sum()}")
        dense = np.zeros(shape, stored.dtype)
        dense[kept] = stored
        return dense

    return _StoredCodes(shape, names, read)


def _unpack(files: TensorFiles, name: str, words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    try:
        return unpack_int32(words, bits, columns)
    except ValueError as error:
        raise UserError(f"{files.path_of(name)}: tensor {name!r}: {error}; copy the model again") from None


def _check_range(files: TensorFiles, name: str, codes: np.ndarray, bits: int) -> None:
    half = 2 ** (bits - 1)
    if codes.size and not -half <= codes.min() <= codes.max() < half:
        raise UserError(f"{files.path_of(name)}: {name!r} has integers of more than {bits} bits; copy the model again")


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes counted from 0 as codes counted from ``-2**(bits-1)``."""
    return (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
