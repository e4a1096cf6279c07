"""Files of text as they come: plain or compressed, UTF-8, lines that end in "\\n"; and what is wrong with them."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxlm.core.errors import UserError

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def is_compressed(path: Path) -> bool:
    return path.suffix in _OPENERS


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what goes wrong with a file inside the block into a UserError of one line."""
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
    """The content of a file, decompressed by the end of its name. UserError where it cannot be read, or is empty."""
    path = Path(name).expanduser()
    with readable(path), _OPENERS.get(path.suffix, open)(path, "rb") as file:
        data = file.read()
    if not data:
        raise UserError(f"{path} is empty; name a file with text in it")
    return data


def read_text(name: str | Path) -> str:
    return decode(read_bytes(name), name)


def read_lines(name: str | Path) -> list[str]:
    return split_lines(read_text(name))


def decode(data: bytes, name: str | Path) -> str:
    """UTF-8. UserError that names the line where it is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}:{line}: invalid UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from None


def split_lines(text: str) -> list[str]:
    """Lines end in "\\n" and nothing else: other separators that Unicode knows occur inside sentences. A "\\r" before
    it belongs to the line end of files from Windows."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
