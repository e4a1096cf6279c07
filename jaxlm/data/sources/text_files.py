"""Reads text files: plain or compressed, UTF-8, with lines that end in "\\n". Errors name the file and the line."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxlm.core.errors import UserError
from jaxlm.data.sources.compressed import DecompressedFile

_COMPRESSED = (".gz", ".xz")


def is_compressed(path: Path) -> bool:
    """Whether ``read_bytes`` decompresses the file."""
    return path.suffix in _COMPRESSED


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns errors of reading a file into a UserError of one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; name a file in it") from None
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise UserError(f"{path} is damaged or not a {path.suffix} file ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def read_bytes(name: str | Path) -> bytes:
    """The content of a file, decompressed if its name ends in .gz or .xz.

    Raises:
        UserError: when the file cannot be read or is empty.
    """
    path = Path(name).expanduser()
    with readable(path):
        if is_compressed(path):
            with DecompressedFile(path) as file:
                data = b"".join(file.parts())
        else:
            data = path.read_bytes()
    if not data:
        raise UserError(f"{path} is empty; name a file with text in it")
    return data


def read_text(name: str | Path) -> str:
    """The text of a file. Raises as ``read_bytes`` and ``decode``."""
    return decode(read_bytes(name), name)


def read_lines(name: str | Path) -> list[str]:
    """The lines of a file, without line ends. Raises as ``read_text``."""
    return split_lines(read_text(name))


def decode(data: bytes, name: str | Path) -> str:
    """The text of UTF-8 bytes; ``name`` is their file.

    Raises:
        UserError: when the bytes are not UTF-8; the message names the file and the line.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}:{line}: invalid UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from None


def split_lines(text: str) -> list[str]:
    """The lines of a text. Only "\\n" ends a line, because the other separators of Unicode occur inside sentences; a
    "\\r" before it belongs to the line end of files from Windows."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
