"""A training on two nodes of a real SLURM, preempted and queued again: minutes. Skipped where there is no SLURM."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.launch.processes import CONFIG, ROOT, environment, losses, until

STEPS = 150


def answer(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60).stdout.strip()


def idle_nodes() -> int:
    try:
        return len(answer("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split())
    except (OSError, subprocess.TimeoutExpired):
        return 0


pytestmark = pytest.mark.skipif(idle_nodes() < 2, reason="no SLURM with two idle nodes here")


def submit(run: Path) -> str:
    options = ["--parsable", "--nodes=2", f"--output={run}.log"]
    command = ["sbatch", *options, ROOT / "launch" / "slurm.sbatch", CONFIG, "--out", run, "--train.steps", str(STEPS)]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(job: str) -> str:
    return answer("squeue", "--noheader", "--jobs", job, "--states=all", "--format=%T")


def test_a_preempted_job_is_queued_again_and_ends_as_if_it_had_not_been(tmp_path):
    run, whole = tmp_path / "preempted", tmp_path / "whole"
    job = submit(run)
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "")
    until(lambda: len(losses(run)) > 5, lambda: state(job) not in ended)
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    until(lambda: "Restarts=1" in answer("scontrol", "show", "job", job), lambda: state(job) not in ended)
    until(lambda: state(job) == "PENDING" and idle_nodes() == 2)
    time.sleep(2)  # a node refuses a job that begins in the very second in which it ended there
    stopped = max(losses(run))
    assert 5 < stopped < STEPS and (run / "checkpoints" / str(stopped)).is_dir() and not (run / "model").exists()
    answer("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM would wait two minutes
    until(lambda: state(job) in ended)
    log = Path(f"{run}.log").read_text()
    assert state(job) == "COMPLETED", log
    for line in (f"0: terminated: step {stopped} is saved", f"job {job} is queued again",
                 f"0: resuming at step {stopped}", "0: preflight: 2 processes of 1 devices"):
        assert line in log

    job = submit(whole)
    until(lambda: state(job) in ended)
    assert state(job) == "COMPLETED", Path(f"{whole}.log").read_text()
    found, expected = losses(run), losses(whole)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)
    assert (run / "model" / "config.json").exists()
