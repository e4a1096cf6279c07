"""What files say that may be damaged or come from anybody: JSON and regular expressions, read within limits. And
checksums of JSON values."""

from __future__ import annotations

import json
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError, shown

__all__ = [
    "MAX_DEPTH", "Pattern", "json_checksum", "parse_json", "read_json", "read_json_if_there", "read_sealed_json",
    "seal", "unseal",
]

MAX_DEPTH = 100  # levels of lists and objects; code that walks a value by recursion has room for that many
_CHECKSUM = "checksum"  # the field that ``seal`` adds
_PATTERN_SECONDS = 0.5  # for all names together; usual expressions take microseconds a name
_MAX_PATTERN = 10_000  # characters of an expression; compiling takes time too


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested more than ``MAX_DEPTH`` deep, or has an integer of thousands of digits.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # of int(), which refuses what would take long
        raise ValueError("a number has thousands of digits") from None
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, opening)) > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = (each for each in level if isinstance(each, list | dict))
        level = [child for each in containers for child in (each.values() if isinstance(each, dict) else each)]
    return any(isinstance(each, list | dict) for each in level)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy or save it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; copy or save it again")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """``read_json``, but {} where there is no such file."""
    return read_json(path) if path.is_file() else {}


def read_sealed_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that was written with ``seal``, or before files had checksums.

    Raises:
        UserError: as ``read_json``, and when the checksum is wrong.
    """
    fields = read_json(path)
    try:
        if not fields:
            raise ValueError("it is empty")
        return unseal(fields, required=False)
    except ValueError as error:
        raise UserError(
            f"{path} was damaged or changed since it was written ({error}); restore it, or remove its {_CHECKSUM!r} to "
            "use it as it is"
        ) from None


def json_checksum(value: Any) -> str:
    """A checksum of a JSON-safe value. The order of names and the layout of its text do not change it."""
    normal = json.loads(json.dumps(value))  # tuples are lists, and all names are text
    return f"{zlib.crc32(json.dumps(normal, sort_keys=True).encode()):08x}"


def seal(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a JSON object with a checksum of them, as ``unseal`` expects it."""
    return {**fields, _CHECKSUM: json_checksum(fields)}


def unseal(fields: Mapping[str, Any], *, required: bool = True) -> dict[str, Any]:
    """The fields that were sealed. Where the checksum is not ``required``, fields without one are taken as they are.

    Raises:
        ValueError: the fields are not those that were sealed.
    """
    rest = {name: value for name, value in fields.items() if name != _CHECKSUM}
    if _CHECKSUM not in fields and not required:
        return rest
    if fields.get(_CHECKSUM) != json_checksum(rest):
        raise ValueError("its checksum is wrong" if _CHECKSUM in fields else "its checksum is missing")
    return rest


class Pattern:
    """A regular expression by the rules of Python's ``re``, which has half a second to match all names that it is asked
    about.

    Raises:
        UserError: the text is not a regular expression.
    """

    def __init__(self, text: str, source: str, written: str = ""):
        """``source`` says in errors where the expression is from, and ``written`` is what is there, if not ``text``."""
        import regex  # takes 15 ms, and most models have no expressions

        self._named, self._left = f"{shown(written or text)} in {source}", _PATTERN_SECONDS
        try:
            if len(text) > _MAX_PATTERN:
                raise ValueError
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._compiled = regex.compile(text)
        except (regex.error, ValueError, OverflowError, RecursionError):
            raise UserError(f"{self._named} is not a regular expression") from None

    def match(self, name: str) -> bool:
        """Whether the expression matches the beginning of a name.

        Raises:
            UserError: the time is up.
        """
        return self._run(self._compiled.match, name)

    def fullmatch(self, name: str) -> bool:
        """Whether the expression matches a whole name. Raises as ``match``."""
        return self._run(self._compiled.fullmatch, name)

    def _run(self, method: Callable[..., object], name: str) -> bool:
        start = time.thread_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            return method(name, timeout=self._left) is not None
        except (TimeoutError, MemoryError, RecursionError):
            remedy = "write it without repetitions inside repetitions"
            raise UserError(f"{self._named} takes too long to match; {remedy}") from None
        finally:
            self._left -= time.thread_time() - start
