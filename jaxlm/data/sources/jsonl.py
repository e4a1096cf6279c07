"""JSONL of any size: a row a line, indexed once, mapped instead of read, and what is wrong with rows told by line.

The index (where lines start, and a digest of the content) of a large file is kept beside it, in ``NAME.index.npy``,
where that directory may be written to.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.sources.text_files import is_compressed, read_bytes, readable

T = TypeVar("T")
BadRows = Literal["fail", "report"]
_WORTH_KEEPING = 1 << 26  # bytes of a file whose index is kept on disk
_LONGEST = 1 << 26  # bytes of a line: a longer one is a file whose line ends are missing
_BLOCK = 1 << 24
_SHOWN = 5  # lines named of each kind of mistake


class RowError(Exception):
    """A row that cannot be used: what is wrong with it, and what to do."""

    def __init__(self, what: str, remedy: str = "correct or remove the line"):
        super().__init__(what)
        self.what, self.remedy = what, remedy


class JsonlRows(Generic[T]):
    """The rows of a file, read one after another, as often as asked.

    Iteration skips blank lines, and, where ``bad_rows`` is "report", those that ``read`` or a later reader rejects:
    ``bad`` has them by their number in the file, from 1. Where it is "fail", the first is a UserError.
    """

    def __init__(
        self, path: str | Path, read: Callable[[Mapping[str, Any]], T], cut: Callable[[int], slice],
        bad_rows: BadRows = "fail",
    ):
        """
        Args:
            path: the file, plain or compressed.
            read: from the object of a line to what it says, or a RowError; a function of a module, as it goes to other
                processes.
            cut: which lines, given how many there are.
            bad_rows: what to do about those that are no good.
        """
        self.path, self.bad_rows, self.bad = Path(path).expanduser(), bad_rows, dict[int, str]()
        self._read = read
        self._index = _index(self.path)
        chosen = cut(len(self._index.starts))
        self._first, self._stop = chosen.start, chosen.stop

    def __len__(self) -> int:
        """Lines, blank and bad ones too."""
        return self._stop - self._first

    def __iter__(self) -> Iterator[T]:
        return (row for _, row in self.numbered())

    @property
    def content(self) -> str:
        """Names what is read: equal where the content of the file, the lines and the way to read them are."""
        return f"{self._index.digest} {self._first}:{self._stop} {self._read.__qualname__}"

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self._bound(self._stop) - self._bound(self._first))

    def part(self, k: int, n: int) -> JsonlRows[T]:
        """Part k of n: lines in a row, of about as many bytes each; together they are all."""
        starts = self._index.starts[self._first : self._stop]
        goal = self._bound(self._first) + self.size * np.array([k, k + 1]) / n
        low, high = (self._first + int(at) for at in np.searchsorted(starts, goal))
        rows = object.__new__(JsonlRows)
        rows.__dict__ |= self.__dict__ | {"bad": {}, "_first": low, "_stop": self._stop if k == n - 1 else high}
        rows.__dict__.pop("_data", None)
        return rows

    def numbered(self) -> Iterator[tuple[int, T]]:
        """(number of the line, row)."""
        for number in range(self._first, self._stop):
            line = self._data[self._bound(number) : self._bound(number + 1)]
            if line.strip():
                try:
                    row = self._read(_parse(line, first=number == 0))
                except RowError as error:
                    self.reject(number + 1, error)
                    continue
                yield number + 1, row

    def reject(self, number: int, error: RowError) -> None:
        """Notes that a row is no good. UserError where that is not to be."""
        if self.bad_rows == "fail":
            raise UserError(f"{self.path}:{number}: {error.what}; {error.remedy}") from None
        self.bad[number] = error.what

    def notes(self) -> list[str]:
        """A sentence about the rows left out, if any: how many, why, and which lines."""
        if not self.bad:
            return []
        kinds = []
        for what, count in Counter(self.bad.values()).most_common():
            lines = sorted(number for number, why in self.bad.items() if why == what)
            more = ", ..." if count > _SHOWN else ""
            which = ", ".join(map(str, lines[:_SHOWN]))
            kinds.append(f"{count:,} {what} (line{'s' * (count > 1)} {which}{more})")
        return [f"{len(self.bad):,} of {len(self):,} rows of {self.path} are left out: {'; '.join(kinds)}"]

    def _bound(self, line: int) -> int:
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


def _parse(line: bytes, first: bool) -> Mapping[str, Any]:
    """The object of a line. RowError if it is none, or holds what is no text."""
    if len(line) > _LONGEST:
        raise RowError(f"longer than {_LONGEST >> 20} MiB", "end each row in a newline")
    try:
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"invalid UTF-8 (byte 0x{line[error.start]:02x})", "convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        if b"\r" in line.strip():
            raise RowError("several rows parted by a bare \\r", "end each row in \\n") from None
        raise RowError(f"not JSON ({error.msg})", "write one object a line") from None
    except RecursionError:
        raise RowError("nested too deeply") from None
    if not isinstance(row, dict):
        raise RowError("not an object", "write one object a line")
    if b"\\ud" in line or b"\\uD" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RowError("half of a surrogate pair, which is no character") from None
    return row


@dataclass(frozen=True)
class _Index:
    size: int
    digest: str
    starts: np.ndarray  # of lines, int64


def _index(path: Path) -> _Index:
    """Where lines start; from the file beside it where that is of this content."""
    if is_compressed(path):
        data = read_bytes(path)
        return _scan(iter([data]), len(data))
    with readable(path):
        stat = path.stat()
        kept = Path(f"{path}.index.npy")
        stamp = [stat.st_size, stat.st_mtime_ns]
        try:
            array = np.load(kept, mmap_mode="r", allow_pickle=False)
            if array.dtype == np.int64 and array.ndim == 1 and len(array) >= 4 and array[:2].tolist() == stamp:
                return _Index(stat.st_size, array[2:4].tobytes().hex(), array[4:])
        except (OSError, ValueError, EOFError):
            pass  # none, or not whole: made again
        if not stat.st_size:
            raise UserError(f"{path} is empty; name a file with text in it")
        with open(path, "rb") as file:
            index = _scan(iter(lambda: file.read(_BLOCK), b""), stat.st_size)
    if stat.st_size >= _WORTH_KEEPING:
        digest = np.frombuffer(bytes.fromhex(index.digest), np.int64)
        _keep(kept, np.concatenate([np.array(stamp, np.int64), digest, index.starts]))
    return index


def _scan(blocks: Iterator[bytes], size: int) -> _Index:
    digest, ends, at = hashlib.blake2b(digest_size=16), [np.zeros(1, np.int64)], 0
    for block in blocks:
        digest.update(block)
        ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (at + 1))
        at += len(block)
    starts = np.concatenate(ends)
    return _Index(size, digest.hexdigest(), starts[:-1] if starts[-1] == size else starts)


def _keep(path: Path, array: np.ndarray) -> None:
    """Writes the index in one step, where that is possible: without it, it is made again."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
