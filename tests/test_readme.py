"""What README says of the code is what the code says of itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from jaxlm.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_tables_are_current():
    check = subprocess.run(
        ["bash", ROOT / "launch/readme.sh", "--check"], capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert check.returncode == 0, check.stderr


def test_the_check_finds_what_is_not_current(tmp_path):
    for name in ("launch", "tests/benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text(README.replace("| `kv8` |", "| `kv9` |"))
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = ["bash", tmp_path / "launch/readme.sh"]
    check = subprocess.run([*words, "--check"], capture_output=True, text=True, env=environment)
    assert check.returncode == 1 and "+| `kv8` |" in check.stderr
    subprocess.run(words, check=True, env=environment)
    assert (tmp_path / "README.md").read_text() == README


def test_every_command_is_told():
    for name in COMMANDS:
        assert f"jaxlm {name} " in README or f"{name}.sh" in README, name
