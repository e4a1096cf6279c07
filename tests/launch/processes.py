"""Helpers for trainings in other processes: their environment, their log, and waiting for them."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "launch" / "experiment.py"
LIMIT = 1800  # seconds for anything to happen; a loaded machine is slow


def environment(devices: int) -> dict[str, str]:
    """The environment of a process with that many CPU devices; it shares the tests' cache of compiled programs."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAXLM_"))}
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])
    binaries = Path(sys.executable).parent
    return clean | {
        "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "PATH": f"{binaries}:{os.environ['PATH']}",
        "JAXLM_START_TIMEOUT": str(LIMIT),
    }


def losses(run: Path) -> dict[int, tuple[float, int]]:
    """(loss, tokens) of each step that a run has logged so far."""
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: (row["loss"], row["tokens"]) for row in rows if "loss" in row}


def until(condition: Callable[[], object], alive: Callable[[], bool] = lambda: True) -> None:
    """Waits for a condition. Fails when what should meet it is no longer alive, or after ``LIMIT`` seconds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert alive() and time.monotonic() < deadline, "the condition was not met"
        time.sleep(0.05)
