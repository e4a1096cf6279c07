"""Pipeline parallelism: the layers of a stack over the mesh axis ``stage``, microbatches flowing through them.

All devices run one program: the layers are an array ``[stages, layers of a stage, ...]`` and the microbatches under way
one ``[stages, rows, ...]``, both sharded over ``stage``. At each tick every stage runs its layers on its microbatch
(``vmap``), and the array of microbatches shifts by one stage, which is a collective permute (GPipe, arXiv:1811.06965).

A stack of R layer groups goes around R times: a device holds R runs of layers far apart from each other, and a microbatch
leaving the last stage re-enters the first, until it has seen all of them. That divides the time during which stages
wait by R (the interleaved schedule of Megatron-LM, arXiv:2104.04473, section 2.2). Microbatches go around in groups of
as many as there are stages, so that one that re-enters finds its place free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.errors import UserError
from jaxlm.core.sharding import constrain

__all__ = ["Schedule", "flow", "make_schedule", "stages_in_use"]

_MOVING_AXES = ("layers", "batch", "length", "features")  # of the microbatches under way


@dataclass(frozen=True)
class Schedule:
    """How a stack is walked in a pipeline."""

    stages: int
    microbatches: int
    repeats: int

    @property
    def ticks(self) -> int:
        """From the first microbatch's entry to the last one's exit; a tick is a stage's layers on a microbatch."""
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of ticks in which a stage has nothing to do (arXiv:2104.04473, section 2.2)."""
        return (self.stages - 1) / self.ticks

    @property
    def group(self) -> int:
        """Microbatches that go around together."""
        return self.microbatches if self.repeats == 1 else self.stages

    def microbatch(self, visit: jax.Array) -> jax.Array:
        """The number of the microbatch that a stage sees at its visit 0, 1, ...; what is out of range is clipped."""
        visit = jnp.clip(visit, 0, self.microbatches * self.repeats - 1)
        return visit // (self.group * self.repeats) * self.group + visit % self.group


def stages_in_use() -> int:
    """The size of the axis ``stage`` of the mesh in use (``jax.set_mesh``); 1 without one."""
    return dict(jax.sharding.get_abstract_mesh().shape).get("stage", 1)


def make_schedule(layer_groups: Sequence[Sequence[int]], stages: int, microbatches: int) -> Schedule:
    """The schedule of a stack with these layers in its layer groups, which are its repeats; ``microbatches`` 0: as many as
    there are stages. UserError where layers or microbatches do not divide."""
    if microbatches < 0:
        raise UserError(f"model.microbatches is {microbatches}; it must not be negative")
    microbatches = microbatches or stages
    sizes = [len(run) for run in layer_groups]
    if len(set(sizes)) > 1 or sizes[0] % stages:
        fitting = math.ceil(sum(sizes) / stages) * stages
        raise UserError(
            f"layer groups of {' and '.join(map(str, sizes))} layers do not divide among {stages} stages; make them equal "
            f"multiples of {stages}, such as one of {fitting}, or choose another mesh.stage"
        )
    if len(sizes) > 1 and microbatches % stages:
        raise UserError(
            f"{microbatches} microbatches do not go {len(sizes)} times around {stages} stages; make model.microbatches "
            f"a multiple of {stages}"
        )
    return Schedule(stages, microbatches, len(sizes))


def flow(
    run: Callable[..., tuple[jax.Array, Any]], repeats: Sequence[Any], x_BxTxD: jax.Array, along: Any, view: Any,
    schedule: Schedule,
) -> tuple[jax.Array, Any]:
    """The output of all layers for ``x``, and what they count, summed over the microbatches.

    ``repeats`` has, a layer group, a tree of arrays ``[layers, ...]``. ``along`` is a tree of activations ``[B, ., D]``
    that each microbatch takes with it, and ``view`` one of arrays ``[B, ...]``, or ``[1, ...]`` where all rows share
    it, that are looked up (a gradient through those of B rows would cost more than taking them along).

    ``run(layers, others, here, x, along, view, microbatch)`` takes one microbatch through the layers of one stage:
    those of ``layers`` if ``here`` is true, else those of ``others``, which is None where there is no choice. It gives
    the output and a tree of counts ``[layers of a stage, ...]``; those of the whole are ``[layers, ...]``.
    """
    S, group, groups = schedule.stages, schedule.group, schedule.microbatches // schedule.group
    stage_S = jnp.arange(S)
    repeats = [jax.tree.map(lambda w: w.reshape(S, -1, *w.shape[1:]), layers) for layers in repeats]

    def spread(leaf):
        """A copy a stage, each on its own devices: the sum of their gradients is then taken once, after the loop."""
        return jnp.broadcast_to(leaf, (S, *leaf.shape))

    def split(leaf):
        """``[B, ...]`` to ``[microbatches, B / microbatches, ...]``. Row i goes to microbatch i % microbatches: with
        rows sharded in contiguous runs, no row changes its device."""
        return leaf.reshape(-1, schedule.microbatches, *leaf.shape[1:]).swapaxes(0, 1)

    def entering(leaf):
        leaf = jax.vmap(lambda each: constrain(spread(each), _MOVING_AXES))(split(leaf))
        return leaf.reshape(groups, group, *leaf.shape[1:])

    def of_all_rows(leaf):
        return constrain(spread(leaf), ("layers", *[None] * leaf.ndim))

    shared = jax.tree.map(lambda leaf: of_all_rows(leaf) if leaf.shape[0] == 1 else None, view)
    per_row = jax.tree.map(lambda leaf: None if leaf.shape[0] == 1 else split(leaf), view)

    def look(microbatch_S):
        looked_up = jax.tree.map(lambda leaf: jax.vmap(lambda i: leaf[i])(microbatch_S), per_row)
        return jax.tree.map(lambda a, b: b if a is None else a, shared, looked_up, is_leaf=lambda leaf: leaf is None)

    def tick(r: int, start: jax.Array, choosing: bool, carry, xs):
        moving, done, counts = carry
        t, new = xs
        if new is not None:
            moving = jax.tree.map(lambda old, new: jnp.where(_at(stage_S, 0, old), new, old), moving, new)
        microbatch_S = schedule.microbatch(t - stage_S)
        others = repeats[r - 1] if choosing else None  # stages that this round has not reached are in the one before
        x, more = running(repeats[r], others, stage_S <= t - start, *moving, look(microbatch_S), microbatch_S)
        counts = jax.tree.map(partial(_add, schedule, t - stage_S), counts, more)
        x = constrain(x, _MOVING_AXES)
        last = schedule.microbatch(t - (S - 1))
        done = jax.lax.dynamic_update_index_in_dim(done, x, last, 1)  # early ones are overwritten
        moving = jax.tree.map(lambda leaf: constrain(_shift(leaf), _MOVING_AXES), (x, moving[1]))
        return (moving, done, counts), None

    def round_(carry, start, ticks: int, r: int, choosing: bool, new=None):
        return jax.lax.scan(partial(tick, r, start, choosing), carry, (start + jnp.arange(ticks), new))[0]

    def once_around(carry, xs):
        number, new = xs
        for r in range(schedule.repeats):
            start = (number * schedule.repeats + r) * group
            carry = round_(carry, start, group, r, schedule.repeats > 1, None if r else new)
        return carry, None

    running = jax.vmap(run, spmd_axis_name="stage")
    new = jax.tree.map(entering, (x_BxTxD, along))
    moving = jax.tree.map(lambda leaf: constrain(jnp.zeros(leaf.shape[2:], leaf.dtype), _MOVING_AXES), new)
    done = jnp.zeros((S, schedule.microbatches, *moving[0].shape[1:]), x_BxTxD.dtype)
    done = constrain(done, ("layers", None, *_MOVING_AXES[1:]))
    _, more = jax.eval_shape(
        lambda moving: running(repeats[0], None, stage_S == 0, *moving, look(stage_S), stage_S), moving
    )
    counts = jax.tree.map(lambda leaf: jnp.zeros((schedule.repeats, *leaf.shape), leaf.dtype), more)
    carry, _ = jax.lax.scan(once_around, (moving, done, counts), (jnp.arange(groups), new))
    _, done, counts = round_(carry, schedule.ticks - (S - 1), S - 1, schedule.repeats - 1, False)
    # By a sum rather than ``done[-1]``, which XLA would move to the first stage before it sends it to all.
    x = jnp.sum(jnp.where(_at(stage_S, S - 1, done), done, 0), 0)
    x_BxTxD = constrain(x.swapaxes(0, 1).reshape(x_BxTxD.shape), _MOVING_AXES[1:])
    return x_BxTxD, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), counts)


def _at(stage_S: jax.Array, stage: int, like: jax.Array) -> jax.Array:
    """True for one stage, in a shape that goes with ``like``."""
    return (stage_S == stage).reshape(-1, *[1] * (like.ndim - 1))


def _add(schedule: Schedule, visit_S: jax.Array, total_RxS: jax.Array, more_S: jax.Array) -> jax.Array:
    """The counts ``[repeats, stages, ...]`` with those of a tick added, save of stages that have nothing to do."""
    repeat_S = visit_S // schedule.group % schedule.repeats
    busy_S = (visit_S >= 0) & (visit_S < schedule.microbatches * schedule.repeats)
    here_RxS = (jnp.arange(schedule.repeats)[:, None] == repeat_S) & busy_S
    here_RxS = here_RxS.reshape(*here_RxS.shape, *[1] * (more_S.ndim - 1))
    return total_RxS + jnp.where(here_RxS, more_S, 0)


@jax.custom_vjp
def _shift(x_Sx: jax.Array) -> jax.Array:
    """Each stage's part to the next one, the last one's to the first. JAX would transpose it into two permutes."""
    return jnp.roll(x_Sx, 1, 0)


_shift.defvjp(lambda x_Sx: (jnp.roll(x_Sx, 1, 0), None), lambda _, gradient: (jnp.roll(gradient, -1, 0),))
