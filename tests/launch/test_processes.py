"""Trainings of two real processes: resumed on other numbers of processes and devices, terminated, and killed."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.core.config import load_config
from jaxlm.training.loop import train
from tests.launch.processes import CONFIG, ROOT, environment, losses, until


def start(run: Path, *options: str, **variables: str) -> subprocess.Popen:
    """Starts two processes of one device each, by launch/local.sh."""
    command = [ROOT / "launch" / "local.sh", "-n", "2", "--", sys.executable, "-m", "jaxlm", "train", CONFIG,
               "--out", run, *options]
    return subprocess.Popen(command, env=environment(1) | variables, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def here(run: Path, steps: int) -> None:
    """Trains in this process, on its eight devices."""
    config = load_config(CONFIG)
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)), run)


@pytest.mark.slow
def test_checkpoints_move_between_devices_and_processes(tmp_path):
    """A run on eight devices goes on in two processes of one device, which SIGTERM stops, and then on four devices: its
    losses are those of a run that nothing interrupted."""
    run = tmp_path / "moved"
    here(run, 8)
    with start(run, "--train.steps", "100000") as two:
        until(lambda: max(losses(run), default=0) >= 11, lambda: two.poll() is None)
        two.send_signal(signal.SIGTERM)
        output = two.communicate()[0]
    assert two.returncode == 0, output
    stopped = max(losses(run))
    assert f"0: terminated: step {stopped} is saved" in output and "0: resuming at step 8" in output
    assert "0: preflight: 2 processes of 1 devices on 1 hosts" in output
    assert not re.search("^1: (data|preflight|resuming|step|terminated)", output, re.MULTILINE)  # only process 0 prints
    steps = stopped + 5
    four = [sys.executable, "-m", "jaxlm", "train", CONFIG, "--out", run, "--train.steps", str(steps)]
    subprocess.run(four, env=environment(4), check=True, stdout=subprocess.DEVNULL)

    here(tmp_path / "whole", steps)
    found, expected = losses(run), losses(tmp_path / "whole")
    assert list(found) == list(expected) == list(range(1, steps + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def number_of(pid: str) -> str | None:
    """The number that the launcher gave a process."""
    try:
        words = Path("/proc", pid, "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((word.decode().partition("=")[2] for word in words if word.startswith(b"JAXLM_PROCESS_ID=")), None)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc")
def test_a_killed_process_ends_the_others_with_a_line(tmp_path):
    with start(tmp_path / "run", "--train.steps", "100000", GRACE="120", JAXLM_HEARTBEAT_TIMEOUT="10") as two:
        until(lambda: losses(tmp_path / "run"), lambda: two.poll() is None)
        children = Path(f"/proc/{two.pid}/task/{two.pid}/children").read_text().split()
        (victim,) = [int(pid) for pid in children if number_of(pid) == "1"]
        os.kill(victim, signal.SIGKILL)
        begin = time.monotonic()
        output = two.communicate()[0]
    assert two.returncode == 128 + signal.SIGKILL and time.monotonic() - begin < 60
    assert f"0: jaxlm: lost process 1 on {socket.gethostname()}: killed, or silent for 10 s" in output
    assert "Traceback" not in output and "Check failure" not in output
