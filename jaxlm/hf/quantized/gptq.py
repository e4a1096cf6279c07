"""The layout of AutoGPTQ and GPTQModel; read only.

For a linear map of ``in`` inputs and ``out`` outputs the tensors are (see ``hf.quantized.qweight`` for their meaning)

    NAME.qweight    [in * bits / 32, out], words along the inputs
    NAME.qzeros     [groups, out * bits / 32], words along the outputs: z - 1, or z in checkpoint_format "gptq_v2"
    NAME.scales     [groups, out]
    NAME.g_idx      [in], the group of each input
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.hf.quantized.matrix import MatrixValues, QuantizedMatrix, check_tensor
from jaxlm.hf.quantized.packing import unpack_int32
from jaxlm.hf.quantized.qweight import IntegerGrid, first_field, modules_with_qweight, read_grid
from jaxlm.hf.tensor_files import TensorFiles

__all__ = ["gptq_matrices"]

_FAR, _NEAR = 0.7, 0.3  # steps


def gptq_matrices(files: TensorFiles, config: Mapping[str, Any]) -> dict[str, QuantizedMatrix]:
    """The quantized matrices of a model with this quantization_config.

    Raises:
        UserError: something in it is not supported, or tensors do not fit it.
    """
    version = first_field(config, "checkpoint_format", "format", default="gptq")
    if version not in ("gptq", "gptq_v2"):
        raise UserError(f"checkpoint_format = {version!r} is not supported; only gptq and gptq_v2")
    if any(not str(name).startswith("-:") for name in config.get("dynamic") or ()):
        raise UserError("dynamic, other grids for some layers, is not supported in the GPTQ layout")
    symmetric = bool(first_field(config, "sym", default=True))
    grid = read_grid(config, (2, 3, 4, 8), symmetric=symmetric, zero_offset=int(version == "gptq"))
    modules = modules_with_qweight(files)
    grid, note = _by_zero_points(files, modules[0], grid)
    return {f"{module}.weight": _matrix(files, module, grid, note) for module in modules}


def _by_zero_points(files: TensorFiles, module: str, grid: IntegerGrid) -> tuple[IntegerGrid, str]:
    """The grid, and a note, where the zero points of ``module`` are not those of the format that the file names. Some
    writers name "gptq" and store "gptq_v2".

    Those of a symmetric grid are all in its middle. Other grids leave one sign only: the weights of a network average
    about 0. Where these average a whole step more or less, the note tells the user what to try.
    """
    _check_tensors(files, module, grid)
    words, n_out = files.shape(f"{module}.qweight")
    stored = unpack_int32(files.read(f"{module}.qzeros"), grid.bits, n_out)
    other = dataclasses.replace(grid, zero_offset=1 - grid.zero_offset)
    name = "gptq" if other.zero_offset else "gptq_v2"
    if grid.symmetric:
        if (other.zero_points(stored) != 2 ** (grid.bits - 1)).any():
            return grid, ""
        return other, f"their zero points are those of checkpoint_format {name}, and are read as such"
    codes = unpack_int32(files.read(f"{module}.qweight").T, grid.bits, words * 32 // grid.bits)
    steps, others = (abs(codes.mean() - each.zero_points(stored).mean()) for each in (grid, other))
    if steps < _FAR or others > _NEAR:
        return grid, ""
    return grid, (
        f"their weights average {steps:.1f} steps from 0, and {others:.1f} by checkpoint_format {name}; if the model's "
        "text is poor, set that in quantization_config"
    )


def _check_tensors(files: TensorFiles, module: str, grid: IntegerGrid) -> tuple[int, int, int]:
    """(inputs, outputs, groups) of a matrix whose tensors fit each other."""
    words, n_out = check_tensor(files, f"{module}.qweight", "int32", (None, None))
    n_in = words * 32 // grid.bits
    groups = grid.num_groups(n_in)
    check_tensor(files, f"{module}.qzeros", "int32", (groups, -(-n_out * grid.bits // 32)))
    check_tensor(files, f"{module}.scales", "fV", (groups, n_out))
    return n_in, n_out, groups


def _matrix(files: TensorFiles, module: str, grid: IntegerGrid, note: str) -> QuantizedMatrix:
    names = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    n_in, n_out, groups = _check_tensors(files, module, grid)
    group_of_input = None  # None where groups are runs of inputs
    if f"{module}.g_idx" in files:
        names.append(f"{module}.g_idx")
        check_tensor(files, names[-1], "i", (n_in,))
        group_of_input = files.read(names[-1])
        if n_in and not 0 <= group_of_input.min() <= group_of_input.max() < groups:
            raise UserError(f"{files.path_of(names[-1])}: tensor {names[-1]!r} names groups that do not exist")
        if np.array_equal(group_of_input, np.arange(n_in) // (grid.group or max(n_in, 1))):
            group_of_input = None

    def read() -> MatrixValues:
        codes = unpack_int32(files.read(names[0]).T, grid.bits, n_in)  # [out, in]
        zero = grid.zero_points(unpack_int32(files.read(names[1]), grid.bits, n_out)).T
        scale = files.read(names[2]).astype(np.float32).T
        if group_of_input is not None:  # a QArray has no such order: dense values
            scale, zero = scale[:, group_of_input], zero[:, group_of_input]
            return (codes.astype(np.float32) - zero) * scale
        return grid.qarray(codes, zero, scale, files, names[1])

    reason = "" if group_of_input is None else "its inputs are in the order of their importance (desc_act)"
    key = None if reason else grid.stack_key(n_in)
    return QuantizedMatrix(tuple(names), (n_out, n_in), key, read, reason, note)
