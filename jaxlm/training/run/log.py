"""The log of a run: rows of metrics, on disk and on the screen."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.core.sharding import bytes_per_device
from jaxlm.core.tree import count_params
from jaxlm.training.flops import FLOP_CONVENTION
from jaxlm.training.metrics import MetricsWriter, Throughput, peak_memory_bytes, state_report
from jaxlm.training.optimizers.optimizer import make_schedule
from jaxlm.training.optimizers.privacy import Accountant
from jaxlm.training.run.history import History
from jaxlm.training.run.reporter import Reporter
from jaxlm.training.setup import Setup
from jaxlm.training.state import TrainState

__all__ = ["RunLog"]


class RunLog:
    """Writes ``metrics.jsonl`` and TensorBoard, and tells the user, in process 0; other processes do neither."""

    def __init__(
        self, setup: Setup, run: Path, step: int, throughput: Throughput, accountant: Accountant | None
    ):
        options, first = setup.config.train, jax.process_index() == 0
        self._setup, self._options, self._throughput, self._accountant = setup, options, throughput, accountant
        self._learning_rates = np.asarray(make_schedule(setup.config.optim, options.steps)(np.arange(options.steps)))
        with ExitStack() as stack:
            self._writer = MetricsWriter(run, step) if first else None
            if self._writer:
                stack.callback(self._writer.close)
            self._reporter = Reporter(options.steps, step, enabled=first)
            stack.callback(self._reporter.close)
            self._closing = stack.pop_all()

    def close(self) -> None:
        self._closing.close()

    def line(self, text: str) -> None:
        """A line for the user."""
        self._reporter.line(text)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self._reporter.advance(step)

    def _write(self, row: dict[str, Any]) -> None:
        if self._writer:
            self._writer.write(row)

    def start(self, step: int, state: TrainState, preflight: str | None) -> None:
        """Logs what a run starts with, at ``step``: data, model, mesh, the abstract state, contamination, notes."""
        setup = self._setup
        self.line(setup.report)
        self.line(state_report(setup.like, state))
        for text in setup.contamination:
            self.line(text)
        if preflight:
            self.line(preflight)
        for loader in (setup.loader, setup.valid_loader):
            for note in loader.notes() if loader else ():
                self.line(f"note: {note}")
        if step:
            self.line(f"resuming at step {step}")
        self._write({"step": step, "start": {
            "parameters": count_params(setup.like), "device": setup.mesh.devices.flat[0].device_kind,
            "mesh": dict(setup.mesh.shape), "optimizer_bytes": bytes_per_device(state.opt_state),
            "peak_flops": self._throughput.peak, "flop_convention": FLOP_CONVENTION,
        }})

    def step(self, step: int, metrics: dict[str, float], history: History) -> None:
        """Adds a finished step to ``history``, and logs a row where one is due.

        Raises:
            UserError: when the step is bad and ``train.on_nan`` is "abort".
        """
        bad = bool(metrics["bad"])
        if bad:
            self._bad(step, metrics)
            history.skipped += 1
        else:
            history.add_metrics(metrics)
        if step % self._options.log_every and step != self._options.steps:
            return
        means = history.take_means()
        row = {
            "step": step, "loss": means.pop("loss"), "objective": means.pop("objective"),
            "grad_norm": None if bad else metrics["grad_norm"],
            "lr": float(self._learning_rates[step - 1 - history.skipped + int(bad)]),  # by updates, not by steps
            "tokens": means.pop("tokens"), "skipped": history.skipped, **means,
            **({"epsilon": self._accountant.epsilon(step)} if self._accountant else {}),
            **self._throughput.read(), "peak_memory_bytes": peak_memory_bytes(),
        }
        self._write(row)
        self._reporter.train(row)

    def _bad(self, step: int, metrics: dict[str, float]) -> None:
        loss, norm = metrics["loss"], metrics["grad_norm"]
        if math.isfinite(loss) and math.isfinite(norm):
            what = f"the gradient norm {norm:.3g} is over {self._options.spike_factor:g} times its running mean"
        else:
            what = f"the loss is {loss:.3g} and the gradient norm {norm:.3g}"
        if self._options.on_nan == "abort":
            raise UserError(f"step {step}: {what}; lower optim.lr, or set train.on_nan=skip to leave such updates out")
        self.line(f"step {step}: update left out: {what}")

    def validation(self, step: int, scores: dict[str, float], best: bool) -> None:
        """Logs a validation."""
        self._write({"step": step, **scores})
        shown = "  ".join(f"{name.removeprefix('valid_')} {value:.4f}" for name, value in scores.items())
        self.line(f"step {step}  validation {shown}{'  (best)' if best else ''}")

    def privacy(self, step: int) -> None:
        """The privacy spent, of a private training."""
        if self._accountant:
            self.line(self._accountant.report(step))
