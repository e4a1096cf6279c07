"""The metrics of a run: rows of ``metrics.jsonl``, the same numbers for TensorBoard, and how they are measured.

A training row has ``step`` (updates done), ``loss`` (nats per token, mean since the last row; None if every update was
skipped), ``objective`` (the same with smoothing and z-loss), ``grad_norm``, ``lr``, ``tokens`` (since the last row),
``skipped`` (updates since step 0), the other sums of the loss (``dropped``: where experts have a capacity, the share of
expert choices over capacity), ``epsilon`` (of a private training), ``step_ms``, ``tokens_per_second``, ``mfu`` and
``peak_memory_bytes``. Speeds count the steps that did not compile, and are None where all did; ``mfu`` is also None
where the peak of the device is unknown. A validation row has ``step`` and ``valid_...``; the first row of each start
has ``start``.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from jaxlm.core.disk import replaced_file, room_for
from jaxlm.core.sharding import bytes_per_device
from jaxlm.core.tree import Params, count_params
from jaxlm.core.untrusted import parse_json
from jaxlm.training.state import TrainState

__all__ = ["Throughput", "MetricsWriter", "peak_memory_bytes", "read_metrics", "state_report"]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, up to one that is damaged, such as a last line cut short by a kill."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


class MetricsWriter:
    """Appends rows to ``RUN/metrics.jsonl`` and ``RUN/tensorboard``.

    A run that resumes at ``step`` repeats the steps after it, so rows past ``step`` are dropped first.

    Raises:
        UserError: by every method, when the disk is full.
    """

    def __init__(self, run: Path, step: int):
        self._path = run / "metrics.jsonl"
        kept = [row for row in read_metrics(self._path) if row["step"] <= step] if step and self._path.exists() else []
        with room_for(str(self._path)):
            with replaced_file(self._path) as new:
                new.write_text("".join(json.dumps(row) + "\n" for row in kept))
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
        """Closes both files."""
        with room_for(str(self._path)):
            self._file.close()
            self._board.close()


class Throughput:
    """The speed of the steps finished since the last ``read``; time inside ``paused()`` does not count."""

    def __init__(self, peak: float | None):
        self.peak = peak  # FLOP/s of all devices together
        self.restart()

    def restart(self) -> None:
        """Begins to count anew."""
        self._start = time.perf_counter()
        self._steps = self._tokens = self._flops = 0

    def add(self, tokens: float, flops: float) -> None:
        """Adds a finished step."""
        self._steps += 1
        self._tokens += tokens
        self._flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside the block out."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - before

    def read(self) -> dict[str, float | None]:
        """``step_ms``, ``tokens_per_second`` and ``mfu`` (a fraction) since the last call."""
        seconds = time.perf_counter() - self._start
        if not self._steps:
            self.restart()
            return dict.fromkeys(("step_ms", "tokens_per_second", "mfu"))
        speed = {
            "step_ms": 1e3 * seconds / self._steps,
            "tokens_per_second": self._tokens / seconds,
            "mfu": self._flops / seconds / self.peak if self.peak else None,
        }
        self.restart()
        return speed


def peak_memory_bytes() -> int:
    """The peak memory of a local device; on CPUs, which do not report it, the peak resident set of the process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stat and "peak_bytes_in_use" in stat for stat in stats):
        return max(stat["peak_bytes_in_use"] for stat in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def state_report(like: Params, state: TrainState) -> str:
    """One line for the user: the share of the model that is trained, and the bytes of an abstract state on a device."""
    trained, whole = sum(math.prod(leaf.shape) for leaf in state.params.values()), count_params(like)
    held = {
        "trained": state.params, "frozen": state.frozen, "optimizer": state.opt_state, "average": state.average,
        "reference model": state.reference,
    }
    sizes = ((name, bytes_per_device(part)) for name, part in held.items())
    shown = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in sizes if size)
    return f"trained: {trained:,} parameters, {trained / whole:.1%} of the model's; a device holds {shown}"
