"""``train``: an Experiment in, a model directory out; whatever happens on the way, the run can be resumed."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.checkpoint.store import Store
from jaxlm.core.errors import UserError
from jaxlm.core.host_memory import keep_freed_memory
from jaxlm.core.sharding import batch_sharding, bytes_per_device, on_device
from jaxlm.core.tree import count_params, flatten
from jaxlm.training.config import Experiment
from jaxlm.training.export import Exporter
from jaxlm.training.flops import FLOP_CONVENTION, peak_flops, step_flops
from jaxlm.training.metrics import MetricsWriter, Throughput, peak_memory_bytes, state_report
from jaxlm.training.multihost.preflight import preflight
from jaxlm.training.objectives.loss import Batch
from jaxlm.training.optimizers.optimizer import make_schedule
from jaxlm.training.optimizers.privacy import make_accountant
from jaxlm.training.partition import Partition
from jaxlm.training.program import make_program
from jaxlm.training.progress import Reporter
from jaxlm.training.setup import Setup, prepare
from jaxlm.training.step import TrainState, complete_state, init_state
from jaxlm.training.validation import Validator

__all__ = ["train"]

_IN_FLIGHT = 2  # steps dispatched before the metrics of the oldest are fetched: the device never waits for the host


def train(config: Experiment, out: str | Path) -> Path:
    """Trains and returns the exported model directory, ``out/model``.

    ``out`` gets experiment.json, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/ and model/. Where it already
    holds a checkpoint, training resumes there, with bitwise the losses it would have had without the interruption.
    SIGTERM saves a checkpoint and raises ``SystemExit(0)``.

    Raises:
        UserError: a mistake in the experiment; or a loss or gradient that is not finite, or spikes, where
            ``train.on_nan`` is "abort".
    """
    keep_freed_memory()
    with _terminated() as terminated:
        setup = prepare(config, Path(out))
        with jax.set_mesh(setup.mesh):
            return _Training(setup, Path(out), terminated).run()


@contextmanager
def _terminated() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, inside the block.

    Never outside the main thread, which cannot handle signals, nor with several processes: there ``jax.distributed``
    catches it, and they agree on the step to stop at.
    """
    event = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(Exception):
    """SIGTERM came."""


@dataclass
class _History:
    """What the loop remembers from step to step, besides the state; saved with every checkpoint, as JSON."""

    skipped: int = 0  # bad updates so far
    sums: dict[str, float] = field(default_factory=lambda: {"nll": 0.0, "loss": 0.0, "weight": 0.0})  # since last row
    evaluated: int = 0  # step of the last validation
    best: list[tuple[float, int]] = field(default_factory=list)  # (score, step) of the best, best first
    stale: int = 0  # validations since the best


class _Training:
    """A training under way: the compiled step, where it is, and what it leaves behind."""

    def __init__(self, setup: Setup, run: Path, terminated: threading.Event):
        config, options = setup.config, setup.config.train
        self._setup, self._options, self._directory, self._terminated = setup, options, run, terminated
        program = make_program(config, setup.graphdef, setup.like, setup.mesh, setup.reference)
        self._compression, self._tx = program.compression, program.tx
        self._abstract, self._update = program.state, program.update
        self._layout = jax.tree.map(lambda leaf: leaf.sharding, program.state)
        self._partition = Partition(flatten(setup.like))
        self._accountant = make_accountant(config, setup.loader)
        self._exporter = Exporter(setup, program.compression, run)
        self._rates = np.asarray(make_schedule(config.optim, options.steps)(np.arange(options.steps)))
        self._validator = Validator(setup, self._put, self._check) if setup.valid_loader else None
        self._step = self._batch = 0  # updates done, batches taken
        self._looks = 0  # for a signal to stop, in this process; the same in all of them
        self._saved: int | None = None  # step of the newest checkpoint
        self._history = _History()
        self._pending: deque[tuple[int, float | None, dict[str, jax.Array]]] = deque()  # step, FLOPs, metrics
        self._flops: dict[tuple, float] = {}  # of a step, by batch shape
        peak = peak_flops(setup.mesh.devices.flat[0])
        self._peak = peak * setup.mesh.size if peak else None

    def run(self) -> Path:
        """To the end, or until there is no patience left."""
        first = jax.process_index() == 0
        if first:
            self._setup.write(self._directory)
        checked = preflight(self._setup, self._directory)
        with ExitStack() as stack:
            self._store = self._open_store()
            stack.callback(self._store.close)
            self._state = self._restore() or self._start()
            self._writer = MetricsWriter(self._directory, self._step) if first else None
            if self._writer:
                stack.callback(self._writer.close)
            self._reporter = Reporter(self._options.steps, self._step, enabled=first)
            stack.callback(self._reporter.close)
            self._announce(checked)
            batches = self._setup.loader.iterate(self._batch)
            stack.callback(batches.close)
            self._meter = Throughput(self._peak)
            try:
                self._loop(batches)
                return self._export()
            except _Terminated:
                self._save()
                self._store.wait()
                self._reporter.line(f"terminated: step {self._step} is saved in {self._directory}; run again to go on")
                raise SystemExit(0) from None

    def _start(self) -> TrainState:
        setup, options = self._setup, self._options
        return init_state(
            setup.initial, self._tx, options.seed, self._layout,
            reference=setup.reference and setup.reference.params,
            extra=setup.reference.extra if setup.reference else {}, average=options.ema > 0,
        )

    def _open_store(self) -> Store:
        options = self._options
        return Store(
            self._directory / "checkpoints", keep_latest=options.keep_latest,
            keep_best=max(options.keep_best, options.average),
            metric_mode="min" if self._setup.config.eval.metric == "loss" else "max",
        )

    def _restore(self) -> TrainState | None:
        restored = self._store.restore_latest(self._abstract.saved)
        if restored is None:
            return None
        state, remembered, self._step = restored
        self._saved = self._step
        self._batch = self._setup.loader.batch_at_examples(remembered["examples"])
        self._history = _History(**remembered["history"])
        for score, step in self._history.best:  # also of one saved in the middle of its validation
            self._store.score(step, score)
        setup = self._setup
        return complete_state(state, setup.initial, self._layout, setup.reference and setup.reference.params)

    def _announce(self, checked: str | None) -> None:
        setup = self._setup
        self._reporter.line(setup.report)
        self._reporter.line(state_report(setup.like, self._abstract))
        for line in setup.contamination:
            self._reporter.line(line)
        if checked:
            self._reporter.line(checked)
        for loader in (setup.loader, setup.valid_loader):
            for note in loader.notes() if loader else ():
                self._reporter.line(f"note: {note}")
        if self._step:
            self._reporter.line(f"resuming at step {self._step}")
        self._write({"step": self._step, "start": {
            "parameters": count_params(setup.like), "device": setup.mesh.devices.flat[0].device_kind,
            "mesh": dict(setup.mesh.shape), "optimizer_bytes": bytes_per_device(self._abstract.opt_state),
            "peak_flops": self._peak, "flop_convention": FLOP_CONVENTION,
        }})

    def _loop(self, batches: Iterator[Batch]) -> None:
        options, history = self._options, self._history
        while True:
            self._check()
            last = self._step >= options.steps
            if self._due(options.eval_every, last) and self._validator and history.evaluated != self._step:
                self._evaluate()
            if options.patience and history.stale >= options.patience:
                self._reporter.line(f"stopping: no improvement in {history.stale} validations")
                last = True
            if self._due(options.checkpoint_every, last) or last:
                self._save()
            if last:
                return
            self._advance(next(batches))

    def _due(self, every: int, last: bool) -> bool:
        return every > 0 and self._step > 0 and (last or self._step % every == 0)

    def _check(self) -> None:
        """Raises if this process was told to stop, or one of several was. All of those look equally often: they stop
        at the look that JAX finds them to agree on."""
        if jax.process_count() > 1:
            self._looks += 1
            if multihost_utils.reached_preemption_sync_point(self._looks):
                raise _Terminated
        if self._terminated.is_set():
            raise _Terminated

    def _put(self, batch: Batch) -> Batch:
        """This process's rows, as part of an array over all devices."""
        if self._setup.mesh.size == 1:
            return batch
        mesh, parts = self._setup.mesh, self._setup.parts
        return {
            name: jax.make_array_from_process_local_data(
                batch_sharding(mesh, x.shape[1]), x, (x.shape[0] * parts, *x.shape[1:])
            )
            for name, x in batch.items()
        }

    def _advance(self, batch: Batch) -> None:
        """Dispatches a step, and books one that has finished."""
        batch = self._put(batch)
        shapes = {name: x.shape for name, x in batch.items()}
        known = tuple(shapes.values())
        if flops := self._flops.get(known):
            self._state, metrics = self._update(self._state, batch)
        else:  # compiles: its speed would be that of no other step
            self._drain()
            self._flops[known] = step_flops(self._setup.config.model, flatten(self._setup.like), shapes)
            with self._meter.paused():
                self._state, metrics = jax.block_until_ready(self._update(self._state, batch))
        self._step += 1
        self._batch += 1
        self._pending.append((self._step, flops, metrics))
        if len(self._pending) > _IN_FLIGHT:
            self._book()
        self._reporter.advance(self._step)

    def _book(self) -> None:
        """Fetches the metrics of the oldest step in flight, which waits for it if it has not finished."""
        step, flops, metrics = self._pending.popleft()
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if flops:
            self._meter.add(metrics["weight"] * metrics.get("tokens", 1.0), flops)
        history = self._history
        if metrics["bad"]:
            self._bad(step, metrics)
        else:
            history.sums["weight"] += metrics["weight"]
            for name in sorted(metrics.keys() - {"weight", "grad_norm", "bad"}):
                history.sums[name] = history.sums.get(name, 0.0) + metrics[name] * metrics["weight"]
        if step % self._options.log_every == 0 or step == self._options.steps:
            weight = history.sums["weight"]
            more = {name: total / weight for name, total in history.sums.items() if name not in _History().sums}
            tokens = weight * more.pop("tokens", 1.0) if weight else 0.0
            row = {
                "step": step,
                "loss": history.sums["nll"] / weight if weight else None,
                "objective": history.sums["loss"] / weight if weight else None,
                "grad_norm": metrics["grad_norm"] if not metrics["bad"] else None,
                "lr": float(self._rates[step - 1 - history.skipped + int(metrics["bad"])]),  # by updates, not by steps
                "tokens": round(tokens),
                "skipped": history.skipped,
                **more,
                **({"epsilon": self._accountant.epsilon(step)} if self._accountant else {}),
                **self._meter.read(),
                "peak_memory_bytes": peak_memory_bytes(),
            }
            self._write(row)
            self._reporter.train(row)
            history.sums = _History().sums

    def _bad(self, step: int, metrics: dict[str, float]) -> None:
        loss, norm = metrics["loss"], metrics["grad_norm"]
        if np.isfinite(loss) and np.isfinite(norm):
            what = f"the gradient norm {norm:.3g} is over {self._options.spike_factor:g} times its running mean"
        else:
            what = f"the loss is {loss:.3g} and the gradient norm {norm:.3g}"
        if self._options.on_nan == "abort":
            raise UserError(f"step {step}: {what}; lower optim.lr, or set train.on_nan=skip to leave such updates out")
        self._history.skipped += 1
        self._reporter.line(f"step {step}: update left out: {what}")

    def _evaluate(self) -> None:
        self._drain()
        with self._meter.paused():
            params = self._flat(self._state)
            scores = self._validator(self._compression.placed(params), self._state.reference)
            scores |= self._compression.report(params)
        history = self._history
        history.evaluated = self._step
        metric = self._setup.config.eval.metric
        score = scores[f"valid_{metric}"]
        complete = self._step - history.skipped >= self._compression.complete  # a denser model is no rival
        history.stale += complete
        if np.isfinite(score) and complete:
            scored = [*history.best, (score, self._step)]
            scored.sort(key=lambda pair: pair[0], reverse=metric == "bleu")
            history.best = scored[:max(self._store.keep_best, 1)]
            history.stale = history.stale if history.best[0][1] != self._step else 0
        self._write({"step": self._step, **scores})
        shown = "  ".join(f"{name.removeprefix('valid_')} {value:.4f}" for name, value in scores.items())
        mark = "  (best)" if complete and not history.stale else ""
        self._reporter.line(f"step {self._step}  validation {shown}{mark}")
        if self._store.keep_best and any(step == self._step for _, step in history.best):
            self._save()

    def _drain(self) -> None:
        while self._pending:
            self._book()

    def _save(self) -> None:
        """A checkpoint of this step, if there is none."""
        score = next((score for score, step in self._history.best if step == self._step), None)
        if self._saved == self._step:
            if score is not None:
                self._store.score(self._step, score)
            return
        self._drain()
        remembered = {**self._setup.loader.state(self._batch), "history": dataclasses.asdict(self._history)}
        with self._meter.paused():
            self._store.save(self._step, self._state.saved, remembered, score)
        self._saved = self._step

    def _write(self, row: dict[str, Any]) -> None:
        if self._writer:
            self._writer.write(row)

    def _flat(self, state: TrainState) -> dict[str, Any]:
        """The model's flat parameters: of the moving average, where there is one."""
        return self._partition.join(jax.tree.map(on_device, state.average, self._layout.average) or state.params,
                                    state.frozen)

    def _export(self) -> Path:
        """What the training leaves behind: the best parameters, the mean of the ``average`` best, or the last where
        none were validated."""
        steps = [self._step]
        if self._store.keep_best and self._history.best:
            steps = [step for _, step in self._history.best[:max(self._options.average, 1)]]
        if self._accountant:
            self._reporter.line(self._accountant.report(self._step))
        params, steps = self._mean(steps)
        return self._exporter.write(params, sorted(steps), self._reporter.line)

    def _mean(self, steps: list[int]) -> tuple[dict[str, Any], list[int]]:
        """The mean of the parameters at those of these steps that can be read, and which they are."""
        total, read = None, []
        self._store.wait()
        which = "average" if self._state.average else "params"
        for step in steps if steps != [self._step] else ():
            try:
                trained = self._store.restore_part(step, which, getattr(self._abstract, which))
            except UserError as error:
                self._reporter.line(f"{error}; the model is made without it")
                continue
            total = trained if total is None else jax.tree.map(jnp.add, total, trained)
            read.append(step)
        if not read:
            return self._flat(self._state), [self._step]
        return self._partition.join(jax.tree.map(lambda x: x / len(read), total), self._state.frozen), read
