"""DP-SGD: the clipping against a loop, the noise against its formula, and epsilon against the library."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.core.tree import flatten
from jaxlm.training.config import PrivacyConfig
from jaxlm.training.objectives.loss import lm_loss
from jaxlm.training.optimizers.privacy import Accountant, add_noise
from jaxlm.training.state import init_state
from jaxlm.training.step import StepOptions, make_step
from tests.training.llamas import batch, tiny_llama

CLIP = 0.7


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return jaxlm.load(tiny_llama(tmp_path_factory.mktemp("base") / "llama"))


@pytest.fixture(scope="module")
def step_of(lm):
    """A compiled step of a noise multiplier and a number of micro-batches."""
    return cache(lambda noise, accumulate: make_step(
        lm.graphdef, lm.params, lm_loss, optax.sgd(1.0),
        options=StepOptions(accumulate, privacy=PrivacyConfig(noise, CLIP))))


def descended(lm, data, step):
    """The change of the parameters in a step of plain descent at rate 1, and the metrics."""
    before = jax.tree.map(np.asarray, flatten(lm.params))
    state, metrics = step(init_state(lm.params, optax.sgd(1.0), 0), data)
    return {path: leaf - np.asarray(state.params[path]) for path, leaf in before.items()}, metrics


def test_clipped_sums_are_those_of_a_loop(lm, step_of):
    """In one go and in micro-batches; rows of no weight add nothing, and long gradients count no more than CLIP."""
    data = batch(4)
    data["weights"][1] = 0
    data["weights"][2] = np.arange(8) == 3
    gradient = jax.jit(jax.grad(lambda params, row: lm_loss(
        jaxlm.model.nnx.merge(lm.graphdef, params), row)[0]))
    total, norms = None, []
    for row in range(4):
        one = {name: x[row : row + 1] for name, x in data.items()}
        grads = flatten(gradient(lm.params, one))
        grads = {path: np.float64(g) / max(one["weights"].sum(), 1) for path, g in grads.items()}
        norms.append(np.sqrt(sum((g**2).sum() for g in grads.values())))
        grads = {path: g * min(1, CLIP / max(norms[-1], 1e-30)) for path, g in grads.items()}
        total = grads if total is None else {path: total[path] + g for path, g in grads.items()}
    assert norms[1] == 0 and max(norms) > CLIP
    for accumulate in (1, 2):
        found, metrics = descended(lm, data, step_of(0.0, accumulate))
        for path, g in total.items():
            np.testing.assert_allclose(found[path], g / 4, atol=2e-6, err_msg=path)
        assert metrics["weight"] == data["weights"].sum()


def test_noise_is_of_the_right_size_and_by_the_key():
    zeros = {"a": jnp.zeros((200, 300)), "b": jnp.zeros((200, 300))}
    found = add_noise(zeros, 3.0, jax.random.key(0), 8)
    for path, noise in found.items():
        assert np.std(noise) == pytest.approx(3 / 8, rel=0.02) and abs(np.mean(noise)) < 0.01, path
    assert abs(np.corrcoef(found["a"].ravel(), found["b"].ravel())[0, 1]) < 0.02
    assert np.array_equal(found["a"], add_noise(zeros, 3.0, jax.random.key(0), 8)["a"])
    assert not np.array_equal(found["a"], add_noise(zeros, 3.0, jax.random.key(1), 8)["a"])


def test_the_step_adds_it(lm, step_of):
    still, _ = descended(lm, batch(4), step_of(0.0, 1))
    noisy, _ = descended(lm, batch(4), step_of(2.0, 1))
    noise = np.concatenate([(noisy[path] - still[path]).ravel() for path in still])
    assert np.std(noise) == pytest.approx(2 * CLIP / 4, rel=0.05) and abs(np.mean(noise)) < 0.02


def test_epsilon_is_the_librarys():
    dp_accounting = pytest.importorskip("dp_accounting")
    accountant = Accountant(PrivacyConfig(1.1, delta=1e-5), 32, 1000)
    epsilons = [accountant.epsilon(steps) for steps in (0, 1, 100, 1000)]
    assert epsilons[0] == 0 and epsilons == sorted(epsilons) and epsilons[1] > 0
    library = dp_accounting.rdp.RdpAccountant()
    event = dp_accounting.PoissonSampledDpEvent(0.032, dp_accounting.GaussianDpEvent(1.1))
    library.compose(dp_accounting.SelfComposedDpEvent(event, 1000))
    assert epsilons[-1] == pytest.approx(library.get_epsilon(1e-5), rel=1e-9)
    assert Accountant(PrivacyConfig(2.0), 32, 1000).epsilon(1000) < epsilons[-1]
    assert "epsilon" in accountant.report(100)
    with pytest.raises(UserError, match="privacy.clip_norm=0.0"):
        Accountant(PrivacyConfig(1.0, clip_norm=0.0), 32, 1000)
