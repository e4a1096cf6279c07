"""The launch scripts: what they would run, and what local.sh does with the processes that it starts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
TRAIN = ("configs/books.py", "--out", "/runs/a b")
GKE = {"NAME": "books", "IMAGE": "registry/jaxlm", "CLAIM": "runs", "CHIPS": "google.com/tpu: 4", "WORKERS": "4",
       "SLICES": "2", "NODES": "cloud.google.com/gke-tpu-accelerator: tpu-v5p-slice, "
                               "cloud.google.com/gke-tpu-topology: 2x2x4"}


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    hidden = ("SLURM_", "JAX", "TPU", "ZONE")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return subprocess.run([str(LAUNCH / script), *words], env=clean | environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        options = ["-s", "bash", "-x", "-S", "error"]
        subprocess.run(["shellcheck", *options, script], check=True, cwd=LAUNCH)


def read_by(script: Path) -> set[str]:
    """The variables that the comment at the head of a script names."""
    head = script.read_text().split("set -euo")[0]
    return {word.strip("(),.;:'") for word in head.split() if word.strip("(),.;:'").replace("_", "").isupper()}


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "tpu_pod.sh", "gke.sh"])
def test_states_the_variables_it_reads(script):
    """Those that have a default, or that are tested for, are there to be set from outside."""
    text = (LAUNCH / script).read_text().split("set -euo", 1)[1]
    outside = set(re.findall(r"\$\{([A-Z_]+):[-+]", text)) - {"BASH_SOURCE"}
    assert outside and outside <= read_by(LAUNCH / script)


def test_local_says_what_it_would_run():
    done = run("local.sh", "-n", "2", "--dry-run", "--", "jaxlm", "train", *TRAIN, PORT="7777")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2
    for i, line in enumerate(lines):
        assert f"JAX_COORDINATOR_ADDRESS=127.0.0.1:7777 JAXLM_PROCESS_COUNT=2 JAXLM_PROCESS_ID={i}" in line
        assert line.strip().endswith(r"jaxlm train configs/books.py --out /runs/a\ b")


def test_local_deals_gpus_out(tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i; done\n")
    fake.chmod(0o755)
    done = run("local.sh", "-n", "4", "--dry-run", "--", "jaxlm", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert [line.split("JAX_LOCAL_DEVICE_IDS=")[1].split()[0] for line in done.stdout.splitlines()] == [
        "0,1", "2,3", "4,5", "6,7"]


def test_local_marks_the_lines_of_each_process():
    done = run("local.sh", "-n", "3", "--", "sh", "-c", "echo a $JAXLM_PROCESS_ID; echo b >&2")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == sorted(f"{i}: {word}" for i in range(3) for word in (f"a {i}", "b"))


def test_local_ends_all_when_one_fails():
    command = 'if [ "$JAXLM_PROCESS_ID" = 1 ]; then exit 7; fi; exec sleep 100'
    done = run("local.sh", "-n", "3", "--", "sh", "-c", command, GRACE="0")
    assert done.returncode == 7
    assert "local.sh: process 1 ended with status 7; ending the others" in done.stderr.splitlines()


def test_local_passes_term_on():
    command = [LAUNCH / "local.sh", "-n", "2", "--", "bash", "-c",
               'trap "echo saved; exit 0" TERM; echo ready; while :; do sleep 0.1; done']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert sorted(process.stdout.readline() for _ in range(2)) == ["0: ready\n", "1: ready\n"]
        process.send_signal(signal.SIGTERM)
        assert sorted(process.stdout) == ["0: saved\n", "1: saved\n"]
    assert process.returncode == 0


def test_slurm_says_what_it_would_run():
    done = run("slurm.sbatch", "--dry-run", *TRAIN)
    assert done.returncode == 0 and "JAX_COORDINATOR_ADDRESS=FIRST_NODE:" in done.stdout
    assert "srun --label" in done.stdout and r"jaxlm train configs/books.py --out /runs/a\ b" in done.stdout


def test_tpu_pod_says_what_it_would_run():
    done = run("tpu_pod.sh", "--dry-run", *TRAIN, TPU="pod", ZONE="us-east5-a", PROJECT="p")
    describe, ssh = done.stdout.splitlines()
    assert done.returncode == 0 and "tpu-vm describe pod --zone us-east5-a --project p" in describe
    (command,) = subprocess.run(["bash", "-c", f"printf '%s\\n' {ssh} | tail -n 1"], capture_output=True,
                                text=True).stdout.splitlines()
    assert "tpu-vm ssh pod --zone us-east5-a --project p --worker=all" in ssh
    assert "JAX_COORDINATOR_ADDRESS=WORKER_0:8476 JAXLM_HOSTS=WORKER_0,WORKER_1 JAXLM_PROCESS_COUNT=2" in command
    assert command.strip().endswith(r".venv/bin/jaxlm train configs/books.py --out /runs/a\ b")
    assert "pkill -TERM" in run("tpu_pod.sh", "--dry-run", "--stop", TPU="pod", ZONE="z").stdout.replace("\\", "")


def test_gke_prints_a_job_set():
    done = run("gke.sh", "--dry-run", *TRAIN, **GKE)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    job = manifest["spec"]["replicatedJobs"][0]
    assert manifest["metadata"]["name"] == "books" and job["replicas"] == 2
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 4
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x4"
    (container,) = pod["containers"]
    assert container["args"] == list(TRAIN) and container["resources"]["limits"] == {"google.com/tpu": 4}
    values = {each["name"]: each.get("value") for each in container["env"]}
    assert values["JAX_COORDINATOR_ADDRESS"] == "books-slice-0-0.books:8476" and values["JAXLM_PROCESS_COUNT"] == "8"
    assert values["JAXLM_HOSTS"].split(",")[5] == "books-slice-1-1"
    command = [word.replace("exec jaxlm", "exec printenv JAXLM_PROCESS_ID; :") for word in container["command"]]
    indices = {"JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "1"}
    shown = subprocess.run(command, env=os.environ | indices, capture_output=True, text=True).stdout
    assert shown == "5\n"


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "tpu_pod.sh", "gke.sh"])
def test_a_mistake_is_answered_by_how_to_use_it(script):
    done = run(script)
    assert done.returncode == 2 and script in done.stderr and "--dry-run" in done.stderr


def test_gke_names_what_is_not_set():
    done = run("gke.sh", "--dry-run", *TRAIN, **{name: value for name, value in GKE.items() if name != "CLAIM"})
    assert done.returncode == 2 and "set CLAIM" in done.stderr
