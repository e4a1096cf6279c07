"""The layout of AutoAWQ (its "gemm" version); read only.

For a linear map of ``in`` inputs and ``out`` outputs the tensors are (see ``hf.quantized.qweight`` for their meaning)

    NAME.qweight    [in, out * bits / 32], words along the outputs
    NAME.qzeros     [groups, out * bits / 32], words along the outputs
    NAME.scales     [groups, out]

The eight codes of a word stand in the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray
from jaxlm.hf.quantized.matrix import QuantizedMatrix, check_tensor
from jaxlm.hf.quantized.packing import unpack_int32
from jaxlm.hf.quantized.qweight import IntegerGrid, modules_with_qweight, read_grid
from jaxlm.hf.tensor_files import TensorFiles

__all__ = ["awq_matrices"]

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_matrices(files: TensorFiles, config: Mapping[str, Any]) -> dict[str, QuantizedMatrix]:
    """The quantized matrices of a model with this quantization_config.

    Raises:
        UserError: something in it is not supported, or tensors do not fit it.
    """
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise UserError(f"version = {version!r} of the AWQ layout is not supported; only gemm")
    modules = modules_with_qweight(files)
    # auto-round writes zero_point = false for symmetric grids, and zero points, which every kernel uses.
    symmetric = config.get("zero_point") is False and all(_symmetric(files, module) for module in modules)
    grid = read_grid(config, (4,), symmetric=symmetric)
    return {f"{module}.weight": _matrix(files, module, grid) for module in modules}


def _symmetric(files: TensorFiles, module: str) -> bool:
    """Whether all zero points are in the middle of the grid; a stored 8, eight times a word."""
    if f"{module}.qzeros" not in files:
        raise UserError(f"zero_point is false and {module}.qzeros is missing; only models with zero points are read")
    check_tensor(files, f"{module}.qzeros", "int32", (None, None))
    return bool((files.read(f"{module}.qzeros").view(np.uint32) == 0x88888888).all())


def _matrix(files: TensorFiles, module: str, grid: IntegerGrid) -> QuantizedMatrix:
    names = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    n_in, words = check_tensor(files, names[0], "int32", (None, None))
    n_out = words * 32 // grid.bits
    groups = grid.num_groups(n_in)
    check_tensor(files, names[1], "int32", (groups, words))
    check_tensor(files, names[2], "fV", (groups, n_out))

    def unpack(name: str) -> np.ndarray:
        stored = unpack_int32(files.read(name), grid.bits, n_out).reshape(-1, words, len(_ORDER))
        ordered = np.empty_like(stored)
        ordered[..., list(_ORDER)] = stored
        return ordered.reshape(-1, n_out).T

    def read() -> QArray:
        scale = files.read(names[2]).astype(np.float32).T
        return grid.qarray(unpack(names[0]), unpack(names[1]), scale, files, names[1])

    return QuantizedMatrix(names, (n_out, n_in), grid.stack_key(n_in), read)
