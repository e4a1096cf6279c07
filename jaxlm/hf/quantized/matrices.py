"""Quantized matrices in other projects' layouts: a Hugging Face directory whose config.json has quantization_config.

A layout stores a matrix as several tensors beside each other. ``MatrixFiles`` shows them as the one ``NAME.weight`` of
the dense model, with the codes to be had by ``matrices``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoint.bitpack import pack_bits, unpack_bits
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray
from jaxlm.hf.tensor_files import TensorFiles

__all__ = ["Matrix", "MatrixFiles", "as_qarray", "check_part", "matrix_values", "pack_words", "unpack_words"]

Values = QArray | np.ndarray


@dataclass(frozen=True)
class Matrix:
    """A matrix of a file.

    - ``parts`` are the tensors that it is stored as.
    - ``shape`` is that of the dense weight, ``(out, in)``.
    - ``grid`` is what matrices must have alike to be stacked as one leaf; None where it can only be dense.
    - ``read`` gives a QArray of NumPy arrays, or float values ``[out, in]``.
    - ``note`` says why it is not kept in codes, if so.
    """

    parts: tuple[str, ...]
    shape: tuple[int, int]
    grid: tuple[Any, ...] | None
    read: Callable[[], Values]
    note: str = ""


class MatrixFiles(Mapping[str, np.ndarray]):
    """``TensorFiles`` in which every matrix of a layout is one dense tensor, ``NAME.weight``."""

    def __init__(self, raw: TensorFiles, matrices: Mapping[str, Matrix]):
        self.raw, self.matrices = raw, matrices
        self.directory = raw.directory
        parts = {part for matrix in matrices.values() for part in matrix.parts}
        self._plain = [name for name in raw if name not in parts]
        for name in matrices:
            if name in self._plain:
                raise UserError(f"{raw.file(name)}: {name!r} is there twice, as codes too; save the model again")

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self.matrices

    def __len__(self) -> int:
        return len(self._plain) + len(self.matrices)

    def __contains__(self, name: object) -> bool:
        return name in self.matrices or name in self.raw

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    def size(self, name: str) -> int:
        """The bytes that a tensor takes in the files."""
        names = self.matrices[name].parts if name in self.matrices else (name,)
        return sum(self.raw.size(each) for each in names)

    def file(self, name: str) -> Path:
        return self.raw.file(self.matrices[name].parts[0] if name in self.matrices else name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.matrices[name].shape if name in self.matrices else self.raw.shape(name)

    def read(self, name: str) -> np.ndarray:
        return matrix_values(self.matrices[name].read()) if name in self.matrices else self.raw.read(name)

    def view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return self.read(name) if name in self.matrices else self.raw.view(name, shape)

    def release(self, name: str) -> None:
        for each in self.matrices[name].parts if name in self.matrices else (name,):
            self.raw.release(each)

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.read(name)[index] if name in self.matrices else self.raw.read_slice(name, index)


def matrix_values(matrix: Values) -> np.ndarray:
    """The dense ``[..., out, in]`` of a matrix, in NumPy."""
    if not isinstance(matrix, QArray):
        return matrix
    codes, n_in = matrix.codes.astype(np.float32), matrix.codes.shape[-1]
    if matrix.zero is not None:
        codes -= _spread(matrix.zero, matrix.group, n_in).astype(np.float32)
    return codes * _spread(matrix.scale, matrix.group, n_in)


def _spread(per_group: np.ndarray, group: int, n_in: int) -> np.ndarray:
    return per_group if per_group.shape[-1] == 1 else np.repeat(per_group, group, axis=-1)[..., :n_in]


def as_qarray(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int, group: int, act_bits: int = 0,
    act_scale: np.ndarray | None = None,
) -> QArray:
    """A QArray of NumPy arrays, whose parts have the types that its invariants ask for."""
    scale = np.ascontiguousarray(scale, np.float32)
    zero = None if zero is None else np.ascontiguousarray(zero, np.int8)
    return QArray(np.ascontiguousarray(codes), scale, zero, bits, group, act_bits, -2, act_scale)


def check_part(files: TensorFiles, name: str, kinds: str, shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """The shape of a tensor. UserError unless its type is of these kinds (NumPy's letters; "V" is float8 and bfloat16)
    and its shape this one, None standing for any size."""
    found, dtype = files.shape(name), files.dtype(name)
    fits = len(found) == len(shape) and all(due in (None, size) for size, due in zip(found, shape, strict=True))
    if dtype.kind not in kinds or not fits:
        due = " x ".join("?" if size is None else str(size) for size in shape)
        raise UserError(
            f"{files.file(name)}: tensor {name!r} is {dtype}{list(found)}, which this layout cannot be (it should be "
            f"{due}); check quantization_config or copy the model again"
        )
    return found


# Words ----------------------------------------------------------------------------------------------------------------


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[rows, columns]`` below ``2**bits`` as int32 ``[rows, ceil(columns * bits / 32)]``: each row's bits one
    after the other, the lowest first."""
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // 32) * 32), np.uint8)
    padded[:, :columns] = codes
    words = pack_bits(padded.reshape(-1), bits).view("<i4").reshape(rows, -1)
    return np.ascontiguousarray(words[:, : -(-columns * bits // 32)])


def unpack_words(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The uint8 codes ``[rows, columns]`` that ``pack_words`` packed; or that were packed ``32 // bits`` a word, which
    the number of words shows. ValueError where it fits neither."""
    rows, found = words.shape
    each = 32 // bits
    if found == -(-columns * bits // 32):
        padded = np.zeros((rows, -(-columns // 32) * bits), "<i4")
        padded[:, :found] = words
        count = rows * (padded.shape[1] * 32 // bits)
        codes = unpack_bits(padded.view(np.uint8).reshape(-1), bits, count).reshape(rows, -1)
    elif found == -(-columns // each):
        shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
        codes = (words.astype("<u4", copy=False)[:, :, None].view(np.uint32) >> shifts) & np.uint32(2**bits - 1)
        codes = codes.astype(np.uint8).reshape(rows, -1)
    else:
        raise ValueError(f"{found} words a row do not hold {columns} codes of {bits} bits")
    return codes[:, :columns]
