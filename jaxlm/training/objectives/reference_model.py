"""The second model that some losses ask: a teacher, or the reference that preferences are measured from."""

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
    """``model(params in training, own flat leaves, what is trained beside the model)`` is it. ``like`` are its own
    leaves, abstract, and ``params`` the leaves themselves; None where it has none of its own, or they were not asked
    for. ``beside`` is what is trained for its sake, as it starts."""

    model: Callable[[Params, dict[str, Any], dict[str, jax.Array]], Any]
    like: Params | None = None
    params: Params | None = None
    extra: Mapping[str, jax.Array] = field(default_factory=dict)


def make_reference_model(
    config: Experiment, graphdef: nnx.GraphDef, like: Params, initial: Params | Callable[[], Params] | None
) -> ReferenceModel | None:
    """The reference of an experiment, if it has any, with its weights where the model's (``initial``) are there too.

    - of preferences (``dpo``): the model at the start. With adapters that is the model without them, which takes no
      memory; else a copy.
    - of distillation: the teacher, dense or compressed as its directory has it. Where its states are compared with
      narrower or wider ones, a map from these to them is trained too.

    UserError where the teacher is of another kind, or has another vocabulary.
    """
    if config.dpo.beta:
        if any(isinstance(leaf, LoRA) for leaf in flatten(like).values()):
            return ReferenceModel(lambda params, *_: nnx.merge(graphdef, remove_adapters(params)))
        if callable(initial):
            raise UserError("preferences are measured from a model that is there; name it in init_from")
        return _own(graphdef, like, initial)
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
    still = {"dtype": student.dtype} | dict.fromkeys(("dropout", "attention_dropout", "ffn_dropout"), 0.0)
    fields = {each.name for each in dataclasses.fields(lm.config)}
    lm = lm.configure(**{name: value for name, value in still.items() if name in fields})
    return _teacher(lm.graphdef, lm.params, lm.params, extra)


def _projection(ours: int, theirs: int, seed: int) -> jax.Array:
    return ours**-0.5 * jax.random.normal(jax.random.key(seed), (ours, theirs))


def _teacher(graphdef: nnx.GraphDef, like: Params, params: Params | None, extra: Mapping[str, jax.Array]) -> ReferenceModel:
    own = _own(graphdef, like, params)
    return dataclasses.replace(
        own, model=lambda _, leaves, trained: Teacher(own.model(_, leaves), trained.get(PROJECTION)), extra=extra
    )


def _own(graphdef: nnx.GraphDef, like: Params, params: Params | None) -> ReferenceModel:
    shapes = jax.eval_shape(lambda params: params, like)
    return ReferenceModel(lambda _, leaves, *extra: nnx.merge(graphdef, unflatten(shapes, leaves)), shapes, params)
