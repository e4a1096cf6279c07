"""Safetensors files of a model directory, one or many: reading and writing, with errors that name file and tensor."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlm.core.errors import UserError
from jaxlm.core.untrusted import parse_json
from jaxlm.hf.tensor_checksums import FileChecksums, block_checksums, checksum_metadata, unknown_checksums

__all__ = ["WEIGHTS_FILE", "INDEX_FILE", "LazyTensor", "TensorFiles", "write_file", "write_tensors", "written_bytes"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}
_FLOATS = "fV"  # NumPy's kinds of floats; those of ml_dtypes are "V"
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is stored."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a model directory: of model.safetensors (or another file), or of the files that its index names.

    Opening reads only the headers, which the safetensors library checks against the size of the file. Nothing is
    allocated for a tensor before it is read. ``metadata`` is what the headers say about the files themselves.

    Raises:
        UserError: a file is missing or damaged, or holds pickled objects. Those are never opened, because reading them
            can run any code.
    """

    def __init__(self, directory: Path, file: str = WEIGHTS_FILE):
        self.directory = directory
        index = None if (directory / file).exists() else self._read_index()
        self._entries: dict[str, _Entry] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self.metadata: dict[str, str] = {}
        self._checksums: dict[Path, FileChecksums] = {}
        for name in [file] if index is None else sorted(set(index.values())):
            self._open(directory / name)
        for tensor, name in (index or {}).items():
            if tensor not in self._entries or self._entries[tensor].path != directory / name:
                raise UserError(
                    f"{directory / name} has no tensor {tensor!r}, though {INDEX_FILE} says so; copy both again"
                )

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        path = self.directory / INDEX_FILE
        if not path.is_file():
            pickled = sorted(file.name for pattern in _PICKLED for file in self.directory.glob(pattern))
            if pickled:
                where = repr(str(self.directory))
                raise UserError(
                    f"{self.directory / pickled[0]} holds pickled weights, which can run code when they are read; "
                    f"where you trust them, convert them with transformers: "
                    f"AutoModel.from_pretrained({where}).save_pretrained({where})"
                )
            raise UserError(
                f"{self.directory} has no {WEIGHTS_FILE}; name a model directory with its weights as safetensors"
            )
        try:
            weight_map = parse_json(path.read_text(encoding="utf-8"))["weight_map"]
            if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{path} is not an index of safetensors files; copy the model directory again") from None
        for name in weight_map.values():
            if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
                raise UserError(f"{path} names {name!r}, which is not a safetensors file beside it; copy both again")
        return weight_map

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="numpy") as file:  # checks lengths, offsets, types and shapes
                metadata = file.metadata() or {}
            with path.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                header = parse_json(raw.read(length))
            self._checksums[path] = FileChecksums(header)
            with path.open("rb") as raw:
                self._maps[path] = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; copy the model directory again") from None
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is damaged or cannot be read ({reason}); copy or save it again") from None
        self.metadata |= metadata
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in self._entries:
                other = self._entries[name].path.name
                raise UserError(f"{path}: tensor {name!r} is in {other} too; save the model again")
            start = 8 + length + entry["data_offsets"][0]
            self._entries[name] = _Entry(path, entry["dtype"], tuple(entry["shape"]), start)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    @property
    def nbytes(self) -> int:
        """The size of all files on disk."""
        return sum(path.stat().st_size for path in self._maps)

    def path_of(self, name: str) -> Path:
        """The file of a tensor."""
        return self._entry(name).path

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def nbytes_of(self, name: str) -> int:
        """The size of a tensor in bytes."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor.

        Raises:
            UserError: NumPy has no such type.
        """
        entry = self._entry(name)
        if entry.dtype not in _DTYPES:
            raise UserError(f"{entry.path}: tensor {name!r} is of the type {entry.dtype}, which is not supported")
        return _DTYPES[entry.dtype]

    def read(self, name: str) -> np.ndarray:
        """A tensor, in the type in which it is stored."""
        return np.array(self.read_slice(name, ()))

    def check_floats(self, name: str) -> None:
        """Raises UserError where a tensor, which must hold weights or scales, is not of a floating-point type."""
        if self.dtype(name).kind not in _FLOATS:
            raise UserError(
                f"{self.path_of(name)}: tensor {name!r} is of the type {self.dtype(name)}, and weights are floats; "
                "copy or save it again"
            )

    def read_floats(self, name: str) -> np.ndarray:
        """A tensor of floats. Raises as ``check_floats``."""
        self.check_floats(name)
        return self.read(name)

    def view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as a view of the file.

        Raises:
            UserError: it does not have this shape.
        """
        entry = self._entry(name)
        if entry.shape != tuple(shape):
            raise UserError(
                f"{entry.path}: tensor {name!r} is {list(entry.shape)}, by config.json it should be {list(shape)}"
            )
        return self.read_slice(name, ())

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, as a view of the file: nothing else is read from disk.

        Raises:
            UserError: the file has checksums, and that of a block which has some of the part is wrong.
        """
        entry, dtype = self._entry(name), self.dtype(name)
        if math.prod(entry.shape) == 0:
            return np.zeros(entry.shape, dtype)[index]
        tensor = np.ndarray(entry.shape, dtype, buffer=self._maps[entry.path], offset=entry.start)
        part = tensor[(*index, ...)]  # with the dots a view also of a tensor without dimensions
        if part.size:
            begin = tensor.__array_interface__["data"][0]
            start, stop = (address - begin for address in np.lib.array_utils.byte_bounds(part))
            data = memoryview(self._maps[entry.path])[entry.start : entry.start + tensor.nbytes]
            if self._checksums[entry.path].is_damaged(name, data, start, stop):
                raise UserError(
                    f"{entry.path}: tensor {name!r} is damaged (its checksum is wrong); copy or save it again"
                )
        return part

    def release(self, name: str) -> None:
        """Takes the pages of a tensor out of this process's memory. A view of the tensor reads them again."""
        entry = self._entry(name)
        start = entry.start - entry.start % mmap.PAGESIZE
        size = math.prod(entry.shape) * self.dtype(name).itemsize
        if size and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[entry.path].madvise(mmap.MADV_DONTNEED, start, entry.start + size - start)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            where = next(iter(self._maps)) if len(self._maps) == 1 else self.directory
            raise UserError(f"{where} has no tensor {name!r}; it belongs to another model, or was saved incompletely")
        return self._entries[name]


@dataclass(frozen=True)
class LazyTensor:
    """An array that is made when it is written, so that only one is in memory at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    directory: Path, tensors: Mapping[str, np.ndarray | LazyTensor], metadata: str = "", *,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Writes model.safetensors, or several files and their index where the tensors take more than ``max_file_bytes``.

    ``metadata`` is stored in the header under "jaxlm". Equal arguments give equal bytes.
    """
    files = _split(tensors, max_file_bytes)
    if len(files) == 1:
        write_file(directory / WEIGHTS_FILE, files[0], metadata)
        return
    weight_map = {}
    for number, part in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(directory / name, part, metadata)
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def written_bytes(
    tensors: Mapping[str, np.ndarray | LazyTensor], metadata: str = "", *, max_file_bytes: int = 5 * 10**9
) -> int:
    """The size of the safetensors files that ``write_tensors`` would write, headers included, without making them."""
    files = _split(tensors, max_file_bytes)
    return sum(tensor.nbytes for tensor in tensors.values()) + sum(len(_header(file, metadata, {})) for file in files)


def _split(
    tensors: Mapping[str, np.ndarray | LazyTensor], max_file_bytes: int
) -> list[dict[str, np.ndarray | LazyTensor]]:
    """The tensors of each file."""
    files: list[dict[str, np.ndarray | LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > max_file_bytes:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    return files


def _in_order(tensors: Mapping[str, np.ndarray | LazyTensor]) -> list[tuple[str, np.ndarray | LazyTensor]]:
    """Larger types come first, so that all arrays are aligned."""
    return sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)


def _header(tensors: Mapping[str, np.ndarray | LazyTensor], metadata: str, checksums: Mapping[str, str]) -> bytes:
    """The length of the header in eight bytes, and the header. Checksums that are not known yet are zeros."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in _in_order(tensors):
        offsets = [end, end := end + tensor.nbytes]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    sums = {name: checksums.get(name, unknown_checksums(tensors[name].nbytes)) for name in entries}
    notes = {"format": "pt", "jaxlm": metadata}  # transformers asks for "pt"
    added = checksum_metadata({"__metadata__": notes} | entries, sums)
    notes |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in added.items()}
    text = json.dumps({"__metadata__": notes} | entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, tensors: Mapping[str, np.ndarray | LazyTensor], metadata: str = "") -> None:
    """Writes one file: eight bytes with the length of the header, the header in JSON, and the arrays end to end (see
    github.com/huggingface/safetensors)."""
    with path.open("wb") as file:
        file.write(_header(tensors, metadata, {}))
        checksums = {}
        for name, tensor in _in_order(tensors):
            array = np.ascontiguousarray(tensor.make() if isinstance(tensor, LazyTensor) else tensor)
            data = array.reshape(-1).view(np.uint8).data
            checksums[name] = block_checksums(data)
            file.write(data)
        file.seek(0)
        file.write(_header(tensors, metadata, checksums))

