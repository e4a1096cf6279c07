"""Files and directories that are replaced in one step: whole or not there, and nothing beside them afterwards."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.core import disk
from jaxlm.core.disk import replaced_directory, replaced_file
from jaxlm.core.errors import UserError
from jaxlm.core.processes import module_environment

KILLED = """
import os, signal, sys
from pathlib import Path
from jaxlm.core import disk

renames = int(sys.argv[1])  # after which the process kills itself

def rename(path, target, original=Path.rename):
    global renames
    if not renames:
        os.kill(os.getpid(), signal.SIGKILL)
    renames -= 1
    return original(path, target)

Path.rename = rename
replaced = disk.replaced_file if Path("there").is_file() else disk.replaced_directory
with replaced(Path("there")) as new:
    (new if replaced is disk.replaced_file else new / "x").write_text("new")
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> None:
    with replaced_directory(Path(name)) as new:
        (new / "x").write_text(text)


def killed(renames: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(renames)], env=module_environment())
    assert done.returncode == -9


@pytest.mark.parametrize("renames", [0, 1], ids=["while it writes", "between the renames"])
def test_what_a_killed_writer_left_goes_with_the_next_one(renames):
    write("there", "old")
    killed(renames)
    assert len(os.listdir()) == 3, "the killed writer left nothing to remove: the test shows nothing"
    write("other", "y")
    assert sorted(os.listdir()) == ["other", "there"] and Path("there/x").read_text() == "old"


def test_a_killed_writer_of_a_file_is_no_different():
    Path("there").write_text("old")
    killed(0)
    assert len(os.listdir()) == 3
    with replaced_file(Path("there")) as new:
        new.write_text("newer")
    assert os.listdir() == ["there"] and Path("there").read_text() == "newer"


def test_a_writer_that_lives_and_files_of_others_are_left_alone():
    names = [".there.backup", ".there.01234567.writing.txt", ".x.01234567.new"]
    for name in names:
        Path(name).write_text("mine")
    with replaced_directory(Path("there")) as new:
        write("there", "first")
        write("other", "y")
        (new / "x").write_text("second")
    assert Path("there/x").read_text() == "second"
    assert sorted(os.listdir()) == sorted([*names, "other", "there"])


def test_a_name_is_not_taken_from_a_writer_that_has_just_begun(monkeypatch):
    """The next writer may come between the making of a mark and its lock."""
    original = disk.fcntl.flock

    def late(lock, how):
        if how == disk.fcntl.LOCK_EX:
            monkeypatch.setattr(disk.fcntl, "flock", original)
            disk._remove_abandoned(Path())
        original(lock, how)

    monkeypatch.setattr(disk.fcntl, "flock", late)
    write("there", "x")
    assert os.listdir() == ["there"]


def test_a_failure_leaves_what_was_there(monkeypatch):
    write("there", "old")
    Path("file").write_text("old")
    for replaced, name in ((replaced_directory, "there"), (replaced_file, "file")):
        with pytest.raises(UserError, match=f"no space left for .*{name}"):
            with replaced(Path(name)) as new:
                (new if name == "file" else new / "x").write_text("half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert sorted(os.listdir()) == ["file", "there"]
    assert Path("there/x").read_text() == Path("file").read_text() == "old"


def test_what_is_no_regular_file_is_written_itself():
    os.mkfifo("pipe")
    with replaced_file(Path("pipe")) as new:
        assert new == Path("pipe").absolute()
    with pytest.raises(UserError, match="there is a directory"):
        write("there", "x")
        with replaced_file(Path("there")):
            pass
