"""DP-SGD (arXiv:1607.00133): gradients clipped row by row, noise, and the privacy that a training has spent.

What is protected is a row of a batch: a window of text, a packed row of documents, a pair of sentences. Who may appear
in several rows is protected less.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.core.errors import UserError
from jaxlm.data.batches.loader import Loader
from jaxlm.training.config import Experiment, PrivacyConfig

__all__ = ["Accountant", "make_accountant", "clip_rows", "add_noise"]


def clip_rows(gradient: Callable, clip_norm: float) -> Callable:
    """``gradient(params, frozen, batch, key, now) -> (gradients, sums)``, summed over rows after each row's, of its
    mean over tokens, was shortened to a norm of at most ``clip_norm``. The sums are plain ones, as before."""

    def of_row(params, frozen, row, key, now):
        grads, sums = gradient(params, frozen, jax.tree.map(lambda x: x[None], row), key, now)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1), grads)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda g: g * jnp.minimum(1, clip_norm / jnp.maximum(norm, 1e-30)), grads), sums

    def of_batch(params, frozen, batch, key, now):
        keys = jax.random.split(key, len(batch["weights"]))
        each = jax.vmap(of_row, in_axes=(None, None, 0, 0, None))(params, frozen, batch, keys, now)
        return jax.tree.map(lambda x: jnp.sum(x, 0), each)

    return of_batch


def add_noise(gradients: dict[str, Array], std: float, key: Array, rows: int) -> dict[str, Array]:
    """The sums over rows with Gaussian noise of that standard deviation, over the number of rows."""
    return {
        path: (g + std * jax.random.normal(jax.random.fold_in(key, index), g.shape)) / rows
        for index, (path, g) in enumerate(gradients.items())
    }


def make_accountant(config: Experiment, loader: Loader) -> Accountant | None:
    """The accountant of an experiment, if it is private. UserError where it cannot be."""
    if not config.privacy.noise_multiplier:
        return None
    if config.model.kind == "seq2seq":
        raise UserError("privacy is counted for batches of so many rows; translation has other ones, leave it off")
    return Accountant(config.privacy, config.data.batch_size, loader.examples_per_epoch)


class Accountant:
    """The epsilon, for ``delta``, that so many steps have spent: Renyi DP of the subsampled Gaussian mechanism
    (arXiv:1908.10530), by Google's dp-accounting.

    It holds for batches that each row enters with probability ``batch_size / rows``, independently (Poisson sampling).
    Training shuffles, and goes through all rows in an epoch, as nearly everybody does; nothing proves its epsilon to be
    the same.
    """

    def __init__(self, config: PrivacyConfig, batch_size: int, rows: int):
        """UserError where dp-accounting is missing, or a setting makes no sense."""
        try:
            import dp_accounting
        except ImportError:
            raise UserError("privacy is accounted for by dp-accounting; pip install jaxlm[privacy]") from None
        if config.clip_norm <= 0 or config.noise_multiplier < 0 or not 0 < config.delta < 1:
            raise UserError(
                f"privacy.clip_norm={config.clip_norm} and noise_multiplier={config.noise_multiplier} must be positive "
                f"and privacy.delta={config.delta} between 0 and 1"
            )
        self._library, self._delta = dp_accounting, config.delta
        self._event = dp_accounting.PoissonSampledDpEvent(
            min(batch_size / rows, 1.0), dp_accounting.GaussianDpEvent(config.noise_multiplier)
        )

    def report(self, steps: int) -> str:
        return (
            f"privacy: epsilon {self.epsilon(steps):.3g} for delta {self._delta:g} after {steps} steps, for each row "
            "of the data, had every batch been a Poisson sample of it"
        )

    def epsilon(self, steps: int) -> float:
        """After so many steps; 0 before the first."""
        if steps == 0:
            return 0.0
        accountant = self._library.rdp.RdpAccountant()
        accountant.compose(self._event, steps)
        return float(accountant.get_epsilon(self._delta))
