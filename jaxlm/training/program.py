"""From an experiment to its compiled step: what ``train`` runs and ``plan`` forecasts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxlm.core.tree import Params
from jaxlm.training.compression import InTraining
from jaxlm.training.config import Experiment
from jaxlm.training.loss import Batch, make_loss
from jaxlm.training.optim import make_optimizer
from jaxlm.training.step import TrainState, abstract_state, make_step

__all__ = ["Program", "make_program"]


@dataclass(frozen=True)
class Program:
    """``update(state, batch)`` is a step; ``state`` is abstract: shapes, dtypes and shardings."""

    compression: InTraining
    tx: optax.GradientTransformation
    state: TrainState
    update: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_program(config: Experiment, graphdef: nnx.GraphDef, like: Params, mesh: Mesh) -> Program:
    """The step of an experiment whose model is complete, on a mesh. Nothing is allocated. UserError on a mistake in
    the experiment."""
    options = config.train
    compression = InTraining(config, like)
    tx = compression.optimizer(make_optimizer(config.optim, options.steps))
    shared = config.mesh
    state = abstract_state(
        like, tx, mesh, shard_optimizer=shared.shard_optimizer, offload_optimizer=shared.offload_optimizer
    )
    loss = make_loss(
        config.model, label_smoothing=options.label_smoothing, z_loss=options.z_loss,
        router=(options.router_balance, options.router_z),
    )
    update = make_step(
        graphdef, like, loss, tx, compression.transform, accumulate=options.accumulate,
        spike_factor=options.spike_factor, layout=jax.tree.map(lambda leaf: leaf.sharding, state),
        compress=shared.compress_gradients,
    )
    return Program(compression, tx, state, update)
