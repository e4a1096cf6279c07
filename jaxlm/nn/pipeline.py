"""Pipeline parallelism: the layers of a stack are split over the mesh axis ``stage``, and microbatches pass through.

All devices run one program: the layers are an array ``[stages, layers of a stage, ...]`` and the microbatches in the
pipeline one ``[stages, rows, ...]``, both sharded over ``stage``. At each tick every stage runs its layers on its
microbatch (``vmap``), and the array of microbatches shifts by one stage, which is a collective permute (GPipe,
arXiv:1811.06965).

A microbatch goes around the stages once for each layer group of the stack: with R groups a device holds R runs of
layers far apart from each other, and a microbatch that leaves the last stage re-enters the first R - 1 times. That
divides the time during which stages wait by R (the interleaved schedule of Megatron-LM, arXiv:2104.04473, section 2.2).
Microbatches go around in batches of as many as there are stages, so that one that re-enters finds its place free.
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

__all__ = ["Schedule", "make_schedule", "num_stages", "run_pipeline"]

_MOVING_AXES = ("layers", "batch", "length", "features")  # of the microbatches in the pipeline


@dataclass(frozen=True)
class Schedule:
    """In which order a pipeline runs the layers of a stack on the microbatches."""

    stages: int
    microbatches: int
    repeats: int  # times that a microbatch goes around the stages: the layer groups of the stack

    @property
    def ticks(self) -> int:
        """Ticks from the entry of the first microbatch to the exit of the last. In a tick a stage runs its layers."""
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of ticks in which a stage waits (arXiv:2104.04473, section 2.2)."""
        return (self.stages - 1) / self.ticks

    @property
    def group(self) -> int:
        """Microbatches that go around together."""
        return self.microbatches if self.repeats == 1 else self.stages

    def microbatch(self, visit: jax.Array) -> jax.Array:
        """The number of the microbatch that a stage runs at its visit 0, 1, ...; visits out of range are clipped."""
        visit = jnp.clip(visit, 0, self.microbatches * self.repeats - 1)
        return visit // (self.group * self.repeats) * self.group + visit % self.group


def num_stages() -> int:
    """The size of the axis ``stage`` of the mesh in use (``jax.set_mesh``); 1 without one."""
    return dict(jax.sharding.get_abstract_mesh().shape).get("stage", 1)


def make_schedule(layer_groups: Sequence[Sequence[int]], stages: int, microbatches: int) -> Schedule:
    """The schedule of a stack with these layer groups.

    Args:
        layer_groups: the layers of each group; a microbatch goes around once for each.
        stages: the size of the mesh axis ``stage``.
        microbatches: the field of the configuration; 0: as many as stages.

    Raises:
        UserError: when the stages do not divide the layers of each group, or the microbatches.
    """
    if microbatches < 0:
        raise UserError(f"model.microbatches is {microbatches}; it must not be negative")
    microbatches = microbatches or stages
    sizes = [len(run) for run in layer_groups]
    if len(set(sizes)) > 1 or sizes[0] % stages:
        fitting = math.ceil(sum(sizes) / stages) * stages
        raise UserError(
            f"layer groups of {' and '.join(map(str, sizes))} layers do not divide among {stages} stages; make them "
            f"equal multiples of {stages}, such as one of {fitting}, or choose another mesh.stage"
        )
    if len(sizes) > 1 and microbatches % stages:
        raise UserError(
            f"{microbatches} microbatches do not go {len(sizes)} times around {stages} stages; make model.microbatches "
            f"a multiple of {stages}"
        )
    return Schedule(stages, microbatches, len(sizes))


def run_pipeline(
    run_stage: Callable[..., tuple[jax.Array, Any]], groups: Sequence[Any], x_BxTxD: jax.Array, carried: Any,
    context: Any, schedule: Schedule,
) -> tuple[jax.Array, Any]:
    """The layers of a stack, in a pipeline.

    Args:
        run_stage: ``run_stage(layers, others, here, x, carried, context, microbatch)`` runs the layers of one stage on
            one microbatch: ``layers`` if ``here`` is true, else ``others``, which is None where there is no choice. It
            gives the output and a tree of counts ``[layers of a stage, ...]``.
        groups: for each layer group a tree of arrays ``[layers, ...]``.
        x_BxTxD: the input of the first layer.
        carried: a tree of activations ``[B, ., D]`` that move with their microbatch.
        context: a tree of arrays ``[B, ...]``, or ``[1, ...]`` where all rows share one. A stage looks up the rows of
            its microbatch. (The gradient of a lookup in arrays of B rows would cost more than moving them.)
        schedule: from ``make_schedule``. Its microbatches must divide B.

    Returns:
        The output of the last layer, and the counts ``[layers, ...]`` summed over the microbatches.
    """
    return _Pipeline(run_stage, groups, context, schedule).run(x_BxTxD, carried)


class _Pipeline:
    """``run_pipeline`` in steps. S are the stages, M the microbatches."""

    def __init__(self, run_stage: Callable, groups: Sequence[Any], context: Any, schedule: Schedule):
        self.schedule = schedule
        self.stage_S = jnp.arange(schedule.stages)
        self.run_stages = jax.vmap(run_stage, spmd_axis_name="stage")
        self.groups = [
            jax.tree.map(lambda w: w.reshape(schedule.stages, -1, *w.shape[1:]), layers) for layers in groups
        ]
        self.shared = jax.tree.map(lambda leaf: self._replicated(leaf) if leaf.shape[0] == 1 else None, context)
        self.per_row = jax.tree.map(lambda leaf: None if leaf.shape[0] == 1 else self._split(leaf), context)

    def run(self, x_BxTxD: jax.Array, carried: Any) -> tuple[jax.Array, Any]:
        schedule, S = self.schedule, self.schedule.stages
        new = jax.tree.map(self._entering, (x_BxTxD, carried))
        moving = jax.tree.map(lambda leaf: constrain(jnp.zeros(leaf.shape[2:], leaf.dtype), _MOVING_AXES), new)
        done_SxM = jnp.zeros((S, schedule.microbatches, *moving[0].shape[1:]), x_BxTxD.dtype)
        done_SxM = constrain(done_SxM, ("layers", None, *_MOVING_AXES[1:]))
        carry = moving, done_SxM, self._no_counts(moving)
        batches = schedule.microbatches // schedule.group
        carry, _ = jax.lax.scan(self._all_rounds, carry, (jnp.arange(batches), new))
        _, done_SxM, counts = self._round(carry, schedule.ticks - (S - 1), S - 1, schedule.repeats - 1, False)
        # By a sum rather than ``done[-1]``, which XLA would move to the first stage before it sends it to all.
        x_Mx = jnp.sum(jnp.where(_at(self.stage_S, S - 1, done_SxM), done_SxM, 0), 0)
        x_BxTxD = constrain(x_Mx.swapaxes(0, 1).reshape(x_BxTxD.shape), _MOVING_AXES[1:])
        return x_BxTxD, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), counts)

    def _no_counts(self, moving):
        """Zeros like the counts of all layers, ``[repeats, stages, layers of a stage, ...]``."""
        _, counts = jax.eval_shape(
            lambda moving: self.run_stages(
                self.groups[0], None, self.stage_S == 0, *moving, self._lookup(self.stage_S), self.stage_S
            ),
            moving,
        )
        return jax.tree.map(lambda leaf: jnp.zeros((self.schedule.repeats, *leaf.shape), leaf.dtype), counts)

    def _all_rounds(self, carry, xs):
        """Microbatches that go around together, from their entry to their last round."""
        number, new = xs
        repeats, group = self.schedule.repeats, self.schedule.group
        for r in range(repeats):
            start = (number * repeats + r) * group
            carry = self._round(carry, start, group, r, repeats > 1, None if r else new)
        return carry, None

    def _round(self, carry, start, ticks: int, r: int, choosing: bool, new=None):
        """``ticks`` ticks of round r, in which microbatches enter at stage 0 if there are ``new`` ones."""
        tick = partial(self._tick, r, start, choosing)
        return jax.lax.scan(tick, carry, (start + jnp.arange(ticks), new))[0]

    def _tick(self, r: int, start: jax.Array, choosing: bool, carry, xs):
        """Every stage runs its layers once, and the microbatches shift by one stage."""
        moving, done_SxM, counts = carry
        t, new = xs
        if new is not None:
            moving = jax.tree.map(lambda old, new: jnp.where(_at(self.stage_S, 0, old), new, old), moving, new)
        microbatch_S = self.schedule.microbatch(t - self.stage_S)
        others = self.groups[r - 1] if choosing else None  # for stages that are still in the previous round
        x, more = self.run_stages(
            self.groups[r], others, self.stage_S <= t - start, *moving, self._lookup(microbatch_S), microbatch_S
        )
        counts = jax.tree.map(partial(_add, self.schedule, t - self.stage_S), counts, more)
        x = constrain(x, _MOVING_AXES)
        last = self.schedule.microbatch(t - (self.schedule.stages - 1))
        done_SxM = jax.lax.dynamic_update_index_in_dim(done_SxM, x, last, 1)  # the last round overwrites the others
        moving = jax.tree.map(lambda leaf: constrain(_shift(leaf), _MOVING_AXES), (x, moving[1]))
        return (moving, done_SxM, counts), None

    def _lookup(self, microbatch_S):
        """The context of the microbatch of each stage."""
        rows = jax.tree.map(lambda leaf: jax.vmap(lambda i: leaf[i])(microbatch_S), self.per_row)
        return jax.tree.map(lambda a, b: b if a is None else a, self.shared, rows, is_leaf=lambda leaf: leaf is None)

    def _copies(self, leaf):
        """A copy for each stage, on its own devices: the sum of their gradients is then taken once, after the loop."""
        return jnp.broadcast_to(leaf, (self.schedule.stages, *leaf.shape))

    def _replicated(self, leaf):
        return constrain(self._copies(leaf), ("layers", *[None] * leaf.ndim))

    def _split(self, leaf):
        """``[B, ...]`` to ``[M, B / M, ...]``. Row i goes to microbatch ``i % M``: with rows sharded in contiguous
        runs, no row changes its device."""
        return leaf.reshape(-1, self.schedule.microbatches, *leaf.shape[1:]).swapaxes(0, 1)

    def _entering(self, leaf):
        """``[B, ...]`` to ``[batches, microbatches of a batch, S, B / M, ...]``; a batch goes around together."""
        leaf = jax.vmap(lambda each: constrain(self._copies(each), _MOVING_AXES))(self._split(leaf))
        return leaf.reshape(-1, self.schedule.group, *leaf.shape[1:])


def _at(stage_S: jax.Array, stage: int, like: jax.Array) -> jax.Array:
    """True for one stage, in a shape that broadcasts with ``like``."""
    return (stage_S == stage).reshape(-1, *[1] * (like.ndim - 1))


def _add(schedule: Schedule, visit_S: jax.Array, total_RxS: jax.Array, more_S: jax.Array) -> jax.Array:
    """The counts ``[repeats, stages, ...]`` with those of a tick added, except where a stage waits."""
    repeat_S = visit_S // schedule.group % schedule.repeats
    busy_S = (visit_S >= 0) & (visit_S < schedule.microbatches * schedule.repeats)
    here_RxS = (jnp.arange(schedule.repeats)[:, None] == repeat_S) & busy_S
    here_RxS = here_RxS.reshape(*here_RxS.shape, *[1] * (more_S.ndim - 1))
    return total_RxS + jnp.where(here_RxS, more_S, 0)


@jax.custom_vjp
def _shift(x_Sx: jax.Array) -> jax.Array:
    """Moves the part of each stage to the next stage, and that of the last to the first.

    It has a gradient of its own because JAX would transpose the roll into two permutes.
    """
    return jnp.roll(x_Sx, 1, 0)


_shift.defvjp(lambda x_Sx: (jnp.roll(x_Sx, 1, 0), None), lambda _, gradient: (jnp.roll(gradient, -1, 0),))
