"""From an experiment to its compiled step: what ``train`` runs and ``plan`` forecasts."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxlm.core.tree import Params
from jaxlm.training.compression_aware import CompressionAwareTraining
from jaxlm.training.config import Experiment
from jaxlm.training.objectives.objective import make_objective
from jaxlm.training.objectives.reference_model import ReferenceModel
from jaxlm.training.optimizers.optimizer import make_optimizer
from jaxlm.training.step import Step, TrainState, abstract_state, make_step

__all__ = ["Program", "make_program"]


@dataclass(frozen=True)
class Program:
    """``update(state, batch)`` is a step; ``state`` is abstract: shapes, dtypes and shardings."""

    compression: CompressionAwareTraining
    tx: optax.GradientTransformation
    state: TrainState
    update: Step


def make_program(
    config: Experiment, graphdef: nnx.GraphDef, like: Params, mesh: Mesh, reference: ReferenceModel | None = None
) -> Program:
    """The step of an experiment whose model is complete, on a mesh. Nothing is allocated. UserError on a mistake in
    the experiment."""
    options = config.train
    compression = CompressionAwareTraining(config, like)
    tx = compression.optimizer(make_optimizer(config.optim, options.steps))
    shared = config.mesh
    state = abstract_state(
        like, tx, mesh, reference=reference.like if reference else None,
        extra=reference.extra if reference else {}, average=options.ema > 0,
        shard_optimizer=shared.shard_optimizer, offload_optimizer=shared.offload_optimizer,
    )
    update = make_step(
        graphdef, like, make_objective(config), tx, compression.transform, accumulate=options.accumulate,
        spike_factor=options.spike_factor, layout=jax.tree.map(lambda leaf: leaf.sharding, state),
        compress=shared.compress_gradients, reference=reference.model if reference else None, average=options.ema,
        privacy=config.privacy if config.privacy.noise_multiplier else None,
    )
    return Program(compression, tx, state, update)
