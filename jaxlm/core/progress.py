"""The type of the functions that are told how far a long task has come."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress"]

Progress = Callable[[str, int, int], None]  # (what is being done, steps done, steps in total)
