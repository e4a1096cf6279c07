"""Schedules and AdamW against NumPy."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import UserError
from jaxlm.training.config import OptimConfig
from jaxlm.training.optimizers.optimizer import decay_mask, make_optimizer, make_schedule

STEPS, WARMUP, PEAK, FLOOR = 100, 10, 2.0, 0.1


def expected_rate(schedule, t):
    if t < WARMUP:
        return PEAK * (t + 1) / (WARMUP + 1)
    done = (t - WARMUP) / (STEPS - WARMUP)
    ratio = {
        "constant": 1.0,
        "inverse_sqrt": math.sqrt((WARMUP + 1) / (t + 1)),
        "linear": FLOOR + (1 - FLOOR) * (1 - done),
        "cosine": FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2,
        "wsd": 1.0 if t < 70 else FLOOR + (1 - FLOOR) * (1 - math.sqrt((t - 70) / 30)),
    }[schedule]
    return PEAK * ratio


@pytest.mark.parametrize("name", ["constant", "inverse_sqrt", "linear", "cosine", "wsd"])
def test_schedule(name):
    config = OptimConfig(lr=PEAK, schedule=name, warmup_steps=WARMUP, min_lr_ratio=FLOOR, decay_fraction=0.3)
    schedule = make_schedule(config, STEPS)
    expected = [expected_rate(name, t) for t in range(STEPS)]
    np.testing.assert_allclose(schedule(np.arange(STEPS)), expected, rtol=1e-5)
    np.testing.assert_allclose([schedule(t) for t in (0, WARMUP - 1, WARMUP, STEPS - 1)],
                               [expected[t] for t in (0, WARMUP - 1, WARMUP, STEPS - 1)], rtol=1e-5)


def test_schedule_continues_past_the_end():
    schedule = make_schedule(OptimConfig(lr=1.0, warmup_steps=0, min_lr_ratio=0.25), 10)
    assert float(schedule(10)) == float(schedule(1000)) == 0.25


def test_warmup_longer_than_training():
    with pytest.raises(UserError, match="warmup_steps=100 .* train.steps=50"):
        make_schedule(OptimConfig(warmup_steps=100), 50)


def parameters():
    random = np.random.default_rng(0)
    shapes = {
        "embed/table": (5, 4), "decoder/layers/0/attn/q/kernel": (2, 4, 4), "decoder/layers/0/attn/q/bias": (2, 4),
        "decoder/layers/0/attn_norm/scale": (2, 4), "final_norm/scale": (4,),
    }
    return {path: random.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}


def test_only_matrices_decay():
    mask = decay_mask(OptimConfig().decayed, parameters())
    assert [path for path, decays in mask.items() if decays] == ["embed/table", "decoder/layers/0/attn/q/kernel"]


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw(clip_norm):
    """Five updates, as arXiv:1711.05101 (algorithm 2) writes them, in float64."""
    config = OptimConfig(lr=0.1, warmup_steps=2, weight_decay=0.3, clip_norm=clip_norm)
    tx, schedule = make_optimizer(config, 20), make_schedule(config, 20)
    params = {path: jnp.asarray(leaf) for path, leaf in parameters().items()}
    expected = {path: leaf.astype(np.float64) for path, leaf in parameters().items()}
    first, second = ({path: np.zeros_like(leaf) for path, leaf in expected.items()} for _ in range(2))
    state, random = tx.init(params), np.random.default_rng(1)
    for t in range(5):
        grads = {path: random.standard_normal(leaf.shape).astype(np.float32) for path, leaf in expected.items()}
        updates, state = tx.update({path: jnp.asarray(leaf) for path, leaf in grads.items()}, state, params)
        params = optax.apply_updates(params, updates)
        norm = math.sqrt(sum((leaf.astype(np.float64)**2).sum() for leaf in grads.values()))
        scale = clip_norm / norm if 0 < clip_norm < norm else 1.0
        for path, weight in expected.items():
            g = scale * grads[path].astype(np.float64)
            first[path] = config.b1 * first[path] + (1 - config.b1) * g
            second[path] = config.b2 * second[path] + (1 - config.b2) * g**2
            m, v = first[path] / (1 - config.b1**(t + 1)), second[path] / (1 - config.b2**(t + 1))
            decay = config.weight_decay * weight if decay_mask(config.decayed, expected)[path] else 0
            expected[path] = weight - float(schedule(t)) * (m / (np.sqrt(v) + config.eps) + decay)
    for path, leaf in expected.items():
        np.testing.assert_allclose(params[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)
