"""Distillation: a student learns the distribution of a teacher (arXiv:1503.02531), and what its layers say."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.core.errors import UserError
from jaxlm.training.config import DistillConfig
from jaxlm.training.objectives.loss import Batch, LossSums, cross_entropy

__all__ = ["PROJECTION", "Teacher", "distill_loss", "divergence", "teacher_layers"]


PROJECTION = "distill/projection"  # what it is trained as


def divergence(student_BxTxV: Array, teacher_BxTxV: Array, temperature: float) -> Array:
    """``temperature**2 * KL(teacher || student)`` of both softmaxes at that temperature, ``[B, T]`` in nats. The square
    keeps its gradient of one size at all temperatures (arXiv:1503.02531, section 2)."""
    ours = jax.nn.log_softmax(student_BxTxV / temperature, -1)
    theirs = jax.nn.log_softmax(teacher_BxTxV / temperature, -1)
    return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), -1)


def teacher_layers(students: int, teachers: int, chosen: tuple[int, ...] = ()) -> list[int]:
    """The layer of the teacher, from 1, that each of the student's is compared with: those of ``chosen``, or evenly
    spread, the last with the last. UserError where these cannot be."""
    layers = list(chosen) or [int(layer) for layer in np.ceil(np.arange(1, students + 1) * teachers / students)]
    if len(layers) != students or not all(1 <= layer <= teachers for layer in layers):
        raise UserError(
            f"distill.hidden_layers {layers}: give one of the teacher's {teachers} layers for each of the student's "
            f"{students}"
        )
    return layers


class Teacher(NamedTuple):
    model: Any
    projection_DxE: Array | None = None  # from the student's states to the width of the teacher's; None: the same width


def distill_loss(
    model: Any, batch: Batch, key: Array | None, teacher: Teacher, *, config: DistillConfig,
    label_smoothing: float = 0.0,
) -> tuple[Array, LossSums]:
    """``(1 - weight) * cross-entropy + weight * divergence + hidden * difference``, summed over tokens.

    The difference is that of the states after the student's layers, projected where there is a projection
    (arXiv:1909.10351, equation 8), from those after the teacher's (``teacher_layers``), squared and averaged over
    features and layers; of a translator, over its decoder's. ``batch`` is as in ``lm_loss`` or, with "src", as in
    ``seq2seq_loss``. Sums, besides "nll" and "weight": "divergence", and "difference" where it counts.
    """
    inputs = (batch["src"], batch["inputs"]) if "src" in batch else (batch["inputs"],)
    packing = {f"{name}_BxT": batch[name] for name in ("segment_ids", "positions") if name in batch}
    if config.hidden:
        student_BxTxV, ours_LxBxTxD = model.with_states(*inputs, key=key, **packing)
        teacher_BxTxV, theirs_LxBxTxD = jax.lax.stop_gradient(teacher.model.with_states(*inputs, **packing))
        if teacher.projection_DxE is not None:
            ours_LxBxTxD = ours_LxBxTxD @ teacher.projection_DxE.astype(ours_LxBxTxD.dtype)
    else:
        student_BxTxV = model(*inputs, key=key, **packing)
        teacher_BxTxV = jax.lax.stop_gradient(teacher.model(*inputs, **packing))
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
