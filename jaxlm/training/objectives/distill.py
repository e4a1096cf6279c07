"""Distillation: a student learns the output distribution of a teacher (arXiv:1503.02531), and its hidden states."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.core.errors import UserError
from jaxlm.data.batches.batch import Batch
from jaxlm.nn.models import batch_arguments
from jaxlm.training.config import DistillConfig
from jaxlm.training.objectives.loss import LossSums, cross_entropy

__all__ = ["PROJECTION", "Teacher", "distill_loss", "divergence", "teacher_layers"]


PROJECTION = "distill/projection"  # the path of the projection among the trained parameters


def divergence(student_BxTxV: Array, teacher_BxTxV: Array, temperature: float) -> Array:
    """``temperature**2 * KL(teacher || student)`` of both softmaxes at that temperature, ``[B, T]`` in nats. The square
    keeps the size of its gradient the same at all temperatures (arXiv:1503.02531, section 2)."""
    ours = jax.nn.log_softmax(student_BxTxV / temperature, -1)
    theirs = jax.nn.log_softmax(teacher_BxTxV / temperature, -1)
    return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), -1)


def teacher_layers(students: int, teachers: int, chosen: tuple[int, ...] = ()) -> list[int]:
    """The layer of the teacher, from 1, that each layer of the student is compared with.

    Args:
        students: number of layers of the student.
        teachers: number of layers of the teacher.
        chosen: the layers; (): evenly spaced, the last one with the last one.

    Raises:
        UserError: when ``chosen`` does not have one layer of the teacher for each layer of the student.
    """
    layers = list(chosen) or [int(layer) for layer in np.ceil(np.arange(1, students + 1) * teachers / students)]
    if len(layers) != students or not all(1 <= layer <= teachers for layer in layers):
        raise UserError(
            f"distill.hidden_layers {layers}: give one of the teacher's {teachers} layers for each of the student's "
            f"{students}"
        )
    return layers


class Teacher(NamedTuple):
    """The reference model of ``distill_loss``."""

    model: Any
    projection_DxE: Array | None = None  # from the student's width to the teacher's; None where they are the same


def distill_loss(
    model: Any, batch: Batch, key: Array | None, teacher: Teacher, *, config: DistillConfig,
    label_smoothing: float = 0.0,
) -> tuple[Array, LossSums]:
    """``(1 - weight) * cross-entropy + weight * divergence + hidden * difference``, summed over tokens.

    The difference is the squared difference between the student's hidden states, projected where the widths differ
    (arXiv:1909.10351, equation 8), and the teacher's (``teacher_layers``), averaged over features and layers; for a
    translation model, over the layers of the decoder. ``batch`` is as in ``lm_loss`` or, with "src", as in
    ``seq2seq_loss``. Sums: "nll", "weight", "divergence", and "difference" where ``config.hidden`` is set.
    """
    inputs, named = batch_arguments(model.config, batch)
    teacher_named = batch_arguments(teacher.model.config, batch)[1]
    if config.hidden:
        student_BxTxV, ours_LxBxTxD = model.with_hidden_states(*inputs, key=key, **named)
        teacher_BxTxV, theirs_LxBxTxD = jax.lax.stop_gradient(
            teacher.model.with_hidden_states(*inputs, **teacher_named)
        )
        if teacher.projection_DxE is not None:
            ours_LxBxTxD = ours_LxBxTxD @ teacher.projection_DxE.astype(ours_LxBxTxD.dtype)
    else:
        student_BxTxV = model(*inputs, key=key, **named)
        teacher_BxTxV = jax.lax.stop_gradient(teacher.model(*inputs, **teacher_named))
    weights_BxT = batch["weights"]
    objective_BxT, nll_BxT = cross_entropy(student_BxTxV, batch["targets"], label_smoothing)
    divergence_BxT = divergence(student_BxTxV, teacher_BxTxV, config.temperature)
    loss_BxT = (1 - config.weight) * objective_BxT + config.weight * divergence_BxT
    sums = {
        "nll": jnp.sum(weights_BxT * nll_BxT), "weight": jnp.sum(weights_BxT),
        "divergence": jnp.sum(weights_BxT * divergence_BxT),
    }
    if config.hidden:
        difference_BxT = _difference(ours_LxBxTxD, theirs_LxBxTxD, config.hidden_layers)
        loss_BxT += config.hidden * difference_BxT
        sums["difference"] = jnp.sum(weights_BxT * difference_BxT)
    return jnp.sum(weights_BxT * loss_BxT), jax.lax.stop_gradient(sums)


def _difference(ours_LxBxTxD: Array, theirs_LxBxTxD: Array, chosen: tuple[int, ...]) -> Array:
    """``[B, T]`` float32."""
    layers = jnp.array(teacher_layers(len(ours_LxBxTxD), len(theirs_LxBxTxD), chosen)) - 1
    return jnp.mean(jnp.square((ours_LxBxTxD - theirs_LxBxTxD[layers]).astype(jnp.float32)), (0, -1))
