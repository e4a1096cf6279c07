"""The exception for mistakes that the user can fix, and values as its messages show them."""

from __future__ import annotations

import reprlib
from typing import Any

__all__ = ["UserError", "shown"]

_REPR = reprlib.Repr()
_REPR.maxstring = 80


class UserError(ValueError):
    """A mistake outside the program: a bad option, a missing or damaged file, an impossible mesh.

    The message is one line that says what is wrong and what to do. The command line prints it and exits with status 2;
    code that uses the library catches it like any ``ValueError``.
    """


def shown(value: Any) -> str:
    """The ``repr`` of a value from outside for a message, with the middle of what is long left out."""
    return _REPR.repr(value)
