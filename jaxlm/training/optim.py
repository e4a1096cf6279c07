"""AdamW and its learning rate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxlm.core.errors import UserError
from jaxlm.training.config import OptimConfig

__all__ = ["decay_mask", "make_optimizer", "make_schedule"]


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of update ``t`` (counted from 0) in a training of ``steps`` updates, a float32 scalar.

    Every shape first climbs linearly over ``warmup_steps``, reaching the peak ``lr`` at ``t = warmup_steps``; then
    ``constant`` stays, ``inverse_sqrt`` falls with 1/sqrt(t) (arXiv:1706.03762, section 5.3), ``linear`` and ``cosine``
    (arXiv:1608.03983) go down to ``lr * min_lr_ratio`` at ``t = steps``, and ``wsd`` stays until the last
    ``decay_fraction`` of the steps and falls there as 1 - sqrt (arXiv:2405.18392).
    """
    warmup = config.warmup_steps
    if config.schedule in ("cosine", "linear", "wsd") and warmup >= steps:
        raise UserError(
            f"optim.warmup_steps={warmup} leaves nothing of train.steps={steps} for {config.schedule} to decay in; "
            "lower the warm-up or train longer"
        )

    def falling(shape, start: float):
        """From 1 at ``start`` to ``min_lr_ratio`` at ``steps``, along ``shape``, which maps [0, 1] onto [1, 0]."""
        def ratio(t):
            progress = jnp.clip((t - start) / max(steps - start, 1), 0, 1)
            return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape(progress)
        return ratio

    after_warmup = {
        "constant": jnp.ones_like,
        "inverse_sqrt": lambda t: jnp.sqrt((warmup + 1) / (t + 1)),
        "linear": falling(lambda x: 1 - x, warmup),
        "cosine": falling(lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)), warmup),
        "wsd": falling(lambda x: 1 - jnp.sqrt(x), max(warmup, round(steps * (1 - config.decay_fraction)))),
    }[config.schedule]

    def schedule(t):
        t = jnp.asarray(t, jnp.float32)
        return config.lr * jnp.where(t < warmup, (t + 1) / (warmup + 1), after_warmup(t))

    return schedule


def decay_mask(params: dict[str, jax.Array]) -> dict[str, bool]:
    """True for the matrices of a flat parameter dict, embeddings included; norms, biases and other vectors are False.

    Goes by name, because stacked layers give a vector two dimensions.
    """
    return {path: path.endswith(("kernel", "table")) for path in params}


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (decoupled decay times the learning rate, as in PyTorch) after clipping by global norm, over flat dicts."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
