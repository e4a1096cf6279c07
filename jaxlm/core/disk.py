"""Full disks as errors that the user can fix, and replacing a directory in one step."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxlm.core.errors import UserError

__all__ = ["replaced_directory", "room_for"]

_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORDS = ("no space left", "disk quota exceeded", "file too large")


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
    with room_for(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        old = new.with_name(new.name + ".old")
        try:
            yield new
            _usual_permissions(new)
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _usual_permissions(directory: Path) -> None:
    """Gives files the permissions of ordinary new files; temporary ones can be read only by their owner."""
    umask = os.umask(0)
    os.umask(umask)
    directory.chmod(0o777 & ~umask)
    for file in directory.iterdir():
        file.chmod(0o666 & ~umask)
