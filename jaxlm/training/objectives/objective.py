"""The losses that an experiment trains with and validates with."""

from __future__ import annotations

from functools import partial

from jaxlm.core.errors import UserError
from jaxlm.training.config import Experiment
from jaxlm.training.objectives.distill import distill_loss
from jaxlm.training.objectives.dpo import dpo_loss
from jaxlm.training.objectives.loss import Loss, make_loss

__all__ = ["make_objective", "make_validation_loss"]


def make_objective(config: Experiment) -> Loss:
    """The loss of a step.

    Raises:
        UserError: when the experiment sets two objectives, or a field out of range.
    """
    options, distill, dpo = config.train, config.distill, config.dpo
    if dpo.beta and distill.teacher:
        raise UserError("dpo.beta and distill.teacher are two objectives; set one of them")
    if dpo.beta:
        return _preferences(config)
    plain = make_loss(
        config.model, label_smoothing=options.label_smoothing, z_loss=options.z_loss,
        router=(options.router_balance, options.router_z),
    )
    if not distill.teacher:
        return plain
    if not 0 <= distill.weight <= 1 or distill.temperature <= 0 or distill.hidden < 0:
        raise UserError(
            f"distill.weight={distill.weight} must be from 0 to 1, distill.temperature={distill.temperature} positive, "
            f"distill.hidden={distill.hidden} not negative"
        )
    return partial(distill_loss, config=distill, label_smoothing=options.label_smoothing)


def make_validation_loss(config: Experiment) -> tuple[Loss, bool]:
    """The loss of validation, and whether it needs the reference model."""
    return (_preferences(config), True) if config.dpo.beta else (make_loss(config.model), False)


def _preferences(config: Experiment) -> Loss:
    if config.model.kind != "decoder" or config.dpo.beta < 0 or not 0 <= config.dpo.label_smoothing < 0.5:
        raise UserError("dpo is for language models, with a positive beta and a label_smoothing below 0.5")
    return partial(dpo_loss, config=config.dpo)
