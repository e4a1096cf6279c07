"""DP-SGD (arXiv:1607.00133): the gradient of each row is clipped, noise is added, and the privacy spent is counted.

A row of a batch is protected: a window of text, a packed row of documents, a pair of sentences. A person whose text is
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
    """A gradient of a batch (``gradients.GradientSums``) that is the sum of its rows' gradients, each of the mean over
    the row's tokens and scaled down to a norm of at most ``clip_norm``. The sums of the loss stay as they were."""

    def of_row(params, constants, row, key, step):
        grads, sums = gradient(params, constants, jax.tree.map(lambda x: x[None], row), key, step)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1), grads)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda g: g * jnp.minimum(1, clip_norm / jnp.maximum(norm, 1e-30)), grads), sums

    def of_batch(params, constants, batch, key, step):
        keys = jax.random.split(key, len(batch["weights"]))
        each = jax.vmap(of_row, in_axes=(None, None, 0, 0, None))(params, constants, batch, keys, step)
        return jax.tree.map(lambda x: jnp.sum(x, 0), each)

    return of_batch


def add_noise(gradients: dict[str, Array], std: float, key: Array, rows: int) -> dict[str, Array]:
    """The mean gradient over ``rows``: the given sums over rows, plus Gaussian noise of standard deviation ``std``,
    divided by ``rows``."""
    return {
        path: (g + std * jax.random.normal(jax.random.fold_in(key, index), g.shape)) / rows
        for index, (path, g) in enumerate(gradients.items())
    }


def make_accountant(config: Experiment, loader: Loader) -> Accountant | None:
    """The accountant of a private experiment; None of any other.

    Raises:
        UserError: when the model translates: its batches differ in their number of rows.
    """
    if not config.privacy.noise_multiplier:
        return None
    if config.model.kind == "seq2seq":
        raise UserError("privacy.noise_multiplier needs batches of a fixed number of rows, which translation lacks")
    return Accountant(config.privacy, config.data.batch_size, loader.examples_per_epoch)


class Accountant:
    """The epsilon, for a given delta, of a number of steps: Renyi DP of the subsampled Gaussian mechanism
    (arXiv:1908.10530), by Google's dp-accounting.

    It holds for batches that each row enters independently with probability ``batch_size / rows`` (Poisson sampling).
    This training shuffles the rows and visits each once an epoch, as is usual; no proof says that its epsilon is the
    same.

    Raises:
        UserError: when dp-accounting is missing, or a setting is out of range.
    """

    def __init__(self, config: PrivacyConfig, batch_size: int, rows: int):
        try:
            import dp_accounting
        except ImportError:
            raise UserError("privacy.noise_multiplier needs dp-accounting; pip install jaxlm[privacy]") from None
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
        """A sentence with the epsilon after ``steps``."""
        return (
            f"privacy: epsilon {self.epsilon(steps):.3g} for delta {self._delta:g} after {steps} steps, for each row "
            "of the data, under the assumption that batches are Poisson samples of it"
        )

    def epsilon(self, steps: int) -> float:
        """After ``steps`` steps; 0 before the first."""
        if steps == 0:
            return 0.0
        accountant = self._library.rdp.RdpAccountant()
        accountant.compose(self._event, steps)
        return float(accountant.get_epsilon(self._delta))
