"""What a run writes down: rows of ``metrics.jsonl``, the same numbers for TensorBoard, and how they are measured.

A training row has ``step`` (updates done), ``loss`` (nats per token, mean since the row before; None if every update
was left out), ``objective`` (the same with smoothing and z-loss), ``grad_norm``, ``lr``, ``tokens`` (since the row
before), ``skipped`` (updates, in all), what else the loss sums (``dropped``: where experts have a capacity, the share
of choices that found no slot), ``epsilon`` (of a private training), ``step_ms``, ``tokens_per_second``, ``mfu`` and
``peak_memory_bytes``. Speeds are those of steps that did not compile, None where all did; ``mfu`` is None where the
peak is unknown, too. A validation row has ``step`` and ``valid_...``; the first row of each start has ``start``.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from jaxlm.core.disk import room_for
from jaxlm.core.sharding import bytes_per_device
from jaxlm.core.tree import Params, count_params
from jaxlm.training.step import TrainState

__all__ = ["Throughput", "MetricsWriter", "peak_memory_bytes", "read_metrics", "state_report"]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut short by a kill is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter:
    """Appends rows to ``RUN/metrics.jsonl`` and ``RUN/tensorboard``.

    A run that resumes at ``step`` repeats what came after it, so rows past ``step`` are dropped first. Methods raise
    UserError when the disk is full.
    """

    def __init__(self, run: Path, step: int):
        self._path = run / "metrics.jsonl"
        kept = [row for row in read_metrics(self._path) if row["step"] <= step] if step and self._path.exists() else []
        with room_for(str(self._path)):
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(partial, self._path)
            self._file = self._path.open("a")
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, row: Mapping[str, Any]) -> None:
        """``row`` must have ``step``; numbers go to both files, everything else to the JSON lines only."""
        with room_for(str(self._path)):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        with room_for(str(self._path)):
            self._file.close()
            self._board.close()


class Throughput:
    """Speed of the steps finished since the last reading; time spent inside ``paused()`` does not count."""

    def __init__(self, peak: float | None):
        self._peak = peak  # FLOP/s of all devices together
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._steps = self._tokens = self._flops = 0

    def add(self, tokens: float, flops: float) -> None:
        """One step more."""
        self._steps += 1
        self._tokens += tokens
        self._flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - before

    def read(self) -> dict[str, float | None]:
        """``step_ms``, ``tokens_per_second``, ``mfu`` (a fraction), from here back to the reading before."""
        seconds = time.perf_counter() - self._start
        if not self._steps:
            self._restart()
            return dict.fromkeys(("step_ms", "tokens_per_second", "mfu"))
        speed = {
            "step_ms": 1e3 * seconds / self._steps,
            "tokens_per_second": self._tokens / seconds,
            "mfu": self._flops / seconds / self._peak if self._peak else None,
        }
        self._restart()
        return speed


def peak_memory_bytes() -> int:
    """The most a local device has held so far; on a CPU, which does not count, the process's largest resident set."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stat and "peak_bytes_in_use" in stat for stat in stats):
        return max(stat["peak_bytes_in_use"] for stat in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def state_report(like: Params, state: TrainState) -> str:
    """One line: how much of a model is trained, and what a device holds of an abstract state."""
    trained, whole = sum(math.prod(leaf.shape) for leaf in state.params.values()), count_params(like)
    held = {
        "trained": state.params, "frozen": state.frozen, "optimizer": state.opt_state, "average": state.average,
        "second model": state.reference,
    }
    sizes = ((name, bytes_per_device(part)) for name, part in held.items())
    shown = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in sizes if size)
    return f"trained: {trained:,} parameters, {trained / whole:.1%} of the model's; a device holds {shown}"
