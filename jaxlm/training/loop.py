"""``train``: an Experiment in, a model directory out; whatever happens on the way, the run can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from jaxlm.core.host_memory import keep_freed_memory
from jaxlm.core.sharding import on_device
from jaxlm.core.tree import flatten
from jaxlm.data.batches.batch import Batch
from jaxlm.training.config import Experiment
from jaxlm.training.flops import peak_flops
from jaxlm.training.metrics import Throughput
from jaxlm.training.multihost.preflight import preflight
from jaxlm.training.optimizers.privacy import make_accountant
from jaxlm.training.partition import Partition
from jaxlm.training.program import make_program
from jaxlm.training.run.checkpoints import Checkpoints, Position, fresh_state
from jaxlm.training.run.export import Exporter
from jaxlm.training.run.log import RunLog
from jaxlm.training.run.signals import StopSignal, Terminated, stop_on_sigterm
from jaxlm.training.run.steps import StepQueue, put_batch
from jaxlm.training.setup import Setup, prepare
from jaxlm.training.validation import Validator

__all__ = ["Trainer", "train"]


def train(config: Experiment, out: str | Path) -> Path:
    """Trains and returns the exported model directory, ``out/model``.

    ``out`` gets experiment.json, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/ and model/. Where it already
    holds a checkpoint, training resumes there, with bitwise the losses it would have had without the interruption.
    SIGTERM saves a checkpoint and raises ``SystemExit(0)``.

    Raises:
        UserError: when the experiment has a mistake; when a loss or gradient is not finite, or spikes, and
            ``train.on_nan`` is "abort".
    """
    keep_freed_memory()
    with stop_on_sigterm() as stop:
        setup = prepare(config, Path(out))
        with jax.set_mesh(setup.mesh):
            return Trainer(setup, Path(out), stop).run()


class Trainer:
    """A training under way: its state, its position, and what steps, validates, saves and logs."""

    def __init__(self, setup: Setup, run: Path, stop: StopSignal):
        self.setup, self.run_directory, self._stop = setup, run, stop
        self.program = make_program(setup.config, setup.graphdef, setup.like, setup.mesh, setup.reference)
        self.position = Position()
        self._options = setup.config.train
        self._partition = Partition(flatten(setup.like))
        self._exporter = Exporter(setup, self.program.compression, run)
        self._accountant = make_accountant(setup.config, setup.loader)
        self._validator = None
        if setup.valid_loader:
            self._validator = Validator(setup, lambda batch: put_batch(setup, batch), stop.check)
        peak = peak_flops(setup.mesh.devices.flat[0])
        self._throughput = Throughput(peak * setup.mesh.size if peak else None)
        self._steps = StepQueue(setup, self.program.update, self._throughput, self._finished)

    def run(self) -> Path:
        """Trains to the last step, or until validation has not improved for ``train.patience`` times; exports."""
        if jax.process_index() == 0:
            self.setup.write(self.run_directory)
        checked = preflight(self.setup, self.run_directory)
        with ExitStack() as stack:
            self._checkpoints = Checkpoints(self.setup, self.program, self.run_directory)
            stack.callback(self._checkpoints.close)
            restored = self._checkpoints.restore()
            self.state, self.position = restored or (fresh_state(self.setup, self.program), Position())
            self._log = RunLog(
                self.setup, self.run_directory, self.position.step, self._throughput, self._accountant
            )
            stack.callback(self._log.close)
            self._log.start(self.position.step, self.program.state, checked)
            batches = self.setup.loader.iterate(self.position.batch)
            stack.callback(batches.close)
            self._throughput.restart()
            try:
                self._loop(batches)
                return self._export()
            except Terminated:
                self._save()
                self._checkpoints.wait()
                self._log.line(
                    f"terminated: step {self.position.step} is saved in {self.run_directory}; run again to go on"
                )
                raise SystemExit(0) from None

    def _loop(self, batches: Iterator[Batch]) -> None:
        options, position = self._options, self.position
        while True:
            self._stop.check()
            last = position.step >= options.steps
            if self._due(options.eval_every, last) and self._validator and position.history.evaluated != position.step:
                self.evaluate()
            if options.patience and position.history.stale >= options.patience:
                self._log.line(f"stopping: no improvement in {position.history.stale} validations")
                last = True
            if self._due(options.checkpoint_every, last) or last:
                self._save()
            if last:
                return
            self.advance(next(batches))

    def _due(self, every: int, last: bool) -> bool:
        return every > 0 and self.position.step > 0 and (last or self.position.step % every == 0)

    def advance(self, batch: Batch) -> None:
        """Dispatches a step."""
        position = self.position
        self.state = self._steps.dispatch(position.step + 1, self.state, batch)
        position.step += 1
        position.batch += 1
        self._log.advance(position.step)

    def _finished(self, step: int, metrics: dict[str, float]) -> None:
        self._log.step(step, metrics, self.position.history)

    def evaluate(self) -> None:
        """Validates the model of this step, and saves it where it is among the best."""
        self._steps.drain()
        position, compression = self.position, self.program.compression
        with self._throughput.paused():
            params = self.model_params()
            scores = self._validator(compression.for_platform(params), self.state.reference)
            scores |= compression.report(params)
        metric = self.setup.config.eval.metric
        best = position.history.add_score(
            position.step, scores[f"valid_{metric}"], highest=metric == "bleu",
            eligible=position.step - position.history.skipped >= compression.complete_at,
            keep=max(self._checkpoints.keep_best, 1),
        )
        self._log.validation(position.step, scores, best)
        if self._checkpoints.keep_best and position.history.score_of(position.step) is not None:
            self._save()

    def _save(self) -> None:
        """A checkpoint of this step, if there is none."""
        if not self._checkpoints.is_saved(self.position.step):
            self._steps.drain()
        with self._throughput.paused():
            self._checkpoints.save(self.state, self.position)

    def model_params(self) -> dict[str, Any]:
        """The model's flat parameters: those of the moving average, where the training keeps one."""
        average = jax.tree.map(on_device, self.state.average, self.program.layout.average)
        return self._partition.join(average or self.state.params, self.state.frozen)

    def _export(self) -> Path:
        """Writes what the training leaves behind: the best parameters, the mean of the ``train.average`` best, or the
        last where none were validated."""
        position = self.position
        steps = [position.step]
        if self._checkpoints.keep_best and position.history.best:
            steps = [step for _, step in position.history.best[:max(self._options.average, 1)]]
        self._log.privacy(position.step)
        name = "average" if self.state.average else "params"
        stored = steps if steps != [position.step] else []
        mean, read = self._checkpoints.mean(stored, name, self._log.line)
        params, steps = self.model_params(), [position.step]
        if mean is not None:
            params, steps = self._partition.join(mean, self.state.frozen), read
        return self._exporter.write(params, sorted(steps), self._log.line)
