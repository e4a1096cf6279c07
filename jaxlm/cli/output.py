"""What commands print and write: tables, fields, progress, and files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.core.disk import replaced_file
from jaxlm.core.errors import UserError

if TYPE_CHECKING:
    from jaxlm.model import LM

__all__ = [
    "ProgressBar", "add_json", "check_writable", "format_bytes", "format_shape", "print_fields", "print_notes",
    "print_table", "write_json", "write_text",
]

_LINE_SECONDS = 5.0  # between lines of progress if standard error is not a terminal


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json FILE``."""
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the results to FILE")


def check_writable(path: Path | None, option: str = "--json") -> None:
    """Checks a file before the work that it is to hold. ``option`` is the option that names it.

    Raises:
        UserError: when the file is a directory, or its directory does not exist.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        reason = "this is a directory" if path.is_dir() else "its directory does not exist"
        raise UserError(f"{option} {path}: {reason}")


def write_json(path: Path | None, data: Any) -> None:
    """Writes a JSON file, or nothing if ``path`` is None."""
    if path is not None:
        write_text(path, json.dumps(data, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all.

    Raises:
        UserError: when the disk is full.
    """
    with replaced_file(path) as new:
        new.write_text(text, encoding="utf-8")


def print_fields(fields: Mapping[str, Any]) -> None:
    """Prints lines of ``name  value``."""
    width = max(map(len, fields))
    for name, value in fields.items():
        print(f"{name:<{width}}  {_cell(value)}")


def print_notes(lm: LM) -> None:
    """Prints notes about how a model was loaded to standard error; standard output is for results."""
    for note in lm.info["notes"]:
        print(f"note: {note}", file=sys.stderr)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows with the same fields under the names of the fields; numbers are aligned to the right."""
    header = list(rows[0])
    cells = [[_cell(row[name]) for name in header] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    signs = [">" if isinstance(rows[0][name], int | float) else "<" for name in header]
    for line in [header, *cells]:
        padded = (f"{cell:{sign}{width}}" for cell, sign, width in zip(line, signs, widths, strict=True))
        print("  ".join(padded).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_cell(item)}" for name, item in value.items()) or "none"
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1e3:
        return f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def format_shape(shape: Sequence[int]) -> str:
    """``2 x 3``."""
    return " x ".join(map(str, shape))


def format_bytes(count: int) -> str:
    """A number of bytes for people: ``8.3 MiB``."""
    amount, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.1f} {unit}" if unit != "B" else f"{count} B"


class ProgressBar:
    """A ``jaxlm.core.progress.Progress`` that draws a bar on a terminal, and elsewhere prints a line every few seconds.

    Both go to standard error; standard output is for results.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._terminal:
            filled = round(30 * done / max(total, 1))
            end = "\r\033[K" if done >= total else ""
            print(f"\r\033[K{what} [{'=' * filled}{' ' * (30 - filled)}] {done:,}/{total:,}", end=end, file=sys.stderr)
            sys.stderr.flush()
        elif now - self._shown > _LINE_SECONDS:
            print(f"{what} {done:,}/{total:,}", file=sys.stderr, flush=True)
            self._shown = now
