"""The layouts in which AutoGPTQ and AutoAWQ (and their successors) write quantized models; read only.

Both store, for a linear map of ``in`` inputs and ``out`` outputs, codes ``q`` from 0 and zero points ``z`` in int32
words, and float scales: a weight is ``(q - z) * scale``, its scale and zero those of its group of inputs.

    GPTQ    NAME.qweight [in * bits / 32, out], words along the inputs; NAME.qzeros [groups, out * bits / 32], words
            along the outputs, of z - 1 (of z in checkpoint_format "gptq_v2"); NAME.scales [groups, out];
            NAME.g_idx [in], the group of each input
    AWQ     NAME.qweight [in, out * bits / 32] and NAME.qzeros [groups, out * bits / 32], words along the outputs, the
            eight of a word in the order 0 2 4 6 1 3 5 7; NAME.scales [groups, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray
from jaxlm.hf.quantized.matrices import Matrix, as_qarray, check_part, unpack_words
from jaxlm.hf.tensor_files import TensorFiles

__all__ = ["find_awq", "find_gptq"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class _Grid:
    bits: int
    group: int  # 0: one an output
    symmetric: bool
    offset: int = 0  # what must be added to a stored zero


def _field(config: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), default)


def _read_grid(config: Mapping[str, Any], widths: tuple[int, ...], **more: Any) -> _Grid:
    bits = _field(config, "bits", "w_bit")
    group = _field(config, "group_size", "q_group_size", default=-1)
    if bits not in widths or type(bits) is not int:
        raise UserError(f"bits = {bits!r} is not supported in this layout; only {', '.join(map(str, widths))}")
    if type(group) is not int or not (group == -1 or group > 0):
        raise UserError(f"group_size = {group!r} is not a size; it is -1 or a number of inputs")
    return _Grid(bits, max(group, 0), **more)


def _modules(files: TensorFiles) -> list[str]:
    names = [name.removesuffix(".qweight") for name in files if name.endswith(".qweight")]
    if not names:
        raise UserError("no tensor is called *.qweight, though quantization_config says that some are quantized")
    return names


# GPTQ -----------------------------------------------------------------------------------------------------------------


def find_gptq(files: TensorFiles, config: Mapping[str, Any]) -> dict[str, Matrix]:
    """The matrices of a model whose quantization_config is this one. UserError on what is not understood."""
    version = _field(config, "checkpoint_format", "format", default="gptq")
    if version not in ("gptq", "gptq_v2"):
        raise UserError(f"checkpoint_format = {version!r} is not supported; only gptq and gptq_v2")
    if any(not str(name).startswith("-:") for name in config.get("dynamic") or ()):
        raise UserError("dynamic, other grids for some layers, is not supported in the GPTQ layout")
    symmetric = bool(_field(config, "sym", default=True))
    grid = _read_grid(config, (2, 3, 4, 8), symmetric=symmetric, offset=int(version == "gptq"))
    return {f"{module}.weight": _gptq(files, module, grid) for module in _modules(files)}


def _gptq(files: TensorFiles, module: str, grid: _Grid) -> Matrix:
    words, n_out = check_part(files, f"{module}.qweight", "i", (None, None))
    n_in = words * 32 // grid.bits
    groups = -(-n_in // grid.group) if grid.group else 1
    check_part(files, f"{module}.qzeros", "i", (groups, -(-n_out * grid.bits // 32)))
    check_part(files, f"{module}.scales", "fV", (groups, n_out))
    parts = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    order = None
    if f"{module}.g_idx" in files:
        parts.append(f"{module}.g_idx")
        check_part(files, parts[-1], "i", (n_in,))
        order = files.read(parts[-1])
        if n_in and not 0 <= order.min() <= order.max() < groups:
            raise UserError(f"{files.file(parts[-1])}: tensor {parts[-1]!r} names groups that there are not")
        if np.array_equal(order, np.arange(n_in) // (grid.group or max(n_in, 1))):
            order = None

    def read() -> QArray | np.ndarray:
        codes = unpack_words(files.read(parts[0]).T, grid.bits, n_in)  # [out, in]
        zero = unpack_words(files.read(parts[1]), grid.bits, n_out).T + np.uint8(grid.offset)
        zero &= np.uint8(2**grid.bits - 1)
        scale = files.read(parts[2]).astype(np.float32).T
        if order is not None:  # each input has a scale of its own
            scale, zero = scale[:, order], zero[:, order]
            return (codes.astype(np.float32) - zero) * scale
        return _signed(codes, zero, scale, grid, files, parts[1])

    note = "its inputs are in the order of their importance (desc_act)" if order is not None else ""
    return Matrix(tuple(parts), (n_out, n_in), None if note else _kind(grid, n_in), read, note)


def _kind(grid: _Grid, n_in: int) -> tuple[Any, ...]:
    return grid.bits, _group(grid, n_in), grid.symmetric


def _group(grid: _Grid, n_in: int) -> int:
    return 0 if grid.group >= n_in else grid.group


def _signed(codes, zero, scale, grid: _Grid, files: TensorFiles, name: str) -> QArray:
    """Codes and zeros from ``-2**(bits-1)`` on, where theirs are from 0 on."""
    half = 2 ** (grid.bits - 1)
    codes, zero = (codes.astype(np.int16) - half).astype(np.int8), (zero.astype(np.int16) - half).astype(np.int8)
    if grid.symmetric and zero.any():
        raise UserError(f"{files.file(name)}: {name!r} is not that of a symmetric grid, as quantization_config says")
    return as_qarray(codes, scale, None if grid.symmetric else zero, grid.bits, _group(grid, codes.shape[1]))


# AWQ ------------------------------------------------------------------------------------------------------------------


def find_awq(files: TensorFiles, config: Mapping[str, Any]) -> dict[str, Matrix]:
    """The matrices of a model whose quantization_config is this one. UserError on what is not understood."""
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise UserError(f"version = {version!r} of the AWQ layout is not supported; only gemm")
    if config.get("zero_point") is False:
        raise UserError("zero_point = false is not supported in the AWQ layout; it stores zero points")
    grid = _read_grid(config, (4,), symmetric=False)
    return {f"{module}.weight": _awq(files, module, grid) for module in _modules(files)}


def _awq(files: TensorFiles, module: str, grid: _Grid) -> Matrix:
    n_in, words = check_part(files, f"{module}.qweight", "i", (None, None))
    n_out = words * 32 // grid.bits
    groups = -(-n_in // grid.group) if grid.group else 1
    check_part(files, f"{module}.qzeros", "i", (groups, words))
    check_part(files, f"{module}.scales", "fV", (groups, n_out))
    parts = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))

    def unpack(name: str) -> np.ndarray:
        stored = unpack_words(files.read(name), grid.bits, n_out).reshape(-1, words, len(_AWQ_ORDER))
        ordered = np.empty_like(stored)
        ordered[..., list(_AWQ_ORDER)] = stored
        return ordered.reshape(-1, n_out).T

    def read() -> QArray:
        scale = files.read(parts[2]).astype(np.float32).T
        return _signed(unpack(parts[0]), unpack(parts[1]), scale, grid, files, parts[1])

    return Matrix(parts, (n_out, n_in), _kind(grid, n_in), read)
