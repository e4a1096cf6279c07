"""Steps on the devices: batches go there, a few steps are in flight, and the metrics of finished ones come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import jax

from jaxlm.core.sharding import batch_sharding
from jaxlm.core.tree import flatten
from jaxlm.data.batches.batch import Batch
from jaxlm.training.flops import step_flops
from jaxlm.training.metrics import Throughput
from jaxlm.training.setup import Setup
from jaxlm.training.state import TrainState
from jaxlm.training.step import Step

__all__ = ["StepQueue", "put_batch"]

_IN_FLIGHT = 2  # steps dispatched before the metrics of the oldest are fetched: the device never waits for the host


def put_batch(setup: Setup, batch: Batch) -> Batch:
    """This process's rows, as part of arrays over all devices."""
    if setup.mesh.size == 1:
        return batch
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding(setup.mesh, x.shape[1]), x, (x.shape[0] * setup.batch_shards, *x.shape[1:])
        )
        for name, x in batch.items()
    }


class StepQueue:
    """Dispatches steps, and calls ``finished(step, metrics)`` for each in order, some steps later."""

    def __init__(
        self, setup: Setup, step: Step, throughput: Throughput, finished: Callable[[int, dict[str, float]], None]
    ):
        self._setup, self._step, self._throughput, self._finished = setup, step, throughput, finished
        self._pending: deque[tuple[int, float | None, dict[str, jax.Array]]] = deque()  # step, FLOPs, metrics
        self._flops: dict[tuple, float] = {}  # of a step, by the shapes of its batch

    def dispatch(self, number: int, state: TrainState, batch: Batch) -> TrainState:
        """The state after step ``number``, which has been dispatched; ``state`` is donated to it."""
        batch = put_batch(self._setup, batch)
        shapes = {name: x.shape for name, x in batch.items()}
        known = tuple(shapes.values())
        if flops := self._flops.get(known):
            state, metrics = self._step(state, batch)
        else:  # this step compiles: its speed would be that of no other step
            self.drain()
            self._flops[known] = step_flops(self._setup.config.model, flatten(self._setup.like), shapes)
            with self._throughput.paused():
                state, metrics = jax.block_until_ready(self._step(state, batch))
        self._pending.append((number, flops, metrics))
        if len(self._pending) > _IN_FLIGHT:
            self._finish_oldest()
        return state

    def drain(self) -> None:
        """Waits for all steps in flight."""
        while self._pending:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        """Fetches the metrics of the oldest step in flight, which waits for it if it has not finished."""
        number, flops, metrics = self._pending.popleft()
        fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if flops:
            self._throughput.add(fetched["weight"] * fetched.get("tokens", 1.0), flops)
        self._finished(number, fetched)
