"""Full disks as errors that the user can fix, and files and directories that are replaced in one step.

A writer writes new content to ``.NAME.XXXXXXXX.new`` beside the target NAME, and then renames it. As long as it writes,
it holds a lock on a file ``.NAME.XXXXXXXX.writing``, which the kernel releases when the writer dies. So the next writer
in the same directory knows what was abandoned, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxlm.core.errors import UserError

__all__ = ["replaced_directory", "replaced_file", "room_for"]

_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORDS = ("no space left", "disk quota exceeded", "file too large")
_MARK = re.compile(r"\.(.+)\.[0-9a-f]{8}\.writing")


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """A block in which a full disk, whichever library meets it, is a UserError; ``what`` is being written.

    Raises:
        UserError: when the disk is full.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in _CODES or any(words in str(error).lower() for words in _WORDS):
            raise UserError(f"no space left for {what}; free some and run again, nothing saved is lost") from error
        raise


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A new empty directory to fill. It becomes ``target`` when the block ends; after an exception it is removed.

    Until then ``target`` keeps its previous content.

    Raises:
        UserError: when the disk is full.
    """
    target = target.absolute()
    with room_for(str(target)), _marked(target) as (new, old):
        new.mkdir()
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)


@contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """As ``replaced_directory``, for a file, which the block writes. What is no regular file, such as /dev/stdout, is
    the path itself.

    Raises:
        UserError: when the disk is full, or ``target`` is a directory.
    """
    target = target.absolute()
    if target.is_dir():
        raise UserError(f"{target} is a directory; name a file")
    with room_for(str(target)):
        if target.exists() and not target.is_file():
            yield target
            return
        with _marked(target) as (new, _):
            yield new
            new.rename(target)


@contextmanager
def _marked(target: Path) -> Iterator[tuple[Path, Path]]:
    """Two names beside ``target``, for its new and its previous content. What has them when the block ends is removed,
    or was ``target`` and becomes it again."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    mark, lock = _new_mark(target)
    try:
        yield mark.with_suffix(".new"), mark.with_suffix(".old")
    finally:
        _settle(mark, target)
        os.close(lock)


def _new_mark(target: Path) -> tuple[Path, int]:
    """A mark for a writer of ``target``, and a file descriptor that holds its lock."""
    while True:
        mark = target.with_name(f".{target.name}.{secrets.token_hex(4)}.writing")
        lock = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        with contextlib.suppress(OSError):  # without locks in this file system, nothing is taken for abandoned
            fcntl.flock(lock, fcntl.LOCK_EX)
        if mark.exists():
            return mark, lock
        os.close(lock)  # another process had the lock first, and took the mark for abandoned


def _remove_abandoned(directory: Path) -> None:
    """Removes what writers in a directory left behind when they were killed."""
    for mark in directory.glob(".*.writing"):
        found = _MARK.fullmatch(mark.name)
        if found is None:
            continue
        with contextlib.suppress(OSError):  # its writer lives, or has just finished
            with mark.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _settle(mark, directory / found[1])


def _settle(mark: Path, target: Path) -> None:
    new, old = mark.with_suffix(".new"), mark.with_suffix(".old")
    if old.exists() and not target.exists():
        old.rename(target)
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)  # does nothing to a file
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    mark.unlink(missing_ok=True)
