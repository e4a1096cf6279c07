"""Reads JSONL files of any size: one JSON object ("row") a line.

A file is indexed once and memory-mapped, so that rows are read one by one, and mistakes are reported by line number.
The index (where lines start, and a hash of the content) of a large file is kept beside it in ``NAME.index.npy``, if
that directory can be written to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from jaxlm.core.disk import replaced_file
from jaxlm.core.errors import UserError
from jaxlm.core.untrusted import parse_json
from jaxlm.data.sources.slices import Slicer
from jaxlm.data.sources.text_files import is_compressed, read_bytes, readable

T = TypeVar("T")
BadRows = Literal["fail", "report"]
_MIN_BYTES_TO_INDEX = 1 << 26  # size of the files whose index is kept on disk
_MAX_LINE = 1 << 26  # bytes; a longer line means that the file has no line ends
_BLOCK = 1 << 24  # bytes scanned at a time
_SHOWN = 5  # line numbers named for each kind of mistake


class RowError(Exception):
    """A row that cannot be used: what is wrong with it, and what to do."""

    def __init__(self, what: str, remedy: str = "correct or remove the line"):
        super().__init__(what)
        self.what, self.remedy = what, remedy


class JsonlRows(Generic[T]):
    """The rows of a file. They can be iterated as often as needed.

    Iteration skips blank lines. With ``bad_rows`` "report" it also skips the rows that ``parse`` or a later reader
    rejects, and ``rejected`` says why, by line number in the file (from 1). With "fail" the first such row is a
    UserError.
    """

    def __init__(
        self, path: str | Path, parse: Callable[[Mapping[str, Any]], T], slicer: Slicer, bad_rows: BadRows = "fail"
    ):
        """
        Args:
            path: the file, plain or compressed.
            parse: from the object of a line to the row; raises RowError for a row that cannot be used. It must be a
                function of a module, because it is pickled for other processes.
            slicer: which lines to read.
            bad_rows: what to do about rows that cannot be used.
        """
        self.path, self.bad_rows, self.rejected = Path(path).expanduser(), bad_rows, dict[int, str]()
        self._parse = parse
        self._index = _index(self.path)
        selected = slicer(len(self._index.starts))
        self._first, self._stop = selected.start, selected.stop

    def __len__(self) -> int:
        """The number of lines, with blank and rejected ones."""
        return self._stop - self._first

    def __iter__(self) -> Iterator[T]:
        return (row for _, row in self.numbered())

    @property
    def content_key(self) -> str:
        """Equal for rows with the same content: the same bytes of the file, the same lines, the same ``parse``."""
        return f"{self._index.content_hash} {self._first}:{self._stop} {self._parse.__qualname__}"

    @property
    def size(self) -> int:
        """Bytes of the lines."""
        return int(self._start_of(self._stop) - self._start_of(self._first))

    def shard(self, index: int, num_shards: int) -> JsonlRows[T]:
        """Shard ``index`` of ``num_shards``: consecutive lines. Shards have about as many bytes each, and together hold
        all lines."""
        starts = self._index.starts[self._first : self._stop]
        bounds = self._start_of(self._first) + self.size * np.array([index, index + 1]) / num_shards
        low, high = (self._first + int(line) for line in np.searchsorted(starts, bounds))
        rows = object.__new__(JsonlRows)
        stop = self._stop if index == num_shards - 1 else high
        rows.__dict__ |= self.__dict__ | {"rejected": {}, "_first": low, "_stop": stop}
        rows.__dict__.pop("_data", None)
        return rows

    def numbered(self) -> Iterator[tuple[int, T]]:
        """(line number, row)."""
        for number in range(self._first, self._stop):
            line = self._data[self._start_of(number) : self._start_of(number + 1)]
            if line.strip():
                try:
                    row = self._parse(_parse_line(line, first=number == 0))
                except RowError as error:
                    self.reject(number + 1, error)
                    continue
                yield number + 1, row

    def reject(self, number: int, error: RowError) -> None:
        """Records that the row of a line cannot be used.

        Raises:
            UserError: when ``bad_rows`` is "fail".
        """
        if self.bad_rows == "fail":
            raise UserError(f"{self.path}:{number}: {error.what}; {error.remedy}") from None
        self.rejected[number] = error.what

    def notes(self) -> list[str]:
        """A sentence about the rejected rows, if any: how many, why, and which lines."""
        if not self.rejected:
            return []
        kinds = []
        for what, count in Counter(self.rejected.values()).most_common():
            lines = sorted(number for number, why in self.rejected.items() if why == what)
            more = ", ..." if count > _SHOWN else ""
            which = ", ".join(map(str, lines[:_SHOWN]))
            kinds.append(f"{count:,} {what} (line{'s' * (count > 1)} {which}{more})")
        return [f"{len(self.rejected):,} of {len(self):,} rows of {self.path} are left out: {'; '.join(kinds)}"]

    def _start_of(self, line: int) -> int:
        """The first byte of a line; the size of the file after the last line."""
        starts = self._index.starts
        return int(starts[line]) if line < len(starts) else self._index.size

    @cached_property
    def _data(self) -> bytes | mmap.mmap:
        if is_compressed(self.path):
            return read_bytes(self.path)
        with readable(self.path), open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_data", "_index")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._index = _index(self.path)


def _parse_line(line: bytes, first: bool) -> Mapping[str, Any]:
    """The object of a line. Raises RowError when the line is no object, or its strings are not Unicode text."""
    if len(line) > _MAX_LINE:
        raise RowError(f"longer than {_MAX_LINE >> 20} MiB", "end each row in a newline")
    try:
        row = parse_json(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"invalid UTF-8 (byte 0x{line[error.start]:02x})", "convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        if b"\r" in line.strip():
            raise RowError("several rows separated by a bare \\r", "end each row in \\n") from None
        raise RowError(f"not JSON ({error.msg})", "write one object a line") from None
    except ValueError as error:
        raise RowError(str(error)) from None
    if not isinstance(row, dict):
        raise RowError("not an object", "write one object a line")
    if b"\\ud" in line or b"\\uD" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RowError("half of a surrogate pair, which is not a character") from None
    return row


@dataclass(frozen=True)
class _Index:
    size: int
    content_hash: str
    starts: np.ndarray  # the first byte of each line, int64


def _index(path: Path) -> _Index:
    """The index of a file: from ``NAME.index.npy`` if that belongs to the file as it is now, or else made anew."""
    if is_compressed(path):
        data = read_bytes(path)
        return _scan(iter([data]), len(data))
    with readable(path):
        stat = path.stat()
        saved = Path(f"{path}.index.npy")
        stamp = [stat.st_size, stat.st_mtime_ns]
        try:
            array = np.load(saved, mmap_mode="r", allow_pickle=False)
            if array.dtype == np.int64 and array.ndim == 1 and len(array) >= 5 and array[:2].tolist() == stamp:
                if array[2] == zlib.crc32(array[3:]):
                    return _Index(stat.st_size, array[3:5].tobytes().hex(), array[5:])
        except Exception:  # NumPy raises all kinds
            pass  # there is none, or it is damaged
        if not stat.st_size:
            raise UserError(f"{path} is empty; name a file with text in it")
        with open(path, "rb") as file:
            index = _scan(iter(lambda: file.read(_BLOCK), b""), stat.st_size)
    if stat.st_size >= _MIN_BYTES_TO_INDEX:
        content = np.concatenate([np.frombuffer(bytes.fromhex(index.content_hash), np.int64), index.starts])
        _save(saved, np.concatenate([np.array([*stamp, zlib.crc32(content)], np.int64), content]))
    return index


def _scan(blocks: Iterator[bytes], size: int) -> _Index:
    content_hash, starts, offset = hashlib.blake2b(digest_size=16), [np.zeros(1, np.int64)], 0
    for block in blocks:
        content_hash.update(block)
        starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (offset + 1))
        offset += len(block)
    starts = np.concatenate(starts)
    return _Index(size, content_hash.hexdigest(), starts[:-1] if starts[-1] == size else starts)


def _save(path: Path, array: np.ndarray) -> None:
    """Writes the index. If the directory cannot be written to, the index is made anew each time."""
    with contextlib.suppress(OSError, UserError):
        with replaced_file(path) as new, new.open("wb") as file:
            np.save(file, array)
