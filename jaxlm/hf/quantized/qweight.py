"""What the GPTQ and AWQ layouts share: matrices stored as NAME.qweight, NAME.qzeros and NAME.scales.

For a linear map of ``in`` inputs and ``out`` outputs both store codes ``q`` and zero points ``z``, counted from 0, in
int32 words, and float scales. A weight is ``(q - z) * scale``, with the zero point and scale of its group of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray
from jaxlm.hf.quantized.matrix import make_qarray
from jaxlm.hf.tensor_files import TensorFiles

__all__ = ["IntegerGrid", "first_field", "modules_with_qweight", "read_grid"]


@dataclass(frozen=True)
class IntegerGrid:
    """The grid of a quantized model.

    - ``group`` inputs share a scale; 0 is one scale an output.
    - ``zero_offset`` must be added to stored zero points.
    """

    bits: int
    group: int
    symmetric: bool
    zero_offset: int = 0

    def group_of(self, n_in: int) -> int:
        """``group`` for a matrix of ``n_in`` inputs, 0 where one group holds all of them."""
        return 0 if self.group >= n_in else self.group

    def zero_points(self, stored: np.ndarray) -> np.ndarray:
        """Zero points, counted from 0, of stored ones."""
        return (stored + np.uint8(self.zero_offset)) & np.uint8(2**self.bits - 1)

    def num_groups(self, n_in: int) -> int:
        return -(-n_in // self.group) if self.group else 1

    def stack_key(self, n_in: int) -> tuple[Any, ...]:
        """See ``QuantizedMatrix``."""
        return self.bits, self.group_of(n_in), self.symmetric

    def qarray(
        self, codes: np.ndarray, zero: np.ndarray, scale: np.ndarray, files: TensorFiles, zero_name: str
    ) -> QArray:
        """A QArray of codes ``[out, in]`` and zero points and scales ``[out, groups]``.

        The layouts count codes and zero points from 0, and QArray from ``-2**(bits-1)``.

        Raises:
            UserError: the grid is symmetric by quantization_config, and the zero points (stored as ``zero_name``) are
                not.
        """
        half = 2 ** (self.bits - 1)
        codes, zero = (codes.astype(np.int16) - half).astype(np.int8), (zero.astype(np.int16) - half).astype(np.int8)
        if self.symmetric and zero.any():
            raise UserError(
                f"{files.path_of(zero_name)}: {zero_name!r} is not that of a symmetric grid, as quantization_config "
                'says; set "sym": false there if these zero points count'
            )
        return make_qarray(codes, scale, None if self.symmetric else zero, self.bits, self.group_of(codes.shape[1]))


def first_field(config: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of several fields that is there and not null: releases of the packages name some differently."""
    return next((config[name] for name in names if config.get(name) is not None), default)


def read_grid(config: Mapping[str, Any], widths: tuple[int, ...], **more: Any) -> IntegerGrid:
    """The grid that quantization_config describes, of one of the ``widths`` in bits.

    Raises:
        UserError: it is not supported.
    """
    bits = first_field(config, "bits", "w_bit")
    group = first_field(config, "group_size", "q_group_size", default=-1)
    if bits not in widths or type(bits) is not int:
        raise UserError(f"bits = {bits!r} is not supported in this layout; only {', '.join(map(str, widths))}")
    if type(group) is not int or not (group == -1 or group > 0):
        raise UserError(f"group_size = {group!r} is not a size; it is -1 or a number of inputs")
    return IntegerGrid(bits, max(group, 0), **more)


def modules_with_qweight(files: TensorFiles) -> list[str]:
    """The names of the quantized linear maps.

    Raises:
        UserError: there is none.
    """
    names = [name.removesuffix(".qweight") for name in files if name.endswith(".qweight")]
    if not names:
        raise UserError("no tensor is called *.qweight, though quantization_config says that some are quantized")
    return names
