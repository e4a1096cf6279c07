"""The reference model that some losses ask: a teacher, or the model that preferences are measured from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import LoRA
from jaxlm.core.tree import Params, flatten, unflatten
from jaxlm.model import load, model_config
from jaxlm.training.config import Experiment
from jaxlm.training.lora import remove_adapters
from jaxlm.training.objectives.distill import PROJECTION, Teacher

__all__ = ["ReferenceModel", "make_reference_model"]


@dataclass(frozen=True)
class ReferenceModel:
    """How a loss gets its reference model, and the arrays for it."""

    build: Callable[[Params, dict[str, Any], dict[str, jax.Array]], Any]
    """(parameters in training, the reference model's own flat leaves, extra trained arrays) -> the reference model."""
    like: Params | None = None
    """The reference model's own leaves, abstract; None where it has none."""
    params: Params | None = None
    """The leaves themselves; None where it has none, or where they were not asked for."""
    extra: Mapping[str, jax.Array] = field(default_factory=dict)
    """Arrays that are trained in addition to the model's, as they start."""


def make_reference_model(
    config: Experiment, graphdef: nnx.GraphDef, like: Params, initial: Params | Callable[[], Params] | None
) -> ReferenceModel | None:
    """The reference model of an experiment; None where its loss asks none.

    - Preferences (``dpo``): the model at the start. With adapters that is the model without them, which takes no
      memory; otherwise a copy.
    - Distillation: the teacher, dense or compressed, as its directory stores it. Where hidden states of another width
      are compared, a projection from the student's width to the teacher's is trained too.

    Args:
        config: the experiment, with its model configuration complete.
        graphdef: of the model in training.
        like: the parameters of the model in training, abstract.
        initial: those parameters at the start, or a function that makes them. None: the reference model is abstract.

    Raises:
        UserError: when the teacher is of another kind than the model or has another vocabulary; when preferences are
            trained from random parameters.
    """
    if config.dpo.beta:
        if any(isinstance(leaf, LoRA) for leaf in flatten(like).values()):
            return ReferenceModel(lambda params, *_: nnx.merge(graphdef, remove_adapters(params)))
        if callable(initial):
            raise UserError("dpo measures preferences from an existing model; name it in init_from")
        return _with_own_leaves(graphdef, like, initial)
    if not config.distill.teacher:
        return None
    name, student = config.distill.teacher, config.model
    teacher = model_config(name)
    if teacher.kind != student.kind or teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"distill.teacher {name} is a {teacher.kind} of {teacher.vocab_size} tokens and the model a {student.kind} "
            f"of {student.vocab_size}; they must agree"
        )
    extra = {}
    if config.distill.hidden and teacher.width != student.width:
        extra = {PROJECTION: _projection(student.width, teacher.width, config.train.seed)}
    if initial is None:
        return _teacher(*nn.abstract(teacher), None, extra)
    lm = load(name, dtype=student.dtype)
    inference = {"dtype": student.dtype} | dict.fromkeys(("dropout", "attention_dropout", "ffn_dropout"), 0.0)
    fields = {each.name for each in dataclasses.fields(lm.config)}
    lm = lm.configure(**{name: value for name, value in inference.items() if name in fields})
    return _teacher(lm.graphdef, lm.params, lm.params, extra)


def _projection(student_width: int, teacher_width: int, seed: int) -> jax.Array:
    return student_width**-0.5 * jax.random.normal(jax.random.key(seed), (student_width, teacher_width))


def _teacher(
    graphdef: nnx.GraphDef, like: Params, params: Params | None, extra: Mapping[str, jax.Array]
) -> ReferenceModel:
    model = _with_own_leaves(graphdef, like, params)

    def build(in_training, leaves, trained):
        return Teacher(model.build(in_training, leaves), trained.get(PROJECTION))

    return dataclasses.replace(model, build=build, extra=extra)


def _with_own_leaves(graphdef: nnx.GraphDef, like: Params, params: Params | None) -> ReferenceModel:
    shapes = jax.eval_shape(lambda params: params, like)
    return ReferenceModel(lambda _, leaves, *extra: nnx.merge(graphdef, unflatten(shapes, leaves)), shapes, params)
