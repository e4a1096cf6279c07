"""The checkpoints of a run: where it resumes, and the parameters it exports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlm.checkpoint.store import Store
from jaxlm.core.errors import UserError
from jaxlm.training.program import Program
from jaxlm.training.run.history import History
from jaxlm.training.setup import Setup
from jaxlm.training.state import TrainState, complete_state, init_state

__all__ = ["Checkpoints", "Position", "fresh_state"]


@dataclasses.dataclass
class Position:
    """Where a training is."""

    step: int = 0  # updates done
    batch: int = 0  # batches taken from the data
    history: History = dataclasses.field(default_factory=History)


def fresh_state(setup: Setup, program: Program) -> TrainState:
    """The state at step 0, on the devices."""
    reference = setup.reference
    return init_state(
        setup.initial, program.tx, setup.config.train.seed, program.layout, reference=reference and reference.params,
        extra=reference.extra if reference else {}, average=setup.config.train.ema > 0,
    )


class Checkpoints:
    """Saves and restores the state of a run together with its Position."""

    def __init__(self, setup: Setup, program: Program, run: Path):
        options = setup.config.train
        self._setup, self._program = setup, program
        self._saved: int | None = None  # step of the newest checkpoint
        self._store = Store(
            run / "checkpoints", keep_latest=options.keep_latest, keep_best=max(options.keep_best, options.average),
            metric_mode="min" if setup.config.eval.metric == "loss" else "max",
        )

    @property
    def keep_best(self) -> int:
        """How many checkpoints with the best scores are kept."""
        return self._store.keep_best

    def restore(self) -> tuple[TrainState, Position] | None:
        """The newest state that can be read, and where it was; None where there is no checkpoint."""
        restored = self._store.restore_latest(self._program.state.saved)
        if restored is None:
            return None
        state, remembered, step = restored
        self._saved = step
        position = Position(step, self._setup.loader.batch_at_examples(remembered["examples"]),
                            History(**remembered["history"]))
        for score, best in position.history.best:  # a checkpoint written in the middle of its validation has no score
            self._store.score(best, score)
        setup = self._setup
        reference = setup.reference and setup.reference.params
        return complete_state(state, setup.initial, self._program.layout, reference), position

    def is_saved(self, step: int) -> bool:
        """Whether the newest checkpoint is of this step."""
        return self._saved == step

    def save(self, state: TrainState, position: Position) -> None:
        """Begins to write a checkpoint. Where this step has one already, it only gets the score of its validation."""
        score = position.history.score_of(position.step)
        if self.is_saved(position.step):
            if score is not None:
                self._store.score(position.step, score)
            return
        remembered = {**self._setup.loader.state(position.batch), "history": dataclasses.asdict(position.history)}
        self._store.save(position.step, state.saved, remembered, score)
        self._saved = position.step

    def mean(
        self, steps: list[int], name: str, warn: Callable[[str], None]
    ) -> tuple[dict[str, jax.Array] | None, list[int]]:
        """(the mean of ``TrainState.NAME`` over the checkpoints of these steps, the steps that could be read). The mean
        is None where none could be read."""
        total, read = None, []
        self._store.wait()
        for step in steps:
            try:
                trained = self._store.restore_part(step, name, getattr(self._program.state, name))
            except UserError as error:
                warn(f"{error}; the model is made without it")
                continue
            total = trained if total is None else jax.tree.map(jnp.add, total, trained)
            read.append(step)
        return total and jax.tree.map(lambda x: x / len(read), total), read

    def wait(self) -> None:
        """Returns when everything is written."""
        self._store.wait()

    def close(self) -> None:
        """Waits, and closes the directory."""
        self._store.close()
