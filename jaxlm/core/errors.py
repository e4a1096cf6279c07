"""The exception for mistakes that the user can fix, and values as its messages show them."""

from __future__ import annotations

import reprlib
from typing import Any

__all__ = ["UserError", "shown"]

_LONGEST = 2000  # characters of a message
_REPR = reprlib.Repr()
_REPR.maxstring = 80


class UserError(ValueError):
    """A mistake outside the program: a bad option, a missing or damaged file, an impossible mesh.

    The message is one line that says what is wrong and what to do. The command line prints it and exits with status 2;
    code that uses the library catches it like any ``ValueError``. The middle of a message of more than 2,000 characters
    is left out: it comes from a file.
    """

    def __init__(self, *args: Any):
        super().__init__(*map(_shortened, args))


def _shortened(message: Any) -> Any:
    if not isinstance(message, str) or len(message) <= _LONGEST:
        return message
    return f"{message[: _LONGEST * 3 // 4]} [...] {message[-_LONGEST // 5 :]}"


def shown(value: Any) -> str:
    """The ``repr`` of a value from outside for a message, with the middle of what is long left out."""
    return _REPR.repr(value)
