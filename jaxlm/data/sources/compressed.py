"""Compressed files, read by parts. A small file may expand to more than any memory holds: that is an error, in time."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxlm.core.errors import UserError

_PART = 1 << 20  # bytes read at a time
_MOST_EXPANSION = 200  # times the compressed bytes; text shrinks to a third or a tenth, logs to a fiftieth
_ALWAYS = 1 << 24  # bytes that every file may have
_XZ_MEMORY = 1 << 28  # bytes that decompressing may take: four times as much as of ``xz -9``


class DecompressedFile:
    """The content of a .gz, .tgz or .xz file.

    Raises:
        UserError: by ``read``, when the content is more than 200 times as large as what it is made of.
    """

    def __init__(self, path: Path):
        self._path, self._size = path, 0
        self._raw = open(path, "rb")
        self._content = _XzFile(self._raw) if path.suffix == ".xz" else gzip.GzipFile(fileobj=self._raw)

    def __enter__(self) -> DecompressedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def read(self, size: int) -> bytes:
        """Up to ``size`` more bytes; none at the end."""
        data = self._content.read(size)
        self._size += len(data)
        if self._size > max(_ALWAYS, _MOST_EXPANSION * self._raw.tell()):
            raise UserError(
                f"{self._path} expands to more than {_MOST_EXPANSION} times its size, which text does not; decompress "
                "it yourself if it is what you want"
            )
        return data

    def parts(self) -> Iterator[bytes]:
        """All bytes, by parts."""
        return iter(lambda: self.read(_PART), b"")


class _XzFile:
    """As ``lzma.LZMAFile``, which has no limit of memory. A file may say that it takes gigabytes."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._stream = raw, lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def read(self, size: int) -> bytes:
        while True:
            data = b""
            if self._stream.eof:  # another stream may follow, after zeros
                data = self._stream.unused_data.lstrip(b"\0")
                while not data:
                    block = self._raw.read(_PART)
                    if not block:
                        return b""
                    data = block.lstrip(b"\0")
                self._stream = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
            elif self._stream.needs_input:
                data = self._raw.read(_PART)
                if not data:
                    raise EOFError("it is cut off")
            content = self._stream.decompress(data, size)
            if content:
                return content
