"""Safetensors files, one or many, read and written with complaints that name the file and the tensor."""

from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlm.core.errors import UserError

__all__ = ["FILE", "INDEX", "Lazy", "TensorFiles", "write_tensors"]

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CRC32 = "jaxlm.crc32"  # in the metadata: JSON, tensor -> checksum
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a model directory: those of model.safetensors (or another file), or of those that its index names.

    Opening reads headers only, and the safetensors library checks them against the size of the file; nothing is
    allocated for a tensor before it is read. UserError where a file is missing or damaged, or holds pickled objects:
    reading those can run any code, and they are never opened.
    """

    def __init__(self, directory: Path, file: str = FILE):
        self.directory = directory
        places = None if (directory / file).exists() else self._index()
        self._entries: dict[str, _Entry] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self.metadata: dict[str, str] = {}  # what the files say about themselves
        self._checksums: dict[str, str] = {}
        for name in [file] if places is None else sorted(set(places.values())):
            self._open(directory / name)
        for tensor, name in (places or {}).items():
            if tensor not in self._entries or self._entries[tensor].path != directory / name:
                raise UserError(f"{directory / name} has no tensor {tensor!r}, though {INDEX} says so; copy both again")

    def _index(self) -> dict[str, str]:
        """Tensor -> file name."""
        path = self.directory / INDEX
        if not path.is_file():
            pickled = sorted(file.name for pattern in _PICKLES for file in self.directory.glob(pattern))
            if pickled:
                where = repr(str(self.directory))
                raise UserError(
                    f"{self.directory / pickled[0]} holds pickled weights, which can run code when they are read; "
                    f"where you trust them, convert them with transformers: "
                    f"AutoModel.from_pretrained({where}).save_pretrained({where})"
                )
            raise UserError(f"{self.directory} has no {FILE}; name a model directory with its weights as safetensors")
        try:
            places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if not places or not all(isinstance(name, str) for name in places.values()):
                raise ValueError
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise UserError(f"{path} is not an index of safetensors files; copy the model directory again") from None
        for name in places.values():
            if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
                raise UserError(f"{path} names {name!r}, which is not a safetensors file beside it; copy both again")
        return places

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="numpy") as file:  # checks lengths, offsets, types and shapes
                metadata = file.metadata() or {}
            with path.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(length))
            checksums = dict(json.loads(metadata.get(_CRC32, "{}")))
            with path.open("rb") as raw:
                self._maps[path] = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; copy the model directory again") from None
        except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is damaged or cannot be read ({reason}); copy or save it again") from None
        self.metadata |= metadata
        header.pop("__metadata__", None)
        self._checksums |= checksums
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
        """On disk."""
        return sum(path.stat().st_size for path in self._maps)

    def file(self, name: str) -> Path:
        """Where a tensor is. UserError if it is nowhere."""
        return self._entry(name).path

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def dtype(self, name: str) -> np.dtype:
        """UserError where it is one that numpy has not."""
        entry = self._entry(name)
        if entry.dtype not in _DTYPES:
            raise UserError(f"{entry.path}: tensor {name!r} is of the type {entry.dtype}, which is not supported")
        return _DTYPES[entry.dtype]

    def read(self, name: str) -> np.ndarray:
        """A tensor, in the type it is stored in."""
        return np.array(self.read_slice(name, ()))

    def view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor as a view of the file. UserError unless it has this shape."""
        entry = self._entry(name)
        if entry.shape != tuple(shape):
            raise UserError(
                f"{entry.path}: tensor {name!r} is {list(entry.shape)}, by config.json it should be {list(shape)}"
            )
        return self.read_slice(name, ())

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, as a view of the file: nothing else is read from disk.

        Where it is the whole of a tensor that has a checksum, UserError if that is wrong.
        """
        entry, dtype = self._entry(name), self.dtype(name)
        if math.prod(entry.shape) == 0:
            return np.zeros(entry.shape, dtype)[index]
        whole = np.ndarray(entry.shape, dtype, buffer=self._maps[entry.path], offset=entry.start)
        part = whole[index]
        if part.shape == whole.shape and name in self._checksums and self._checksums[name] != _crc32(whole):
            raise UserError(f"{entry.path}: tensor {name!r} is damaged (its checksum is wrong); copy or save it again")
        return part

    def release(self, name: str) -> None:
        """Takes the pages of a tensor out of this process's memory; a view of it reads them again."""
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
class Lazy:
    """An array that is made when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    directory: Path, tensors: Mapping[str, np.ndarray | Lazy], note: str = "", *, max_file_bytes: int = 5 * 10**9
) -> None:
    """Writes model.safetensors, or several files and their index where there is more than ``max_file_bytes``.

    ``note`` goes into the metadata under "jaxlm". The same arguments give the same bytes. One array at a time is made.
    """
    files: list[dict[str, np.ndarray | Lazy]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > max_file_bytes:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    if len(files) == 1:
        _write_file(directory / FILE, files[0], note)
        return
    places = {}
    for number, part in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(directory / name, part, note)
        places |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Mapping[str, np.ndarray | Lazy], note: str) -> None:
    """The format is eight bytes of length, a JSON header of that length, and the arrays end to end; see
    github.com/huggingface/safetensors. Larger types come first, so that all are aligned."""
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in order:
        offsets = [end, end := end + tensor.nbytes]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def header(checksums: dict[str, str]) -> bytes:
        metadata = {"format": "pt", "jaxlm": note, _CRC32: json.dumps(checksums)}  # transformers wants to be told "pt"
        text = json.dumps({"__metadata__": metadata} | entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with path.open("wb") as file:
        file.write(header({name: "0" * 8 for name, _ in order}))
        checksums = {}
        for name, tensor in order:
            array = np.ascontiguousarray(tensor.make() if isinstance(tensor, Lazy) else tensor)
            checksums[name] = _crc32(array)
            file.write(array.reshape(-1).view(np.uint8).data)
        file.seek(0)
        file.write(header(checksums))


def _crc32(array: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"
