"""The container of GGUF, the file format of llama.cpp (github.com/ggml-org/ggml, docs/gguf.md).

A file is a header, typed key-value pairs, a table of tensors, and their data, each tensor at a multiple of 32 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxlm.hf.gguf.ggml_types import GGML_TYPES
from jaxlm.hf.tensor_files import LazyTensor

__all__ = ["GgufTensor", "write_gguf"]

_ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # numbers of the types of values


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: its type (a key of ``GGML_TYPES``), its shape with outputs first, and its bytes."""

    type: str
    shape: tuple[int, ...]
    data: LazyTensor


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]
) -> None:
    """Writes a file, one tensor at a time.

    Integers of the metadata are stored as uint32 (in lists as int32), other numbers as float32. The values of a list
    must have one type.
    """
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key))
            _write_value(file, value)
        offset = 0
        for name, tensor in tensors.items():
            rank, number = len(tensor.shape), GGML_TYPES[tensor.type].number
            file.write(_string(name) + struct.pack("<I", rank))
            file.write(struct.pack(f"<{rank}Q", *tensor.shape[::-1]) + struct.pack("<IQ", number, offset))
            offset += tensor.data.nbytes + -tensor.data.nbytes % _ALIGNMENT
        for tensor in tensors.values():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            file.write(np.ascontiguousarray(tensor.data.make()).reshape(-1).view(np.uint8).data)
        file.write(bytes(-file.tell() % _ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _write_value(file: BinaryIO, value: Any) -> None:
    if isinstance(value, list):
        kind, form = _list_type(value)
        file.write(struct.pack("<IIQ", _ARRAY, kind, len(value)))
        file.write(b"".join(map(_string, value)) if kind == _STRING else struct.pack(f"<{len(value)}{form}", *value))
    elif isinstance(value, bool):
        file.write(struct.pack("<I?", _BOOL, value))
    elif isinstance(value, int):
        file.write(struct.pack("<II", _UINT32, value))
    elif isinstance(value, float):
        file.write(struct.pack("<If", _FLOAT32, value))
    else:
        file.write(struct.pack("<I", _STRING) + _string(value))


def _list_type(values: Sequence[Any]) -> tuple[int, str]:
    """(number of the type of the values, how ``struct`` packs one)."""
    if isinstance(values[0], str):
        return _STRING, ""
    return (_FLOAT32, "f") if isinstance(values[0], float) else (_INT32, "i")
