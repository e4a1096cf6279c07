"""From an experiment to its compiled step: the program that ``train`` runs and ``plan`` forecasts."""

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
from jaxlm.training.state import TrainState, abstract_state
from jaxlm.training.step import Step, StepOptions, make_step

__all__ = ["Program", "make_program"]


@dataclass(frozen=True)
class Program:
    """The step of an experiment; nothing is allocated."""

    compression: CompressionAwareTraining
    tx: optax.GradientTransformation
    state: TrainState  # abstract: shapes, dtypes and shardings
    update: Step

    @property
    def layout(self) -> TrainState:
        """The shardings of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def make_program(
    config: Experiment, graphdef: nnx.GraphDef, like: Params, mesh: Mesh, reference: ReferenceModel | None = None
) -> Program:
    """The step of an experiment whose model configuration is complete, on a mesh.

    Raises:
        UserError: when the experiment has a mistake.
    """
    options, sharing = config.train, config.mesh
    compression = CompressionAwareTraining(config, like)
    tx = compression.optimizer(make_optimizer(config.optim, options.steps))
    state = abstract_state(
        like, tx, mesh, reference=reference.like if reference else None, extra=reference.extra if reference else {},
        average=options.ema > 0, shard_optimizer=sharing.shard_optimizer, offload_optimizer=sharing.offload_optimizer,
    )
    update = make_step(
        graphdef, like, make_objective(config), tx, compression.transform,
        options=StepOptions(
            options.accumulate, options.spike_factor, sharing.compress_gradients, options.ema,
            config.privacy if config.privacy.noise_multiplier else None,
        ),
        layout=jax.tree.map(lambda leaf: leaf.sharding, state), reference=reference.build if reference else None,
    )
    return Program(compression, tx, state, update)
