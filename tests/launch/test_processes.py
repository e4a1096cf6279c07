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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


def start(run: Path, cache: Path, *options: str, **variables: str) -> subprocess.Popen:
    """Two processes of one device each, by launch/local.sh."""
    command = [ROOT / "launch" / "local.sh", "-n", "2", "--", sys.executable, "-m", "jaxlm", "train", CONFIG,
               "--out", run, *options]
    return subprocess.Popen(command, env=environment(cache, 1) | variables, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def here(run: Path, steps: int) -> None:
    """A training in this process, on its eight devices."""
    config = load_config(CONFIG)
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)), run)


@pytest.mark.slow
def test_checkpoints_move_between_devices_and_processes(tmp_path, cache):
    """Eight devices, then two processes of one, which SIGTERM stops, then four devices: as if nothing had happened."""
    run = tmp_path / "moved"
    here(run, 8)
    with start(run, cache, "--train.steps", "100000") as two:
        until(lambda: max(losses(run), default=0) >= 11, lambda: two.poll() is None)
        two.send_signal(signal.SIGTERM)
        output = two.communicate()[0]
    assert two.returncode == 0, output
    stopped = max(losses(run))
    assert f"0: terminated: step {stopped} is saved" in output and "0: resuming at step 8" in output
    assert "0: preflight: 2 processes of 1 devices on 1 hosts" in output
    assert not re.search("^1: (data|preflight|resuming|step|terminated)", output, re.MULTILINE)  # one talks
    steps = stopped + 5
    four = [sys.executable, "-m", "jaxlm", "train", CONFIG, "--out", run, "--train.steps", str(steps)]
    subprocess.run(four, env=environment(cache, 4), check=True, stdout=subprocess.DEVNULL)

    here(tmp_path / "whole", steps)
    found, expected = losses(run), losses(tmp_path / "whole")
    assert list(found) == list(expected) == list(range(1, steps + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def number_of(pid: str) -> str | None:
    """Which of several processes a process is."""
    try:
        words = Path("/proc", pid, "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((word.decode().partition("=")[2] for word in words if word.startswith(b"JAXLM_PROCESS_ID=")), None)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc")
def test_a_killed_process_ends_the_others_with_a_line(tmp_path, cache):
    with start(tmp_path / "run", cache, "--train.steps", "100000", GRACE="120", JAXLM_HEARTBEAT_TIMEOUT="10") as two:
        until(lambda: len(losses(tmp_path / "run")) > 3, lambda: two.poll() is None)
        children = Path(f"/proc/{two.pid}/task/{two.pid}/children").read_text().split()
        (victim,) = [int(pid) for pid in children if number_of(pid) == "1"]
        os.kill(victim, signal.SIGKILL)
        begin = time.monotonic()
        output = two.communicate()[0]
    assert two.returncode == 128 + signal.SIGKILL and time.monotonic() - begin < 60
    assert f"0: jaxlm: lost process 1 on {socket.gethostname()}: killed, or silent for 10 s" in output
    assert "Traceback" not in output and "Check failure" not in output
