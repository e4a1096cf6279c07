"""Kills trainings and compressions at random moments, and fills up their disks: is anything lost, or left behind?

    python -m tests.benchmarks.kills [--trainings 30] [--compressions 10] [--disks 10] [--seed 0] [--json FILE]

A character model of 4,000 parameters is trained once without a disturbance. Then runs of the same experiment get
SIGKILL at random moments of their lives, one to five times, until one comes to its end. What it ends with must be the
undisturbed run to the last bit: the logged losses, the checkpoints that are kept, the model. A killed compression must
leave the model that was there or the new one, whole, and the next one the new one. A full disk is a small file system
in memory (which takes root; otherwise a limit on the size of files): the command must end with one line and status 2,
and go on where it was, once there is room. Afterwards there must be no file that an undisturbed run does not leave.

It takes 5 to 15 minutes on two cores, and prints a line for each disturbance. The exit status is 1 if anything was lost
or left.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax

import jaxlm.compress  # noqa: F401 - imported once, so that a command starts at once in a forked process
import jaxlm.training.loop  # noqa: F401
from jaxlm.cli import main
from jaxlm.training.metrics import read_metrics

CONFIG = """
from jaxlm import nn
from jaxlm.training.config import *

config = Experiment(
    model=nn.DecoderConfig(width=16, heads=2, layers=1, dropout=0.1),
    data=DataConfig(train="jsonl:{here}/rows.jsonl[:90%]", valid="jsonl:{here}/rows.jsonl[90%:]", cache="{here}/cache",
                    tokenizer_kind="char", seq_len=16, batch_size=8),
    optim=OptimConfig(lr=1e-2, warmup_steps=5),
    train=TrainConfig(steps={steps}, log_every=1, eval_every=24, checkpoint_every=3, keep_latest=2, keep_best=1),
    eval=EvalConfig(batches=4),
)
"""
FORK = multiprocessing.get_context("fork")
STEPS = 60
TIMINGS = ("step_ms", "tokens_per_second", "mfu", "peak_memory_bytes")
TIMEOUT = 1800.0  # seconds of one command
TEMPORARY = (".new", ".old", ".writing", ".partial", "tmp")


class Scene:
    """A directory with data, a configuration, and what undisturbed commands make of them."""

    def __init__(self, here: Path, seed: int):
        self.here, self.random, self.failures = here, random.Random(seed), []
        self.config = here / "config.py"
        self.config.write_text(CONFIG.format(here=here, steps=STEPS))
        words = random.Random(0).choices(["ab", "bcd", "dae", "f", "gha"], k=6000)
        rows = [{"text": " ".join(words[i : i + 30])} for i in range(0, len(words), 30)]
        (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.run(self.train(here / "warm"))  # compiles
        self.seconds = {"train": self.timed(self.train(here / "undisturbed"))}  # of the processor
        self.model = here / "undisturbed" / "model"
        self.run(self.compress(here / "warm-small"))
        self.seconds["compress"] = self.timed(self.compress(here / "small"))
        self.run(self.compress(here / "older", "w8a8-dynamic"))
        self.usual = tree(here / "undisturbed")

    def train(self, run: Path) -> list[str]:
        return ["train", str(self.config), "--out", str(run)]

    def compress(self, out: Path, recipe: str = "w4a16-rtn-g16") -> list[str]:
        return ["compress", str(self.model), "--recipe", recipe, "--out", str(out)]

    def start(self, words: list[str], most: int | None = None) -> multiprocessing.Process:
        """A command in a process of its own; ``most`` limits the size of its files."""
        process = FORK.Process(target=command, args=(words, self.here / "errors", most))
        process.start()
        return process

    def run(self, words: list[str], most: int | None = None) -> tuple[int, str]:
        """The exit status and the standard error of a command."""
        process = self.start(words, most)
        process.join(TIMEOUT)
        error = (self.here / "errors").read_text()
        if process.exitcode and most is None:
            self.failures.append(f"{' '.join(words[:2])} ended with {process.exitcode}: {error[-500:]}")
        return process.exitcode, error

    def timed(self, words: list[str]) -> float:
        """The processor time of a command, which is much the same on a busy machine."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.run(words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def kill(self, words: list[str], when: Callable[[int], bool]) -> str:
        """Kills a command when ``when`` is true of its process id; says whether it was still running."""
        process = self.start(words)
        while process.is_alive() and not when(process.pid):
            time.sleep(0.0005)
        process.kill()
        process.join(TIMEOUT)
        return "killed" if process.exitcode == -signal.SIGKILL else "had ended"

    def check(self, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for name, value in wanted.items():
            if found.get(name) != value:
                self.failures.append(f"{what}: {name} is not that of an undisturbed run")
        self.failures += [f"{what}: {name} was left" for name in found.keys() - wanted.keys()]


def command(words: list[str], errors: Path, most: int | None) -> None:
    """Runs a command of jaxlm in this process."""
    for stream, path in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    main(words)


def tree(directory: Path) -> dict[str, Any]:
    """What must be the same in two runs, or two models: files by name, with logs without timings, and checkpoints as
    their checksums."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name, parts = str(path.relative_to(directory)), path.relative_to(directory).parts
        if path.is_dir() or parts[0] == "tensorboard":
            continue
        if name == "metrics.jsonl":
            rows = [row for row in read_metrics(path) if "start" not in row]
            found[name] = [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]
        elif parts[0] != "checkpoints":
            found[name] = path.read_bytes()
        elif any(word in name for word in TEMPORARY) or len(parts) < 3:
            found[name] = "a file that is not of a checkpoint"
        elif parts[2:] == ("data", "metadata"):
            found[name] = path.read_bytes()  # with the checksums of all arrays
    return found


def last_step(run: Path) -> int | None:
    """The last step that a run has logged; None before the first."""
    log = run / "metrics.jsonl"
    return max((row["step"] for row in read_metrics(log)), default=None) if log.exists() else None


def has_reached(run: Path, step: int, _: int) -> bool:
    return (last_step(run) or 0) >= step


def has_begun_to_write(out: Path, files: int, _: int) -> bool:
    """Whether there are more than ``files`` files of the new model."""
    return len(list(out.parent.glob(f".{out.name}.*.new/*"))) > files


def has_run_for(seconds: float, pid: int) -> bool:
    """Whether a process has had this much processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") >= seconds


def kill_trainings(scene: Scene, count: int) -> Iterator[str]:
    done = 0
    while done < count:
        run = scene.here / f"run{done}"
        for _ in range(min(scene.random.choice((1, 1, 3, 5)), count - done)):
            done += 1
            if done % 3:  # at some step, otherwise at any moment
                when = partial(has_reached, run, scene.random.randint(last_step(run) or 0, STEPS))
            else:
                when = partial(has_run_for, scene.random.uniform(0, scene.seconds["train"]))
            outcome = scene.kill(scene.train(run), when)
            yield f"training {done} {outcome} at step {last_step(run)}"
        scene.run(scene.train(run))
        scene.check(f"training {done}", tree(run), scene.usual)
        shutil.rmtree(run)


def kill_compressions(scene: Scene, count: int) -> Iterator[str]:
    older, newer, out = tree(scene.here / "older"), tree(scene.here / "small"), scene.here / "out"
    for number in range(1, count + 1):
        for _ in range(20):  # until one is killed before it ends
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(scene.here / "older", out)
            if number % 2:  # while it writes, otherwise at any moment
                when = partial(has_begun_to_write, out, scene.random.randint(0, 3))
            else:
                when = partial(has_run_for, scene.random.uniform(0, scene.seconds["compress"]))
            outcome = scene.kill(scene.compress(out), when)
            if outcome == "killed":
                break
        hidden = len(list(scene.here.glob(".*")))
        there = out if out.exists() else next(scene.here.glob(".out.*.old"), out)
        found = tree(there)
        scene.check(f"compression {number}, killed", found, newer if found == newer else older)
        scene.run(scene.compress(out))
        scene.check(f"compression {number}", tree(out), newer)
        left = [path.name for path in scene.here.glob(".*")]
        scene.failures += [f"compression {number}: {name} was left" for name in left]
        moment = " while it wrote" if number % 2 else ""
        yield f"compression {number} {outcome}{moment}, {hidden} hidden files, {len(left)} left"


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Callable[[int], None] | None]:
    """A file system of ``size`` bytes at ``directory``; gives a function that changes its size, and None where this
    user cannot mount one."""
    directory.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(options, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(directory)], check=True)

    try:
        yield resize if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(directory)], check=True)
        shutil.rmtree(directory)


def fill_disks(scene: Scene, count: int) -> Iterator[str]:
    largest = sum(4096 * -(-path.stat().st_size // 4096) for path in (scene.here / "undisturbed").rglob("*"))
    newer, older = tree(scene.here / "small"), tree(scene.here / "older")
    for number in range(1, count + 1):
        compressing = number % 3 == 0
        wanted, name = (newer, "small") if compressing else (scene.usual, "run")
        size = 1 << 24 if compressing else scene.random.randrange(1 << 15, largest)
        with small_disk(scene.here / "disk", size) as resize:
            out = scene.here / "disk" / name
            if compressing:
                shutil.copytree(scene.here / "older", out)
                if resize:
                    used = shutil.disk_usage(out).used
                    size = used + scene.random.randrange(0, used)
                    resize(size)
            words = scene.compress(out) if compressing else scene.train(out)
            status, error = scene.run(words, most=1 << 40 if resize else scene.random.randrange(1 << 9, 1 << 14))
            lines = [line for line in error.splitlines() if line.startswith("jaxlm")]
            what = f"full disk {number}"
            if status not in (0, 2) or "Traceback" in error:
                scene.failures.append(f"{what}: status {status}: {error[-1500:]}")
            if status == 2 and compressing:
                scene.check(f"{what}, full", tree(out), older)
            if resize:
                resize(1 << 28)
            scene.run(words)
            scene.check(what, tree(out), wanted)
            left = sorted({path.name for path in out.parent.iterdir()} - {name})
            scene.failures += [f"{what}: {each} was left" for each in left]
        yield f"{what}, {words[0]}, {size >> 10} KiB: status {status}: {' '.join(lines)[:150]}"


def run_all() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=30, metavar="N", help="trainings to kill (%(default)s)")
    parser.add_argument("--compressions", type=int, default=10, metavar="N", help="compressions to kill (%(default)s)")
    parser.add_argument("--disks", type=int, default=10, metavar="N", help="disks to fill (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random moments (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxlm-kills-") as directory:
        here = Path(directory)
        (here / "tmp").mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(here / "tmp")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_compilation_cache_dir", str(here / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        warnings.filterwarnings("ignore", message=".*fork.*")  # JAX has not started yet
        scene = Scene(here, args.seed)
        print("undisturbed: " + ", ".join(f"{name} {each:.1f} s" for name, each in scene.seconds.items()), flush=True)
        figures, disturbances = collections.Counter(), (
            ("trainings", kill_trainings, args.trainings), ("compressions", kill_compressions, args.compressions),
            ("disks", fill_disks, args.disks),
        )
        before = set(os.listdir(here))
        for name, disturb, count in disturbances:
            for line in disturb(scene, count):
                print(line, flush=True)
                figures[name] += 1
                figures[f"{name} that were disturbed"] += "killed" in line or "status 2" in line
        left = [name for name in set(os.listdir(here)) - before - {"out"}] + os.listdir(here / "tmp")
        left += [name for name in os.listdir(here / "cache") if name.startswith(".")]
        scene.failures += [f"{name} was left" for name in left]
        figures["failures"] = len(scene.failures)
    print(*scene.failures, sep="\n")
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures | {"what failed": scene.failures}, indent=2) + "\n")
    return bool(scene.failures)


if __name__ == "__main__":
    sys.exit(run_all())
