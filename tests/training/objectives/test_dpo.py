"""DPO against NumPy in float64, and a reference model that takes no memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlm
from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.tree import flatten
from jaxlm.training.config import DpoConfig, Experiment
from jaxlm.training.lora import remove_adapters
from jaxlm.training.objectives.dpo import dpo_loss
from jaxlm.training.objectives.objective import make_objective
from jaxlm.training.objectives.reference_model import make_reference_model
from jaxlm.training.state import init_state
from jaxlm.training.step import make_step
from tests.training.llamas import CONFIG, batch, tiny_llama
from tests.training.test_lora import adapted


def pairs(rows=4):
    wanted, other = batch(rows, seed=1), batch(rows, seed=2)
    both = {f"chosen_{name}": x for name, x in wanted.items()} | {f"rejected_{name}": x for name, x in other.items()}
    for name in ("chosen_weights", "rejected_weights"):  # the last row is padding
        both[name][-1] = 0
    return both


class Table:
    """Logits by a table: a model whose likelihoods are known exactly."""

    config = nn.DecoderConfig()

    def __init__(self, table_VxV):
        self.table_VxV = table_VxV

    def __call__(self, tokens, key=None):
        return self.table_VxV[tokens]


def expected(table, reference, data, config):
    """Loss, margins and accuracy of pairs, written out."""
    def likelihood(table, prefix):
        logits = np.float64(table)[data[f"{prefix}inputs"]]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = np.take_along_axis(logp, data[f"{prefix}targets"][..., None], -1)[..., 0]
        return (chosen * data[f"{prefix}weights"]).sum(-1)

    h = sum(sign * (likelihood(table, prefix) - likelihood(reference, prefix))
            for sign, prefix in ((1, "chosen_"), (-1, "rejected_")))[:-1]
    if config.loss == "ipo":
        return ((h - 0.5 / config.beta) ** 2).sum(), (config.beta * h).sum(), (h > 0).sum()
    margin, e = config.beta * h, config.label_smoothing
    loss = (1 - e) * np.log1p(np.exp(-margin)) + e * np.log1p(np.exp(margin))
    return loss.sum(), margin.sum(), (h > 0).sum()


@pytest.mark.parametrize("config", [DpoConfig(0.1), DpoConfig(0.5, 0.1), DpoConfig(0.2, loss="ipo")],
                         ids=lambda config: f"{config.loss}-{config.label_smoothing}")
def test_the_loss_is_the_papers(config):
    random, data = np.random.default_rng(0), pairs()
    table, reference = random.standard_normal((2, CONFIG.vocab_size, CONFIG.vocab_size))
    (ours, sums), gradient = jax.jit(jax.value_and_grad(
        lambda table: dpo_loss(Table(table), data, None, Table(jnp.asarray(reference, jnp.float32)), config=config),
        has_aux=True))(jnp.asarray(table, jnp.float32))
    loss, margin, right = expected(table, reference, data, config)
    np.testing.assert_allclose([ours, sums["nll"], sums["margin"]], [loss, loss, margin], rtol=1e-5)
    assert sums["weight"] == 3 and sums["accuracy"] == right
    # The gradient by differences, in one direction.
    direction = random.standard_normal(table.shape)
    ahead, behind = (expected(table + step * direction, reference, data, config)[0] for step in (1e-6, -1e-6))
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / 2e-6, rel=1e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama")


def test_with_adapters_the_reference_is_the_base(base):
    """It has no leaves of its own, and computes what a copy of the base does; training prefers what is preferred."""
    lm, data = adapted(base), pairs()
    experiment = Experiment(model=lm.config, init_from=str(base), dpo=DpoConfig(0.5))
    shared = make_reference_model(experiment, lm.graphdef, lm.params, lm.params)
    assert shared.like is None and shared.params is None
    plain = lm.replace(params=remove_adapters(lm.params))
    copy = make_reference_model(experiment, plain.graphdef, plain.params, plain.params)
    tx, histories = optax.sgd(0.05), []
    for reference in (shared, copy):
        step = make_step(lm.graphdef, lm.params, make_objective(experiment), tx, reference=reference.build)
        state, history = init_state(lm.params, tx, 0, reference=reference.params), []
        for _ in range(6):
            state, metrics = step(state, data)
            history.append({name: float(value) for name, value in metrics.items()})
        histories.append(history)
    for name in ("loss", "margin", "accuracy"):
        np.testing.assert_allclose([row[name] for row in histories[0]], [row[name] for row in histories[1]], rtol=1e-4)
    assert histories[0][-1]["loss"] < histories[0][0]["loss"] and histories[0][-1]["margin"] > histories[0][0]["margin"]
    assert set(state.reference) == set(flatten(plain.params))


def test_mistakes(base):
    lm = jaxlm.load(base)
    experiment = Experiment(model=lm.config, dpo=DpoConfig(0.1))
    with pytest.raises(UserError, match="dpo .*init_from"):
        make_reference_model(experiment, lm.graphdef, lm.params, lambda: lm.params)
    with pytest.raises(UserError, match="label_smoothing"):
        make_objective(dataclasses.replace(experiment, dpo=DpoConfig(0.1, 0.7)))
