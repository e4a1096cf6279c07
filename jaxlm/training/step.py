"""The training step: one pure function from (state, batch) to (state, metrics), compiled once per batch shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from jaxlm.core.sharding import on_device
from jaxlm.core.tree import Params, Transform, unflatten
from jaxlm.data.batches.batch import Batch
from jaxlm.training.config import PrivacyConfig
from jaxlm.training.gradients import (
    Constants,
    GradientSums,
    ReferenceBuilder,
    accumulated,
    compressed_over_data,
    loss_gradient,
    sharded_like_moments,
)
from jaxlm.training.objectives.loss import Loss, LossSums
from jaxlm.training.optimizers.privacy import add_noise, clip_rows
from jaxlm.training.state import KEY_IMPL, TrainState

__all__ = ["Step", "StepOptions", "make_eval", "make_step"]

_SPIKE_WARMUP = 20  # steps before a gradient norm can count as a spike
_SPIKE_HORIZON = 100  # steps that the running mean of the gradient norm remembers
_NOISE = 2**32 - 2  # folded into a step's key for the noise of a private training


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The numbers of a step; defaults are off."""

    accumulate: int = 1  # micro-batches that the rows of a batch are visited in
    spike_factor: float = 0.0  # a gradient norm over this many times its running mean is bad; 0: no limit
    gradient_compression: Literal["none", "bf16", "int8"] = "none"  # of the all-reduce over the data axis
    ema_decay: float = 0.0  # of the moving average of the trained parameters, which is shorter at first
    privacy: PrivacyConfig | None = None  # the gradient is the mean of the rows' clipped gradients, plus noise


@dataclasses.dataclass(frozen=True)
class Step:
    """``step(state, batch) -> (state, metrics)``, compiled. The changing part of the state passed in is donated: use
    only the state that is returned."""

    compiled: Any  # jitted: (state without its constants, constants, batch) -> (state without its constants, metrics)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        constants = state.frozen, state.reference
        changed, metrics = self.compiled(state.saved, constants, batch)
        return dataclasses.replace(changed, frozen=constants[0], reference=constants[1]), metrics

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The lowered program, for abstract arguments."""
        return self.compiled.lower(state.saved, (state.frozen, state.reference), batch)


def make_step(
    graphdef: nnx.GraphDef, like: Params, loss: Loss, tx: optax.GradientTransformation,
    transform: Callable[[Array], Transform] | None = None, *, options: StepOptions = StepOptions(),
    layout: TrainState | None = None, reference: ReferenceBuilder | None = None,
) -> Step:
    """The compiled step.

    Args:
        graphdef: of the model.
        like: parameters that give the structure; shapes are enough (``nn.abstract``).
        loss: see ``training.objectives.loss``. With ``reference`` it gets the reference model as a fourth argument.
        tx: the optimizer.
        transform: ``transform(step)``, of a traced int32, is a function of the parameters (fake quantization, masks)
            that runs before the forward pass and is differentiated through.
        options: see ``StepOptions``.
        layout: the sharding of the returned state (``state.state_shardings``); None: on one device.
        reference: makes the reference model, such as a teacher.

    A step whose loss or gradient is not finite, or whose gradient norm exceeds ``options.spike_factor`` times its
    running mean, leaves the parameters and the optimizer as they were and reports ``bad``.

    Returns:
        The step. Its metrics are scalars on the device: ``loss`` (objective per token), ``nll`` (plain negative
        log-likelihood per token, nats), ``weight`` (tokens), ``grad_norm`` (before clipping), ``bad`` (bool), and the
        other sums of the loss, per token.
    """
    gradient = loss_gradient(graphdef, like, loss, transform, reference)
    if options.privacy is not None:
        gradient = clip_rows(gradient, options.privacy.clip_norm)
    if options.gradient_compression == "none":
        gradient = accumulated(sharded_like_moments(gradient, layout), options.accumulate)
    else:
        gradient = accumulated(gradient, options.accumulate)
        gradient = compressed_over_data(gradient, layout, options.gradient_compression)

    def step(state: TrainState, constants: Constants, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=KEY_IMPL), state.step)
        grads, sums, weight = _mean_gradient(gradient, state, constants, batch, key, options.privacy)
        norm = optax.tree.norm(grads)
        bad, limit = _judged(state, norm, sums["loss"], options.spike_factor)
        params, opt_state, average = _updated(state, grads, bad, tx, options.ema_decay, layout)
        metrics = jax.tree.map(lambda x: x / weight, sums) | {
            "weight": sums["weight"], "grad_norm": norm, "bad": bad}
        return dataclasses.replace(
            state, step=state.step + 1, params=params, opt_state=opt_state,
            norm_mean=_norm_mean(state, norm, limit), average=average,
        ), metrics

    out_shardings = None
    if layout is not None:
        out_shardings = (layout.saved, layout.step)  # metrics are replicated, like the step counter
    return Step(jax.jit(step, donate_argnums=0, out_shardings=out_shardings))


def _mean_gradient(
    gradient: GradientSums, state: TrainState, constants: Constants, batch: Batch, key: Array,
    privacy: PrivacyConfig | None,
) -> tuple[dict[str, Array], LossSums, Array]:
    """(gradients per token, or with ``privacy`` per row and with noise; sums of the loss; their divisor)."""
    grads, sums = gradient(state.params, constants, batch, key, state.step)
    weight = jnp.maximum(sums["weight"], 1)
    if privacy is None:
        return jax.tree.map(lambda g: g / weight, grads), sums, weight
    std = privacy.clip_norm * privacy.noise_multiplier
    return add_noise(grads, std, jax.random.fold_in(key, _NOISE), len(batch["weights"])), sums, weight


def _judged(state: TrainState, norm: Array, loss: Array, spike_factor: float) -> tuple[Array, Array | float]:
    """(whether a step is bad: not finite, or a spike; the gradient norm above which it is a spike)."""
    bad = ~(jnp.isfinite(norm) & jnp.isfinite(loss))
    if not spike_factor:
        return bad, jnp.inf
    limit = jnp.where(state.step < _SPIKE_WARMUP, jnp.inf, spike_factor * state.norm_mean)
    return bad | (norm > limit), limit


def _norm_mean(state: TrainState, norm: Array, limit: Array | float) -> Array:
    """The running mean of the gradient norm after a step. A spike enters it at the limit: should the norm stay high,
    the mean follows, and training goes on."""
    pace = 1 / jnp.minimum(state.step + 1, _SPIKE_HORIZON)
    return jnp.where(
        jnp.isfinite(norm), state.norm_mean + pace * (jnp.minimum(norm, limit) - state.norm_mean), state.norm_mean
    )


def _updated(
    state: TrainState, grads: dict[str, Array], bad: Array, tx: optax.GradientTransformation, ema_decay: float,
    layout: TrainState | None,
) -> tuple[dict[str, Array], optax.OptState, dict[str, Array]]:
    """(parameters, optimizer state, moving average) after a step: those of before where the step is bad."""
    opt_state, average = state.opt_state, state.average
    if layout is not None:  # fetched from host memory, where they are offloaded
        opt_state, average = jax.tree.map(on_device, (opt_state, average), (layout.opt_state, layout.average))
    updates, new_opt_state = tx.update(grads, opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (state.step + 1) / (state.step + 10))
    new_average = {path: decay * old + (1 - decay) * params[path] for path, old in average.items()}
    return jax.tree.map(
        lambda old, new: jnp.where(bad, old, new), (state.params, opt_state, average),
        (params, new_opt_state, new_average),
    )


def make_eval(
    graphdef: nnx.GraphDef, like: Params, loss: Loss, reference: ReferenceBuilder | None = None
) -> Callable[[dict[str, Any], Batch, dict[str, Any]], LossSums]:
    """A compiled function ``(flat parameters, batch, leaves of the reference model) -> {"nll", "weight", ...}``: the
    sums of the loss over the batch, without dropout."""

    @jax.jit
    def evaluate(flat: dict[str, Any], batch: Batch, of_reference: dict[str, Any] | None = None) -> LossSums:
        params = unflatten(like, flat)
        extra = [reference(params, of_reference, {})] if reference else []
        return loss(nnx.merge(graphdef, params), batch, None, *extra)[1]

    return evaluate
