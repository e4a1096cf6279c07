"""What README says of the code is what the code says of itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from jaxlm.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def readme(directory: Path, *options: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": python, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = ["bash", directory / "launch/readme.sh", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_tables_are_current():
    check = readme(ROOT, "--check")
    assert check.returncode == 0, check.stderr


def test_the_check_finds_what_is_not_current(tmp_path):
    """With a program in place of Python that only says what it is asked."""
    for name in ("launch", "tests/benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text(README)
    check = readme(tmp_path, "--check", python="echo")
    assert check.returncode == 1 and "+-m jaxlm.compression.names" in check.stderr
    assert (tmp_path / "README.md").read_text() == README
    assert readme(tmp_path, python="echo").returncode == 0
    assert (tmp_path / "README.md").read_text() != README
    assert readme(tmp_path, "--check", python="echo").returncode == 0


def test_every_command_is_told():
    for name in COMMANDS:
        assert f"jaxlm {name} " in README or f"{name}.sh" in README, name
