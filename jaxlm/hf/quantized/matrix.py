"""Quantized matrices in a Hugging Face model directory, and their files shown as those of the dense model.

A layout stores a matrix as several tensors. ``QuantizedTensorFiles`` shows them as the tensor ``NAME.weight`` of the
dense model, and gives access to the codes by ``matrices``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, QArray, expand_groups
from jaxlm.hf.tensor_files import TensorFiles

__all__ = [
    "MatrixValues", "QuantizedMatrix", "QuantizedTensorFiles", "check_tensor", "dequantize_matrix", "make_qarray",
]

MatrixValues = QArray | Codebook | np.ndarray  # codes, or float values [out, in]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix of a file.

    - ``stored_names`` are the names of the tensors that store it.
    - ``shape`` is that of the dense weight, ``(out, in)``.
    - ``stack_key`` says how it is quantized. Matrices can be stacked as one leaf where their keys are equal; None is
      for a matrix that can only be read dense.
    - ``read`` gives a QArray or Codebook of NumPy arrays, or float values ``[out, in]``.
    - ``dense_reason`` says why it can only be read dense, where somebody should know.
    - ``note`` says what else somebody should know.
    """

    stored_names: tuple[str, ...]
    shape: tuple[int, int]
    stack_key: tuple[Any, ...] | None
    read: Callable[[], MatrixValues]
    dense_reason: str = ""
    note: str = ""


class QuantizedTensorFiles(Mapping[str, np.ndarray]):
    """``TensorFiles`` in which every matrix of a layout appears as one dense tensor, ``NAME.weight``.

    Raises:
        UserError: a matrix is stored twice, dense and quantized.
    """

    def __init__(self, raw: TensorFiles, matrices: Mapping[str, QuantizedMatrix]):
        self.raw, self.matrices = raw, matrices
        self.directory = raw.directory
        stored = {name for matrix in matrices.values() for name in matrix.stored_names}
        self._dense = [name for name in raw if name not in stored]
        for name in matrices:
            if name in self._dense:
                raise UserError(f"{raw.path_of(name)}: {name!r} is there dense and quantized; save the model again")

    def __iter__(self) -> Iterator[str]:
        yield from self._dense
        yield from self.matrices

    def __len__(self) -> int:
        return len(self._dense) + len(self.matrices)

    def __contains__(self, name: object) -> bool:
        return name in self.matrices or name in self.raw

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    @property
    def nbytes(self) -> int:
        """The size of all files on disk."""
        return self.raw.nbytes

    def nbytes_of(self, name: str) -> int:
        """The bytes that a tensor takes in the files."""
        return sum(self.raw.nbytes_of(each) for each in self._stored_names(name))

    def path_of(self, name: str) -> Path:
        """The file of a tensor."""
        return self.raw.path_of(self._stored_names(name)[0])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.matrices[name].shape if name in self.matrices else self.raw.shape(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor, dense."""
        return dequantize_matrix(self.matrices[name].read()) if name in self.matrices else self.raw.read(name)

    def view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor that must have this shape, as a view of the file where it is stored dense."""
        return self.read(name) if name in self.matrices else self.raw.view(name, shape)

    def release(self, name: str) -> None:
        """Takes the pages of a tensor out of this process's memory."""
        for each in self._stored_names(name):
            self.raw.release(each)

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, dense."""
        return self.read(name)[index] if name in self.matrices else self.raw.read_slice(name, index)

    def _stored_names(self, name: str) -> tuple[str, ...]:
        return self.matrices[name].stored_names if name in self.matrices else (name,)


def dequantize_matrix(matrix: MatrixValues) -> np.ndarray:
    """The dense values ``[..., out, in]`` of a matrix, in NumPy."""
    if isinstance(matrix, np.ndarray):
        return matrix
    n_in = matrix.codes.shape[-1]
    codes = matrix.table[matrix.codes] if isinstance(matrix, Codebook) else matrix.codes.astype(np.float32)
    if isinstance(matrix, QArray) and matrix.zero is not None:
        codes -= expand_groups(matrix.zero, matrix.group, n_in).astype(np.float32)
    return codes * expand_groups(matrix.scale, matrix.group, n_in)


def make_qarray(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int, group: int, act_bits: int = 0,
    act_scale: np.ndarray | None = None,
) -> QArray:
    """A QArray of NumPy arrays, which get the types that QArray asks for."""
    scale = np.ascontiguousarray(scale, np.float32)
    zero = None if zero is None else np.ascontiguousarray(zero, np.int8)
    return QArray(np.ascontiguousarray(codes), scale, zero, bits, group, act_bits, -2, act_scale)


def check_tensor(files: TensorFiles, name: str, kinds: str, shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """The shape of a tensor, which is checked.

    Args:
        kinds: NumPy's letters for the kinds of types that are allowed, where "V" is float8 and bfloat16; or "int32", or
            "uint8".
        shape: the shape it must have; None stands for any size.

    Raises:
        UserError: its type or shape is another.
    """
    found, dtype = files.shape(name), files.dtype(name)
    fits = len(found) == len(shape) and all(size in (None, each) for each, size in zip(found, shape, strict=True))
    if not fits or (dtype != np.dtype(kinds) if kinds in ("int32", "uint8") else dtype.kind not in kinds):
        expected = " x ".join("?" if size is None else str(size) for size in shape)
        raise UserError(
            f"{files.path_of(name)}: tensor {name!r} is {dtype}{list(found)}, which this layout cannot be (it should "
            f"be {expected}); check quantization_config or copy the model again"
        )
    return found
