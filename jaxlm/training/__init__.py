"""Training: from an ``Experiment`` to a model directory, on any number of devices and processes.

    from jaxlm.training import DataConfig, Experiment, OptimConfig, TrainConfig, train
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlm.core.lazy import lazy

if TYPE_CHECKING:
    from jaxlm.training.config import (
        DataConfig,
        DistillConfig,
        DpoConfig,
        EvalConfig,
        Experiment,
        LoraConfig,
        MeshConfig,
        OptimConfig,
        PrivacyConfig,
        PruneConfig,
        QatConfig,
        TrainConfig,
    )
    from jaxlm.training.loop import train
    from jaxlm.training.lora import add_adapters, remove_adapters
    from jaxlm.training.metrics import read_metrics
    from jaxlm.training.multihost.distributed import distributed_runtime
    from jaxlm.training.objectives.loss import Loss, cross_entropy, lm_loss, make_loss, seq2seq_loss
    from jaxlm.training.optimizers.optimizer import make_optimizer, make_schedule
    from jaxlm.training.state import TrainState, abstract_state, init_state
    from jaxlm.training.step import Step, StepOptions, make_eval, make_step
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        config="DataConfig DistillConfig DpoConfig EvalConfig Experiment LoraConfig MeshConfig OptimConfig "
               "PrivacyConfig PruneConfig QatConfig TrainConfig",
        loop="train", lora="add_adapters remove_adapters", metrics="read_metrics",
        multihost__distributed="distributed_runtime",
        objectives__loss="Loss cross_entropy lm_loss make_loss seq2seq_loss",
        optimizers__optimizer="make_optimizer make_schedule", state="TrainState abstract_state init_state",
        step="Step StepOptions make_eval make_step",
    )
