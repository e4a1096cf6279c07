"""The optimizers and learning rate schedules of ``OptimConfig``."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxlm.core.errors import UserError
from jaxlm.training.config import OptimConfig
from jaxlm.training.optimizers.adam8bit import scale_by_adam8bit

__all__ = ["decay_mask", "make_optimizer", "make_schedule"]


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of update ``t`` (counted from 0) in a training of ``steps`` updates, a float32 scalar.

    Every schedule first rises linearly over ``warmup_steps`` and reaches the peak ``lr`` at ``t = warmup_steps``. Then
    ``constant`` stays, ``inverse_sqrt`` falls with 1/sqrt(t) (arXiv:1706.03762, section 5.3), ``linear`` and ``cosine``
    (arXiv:1608.03983) fall to ``lr * min_lr_ratio`` at ``t = steps``, and ``wsd`` stays until the last
    ``decay_fraction`` of the steps and then falls as 1 - sqrt (arXiv:2405.18392).

    Raises:
        UserError: when the warm-up leaves no steps to decay in.
    """
    warmup = config.warmup_steps
    if config.schedule in ("cosine", "linear", "wsd") and warmup >= steps:
        raise UserError(
            f"optim.warmup_steps={warmup} leaves no steps of train.steps={steps} for {config.schedule} to decay in; "
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


def decay_mask(pattern: str, params: dict[str, jax.Array]) -> dict[str, bool]:
    """True for the parameters of a flat dict that decay: those whose whole path matches the regular expression.

    Raises:
        UserError: when the pattern is no regular expression, or matches no parameter.
    """
    try:
        mask = {path: re.fullmatch(pattern, path) is not None for path in params}
    except re.error as error:
        raise UserError(f"optim.decayed: {pattern!r} is no regular expression: {error}") from None
    if params and not any(mask.values()):
        raise UserError(f"optim.decayed {pattern!r} matches no parameter; see `jaxlm inspect` for their paths")
    return mask


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer, over flat dicts. Weight decay is decoupled from the gradient and
    multiplied by the learning rate (arXiv:1711.05101), whatever the optimizer.

    - ``adamw``: arXiv:1412.6980.
    - ``adamw8bit``: the same with moments of one byte each (``training.optimizers.adam8bit``).
    - ``adafactor``: arXiv:1804.04235, second moments factored into rows and columns, no first moments; ``lr`` is
      relative to the size of a parameter and the other constants are the paper's.
    - ``lion``: arXiv:2302.06675; a good ``lr`` is a third to a tenth of AdamW's.
    - ``muon``: for kernels, momentum ``b1`` made orthogonal layer by layer (Jordan et al. 2024) and scaled to the size
      of AdamW's updates (arXiv:2502.16982); AdamW for all other parameters.
    """

    def decayed(params):
        return decay_mask(config.decayed, params) if config.weight_decay else dict.fromkeys(params, False)

    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    direction = {
        "adamw": lambda: adam,
        "adamw8bit": lambda: scale_by_adam8bit(config.b1, config.b2, config.eps),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
        ),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2),
        "muon": lambda: optax.partition({"muon": _muon(config), "adam": adam}, _orthogonal),
    }[config.name]()
    chain = [
        direction, optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    ]
    return optax.chain(*([optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []), *chain)


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon over kernels whose leading dimensions are layers and experts, each with its own matrix. An update has a root
    mean square of 0.2, about that of Adam's."""

    def dimensions(params):
        return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)

    orthogonal = contrib.scale_by_muon(beta=config.b1, weight_dimension_numbers=dimensions)
    sizes = optax.stateless(lambda updates, _: jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, updates))
    return optax.chain(orthogonal, sizes)


def _orthogonal(params: dict[str, jax.Array]) -> dict[str, str]:
    """The optimizer of each parameter: Muon for matrices from features to features; Adam for tables, the head and all
    other parameters."""
    inner = {path: bool(re.fullmatch(r".*/(kernel|kernel/[ab])", path)) and not path.startswith("head/")
             for path in params}
    return {path: "muon" if muon else "adam" for path, muon in inner.items()}
