"""The loss against its formula in float64 NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.training.objectives.loss import cross_entropy, lm_loss, make_loss, seq2seq_loss
from tests.models import build

B, T, V = 3, 5, 11


def example(scale=3.0):
    random = np.random.default_rng(0)
    logits = (scale * random.standard_normal((B, T, V))).astype(np.float32)
    return logits, random.integers(0, V, (B, T)).astype(np.int32), random.random((B, T)).astype(np.float32)


def reference(logits, targets, smoothing, z_loss):
    """(objective, nll) per token, in float64, term by term."""
    x = logits.astype(np.float64)
    lse = np.log(np.exp(x).sum(-1))
    logp = x - lse[..., None]
    truth = np.full(x.shape, smoothing / V)
    np.put_along_axis(truth, targets[..., None], 1 - smoothing + smoothing / V, -1)
    nll = -np.take_along_axis(logp, targets[..., None], -1)[..., 0]
    return -(truth * logp).sum(-1) + z_loss * lse**2, nll


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
def test_values(smoothing, z_loss):
    logits, targets, _ = example()
    objective, nll = cross_entropy(logits, targets, smoothing, z_loss)
    expected_objective, expected_nll = reference(logits, targets, smoothing, z_loss)
    np.testing.assert_allclose(objective, expected_objective, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 1e-2)])
def test_gradient_by_differences(smoothing, z_loss):
    """Of both outputs, each with its own weights."""
    logits, targets, weights = example()
    others = weights[::-1]

    def total(x):
        objective, nll = cross_entropy(x, targets, smoothing, z_loss)
        return jnp.sum(weights * objective + others * nll)

    def reference_total(x):
        objective, nll = reference(x, targets, smoothing, z_loss)
        return np.sum(weights * objective + others * nll)

    grad = jax.grad(total)(logits)
    step = 1e-5
    for index in np.ndindex(logits.shape):
        up, down = logits.astype(np.float64), logits.astype(np.float64)
        up[index] += step
        down[index] -= step
        np.testing.assert_allclose(grad[index], (reference_total(up) - reference_total(down)) / (2 * step), atol=2e-6)


def test_extreme_logits():
    logits = jnp.array([[[1e4, 0.0, -1e4]]])
    targets = jnp.array([[2]])
    (value, _), pull = jax.vjp(lambda x: cross_entropy(x, targets, 0.0, 0.0), logits)
    assert float(value[0, 0]) == 2e4
    grad = pull((jnp.ones((1, 1)), jnp.zeros((1, 1))))[0]
    np.testing.assert_array_equal(grad[0, 0], [1, 0, -1])


class Table:
    """A model that ignores its tokens."""

    config = nn.DecoderConfig()

    def __init__(self, logits):
        self.logits = jnp.asarray(logits)

    def __call__(self, *_, key=None):
        return self.logits


@pytest.mark.parametrize("loss", [lm_loss, seq2seq_loss])
def test_sums_are_weighted(loss):
    logits, targets, weights = example()
    batch = {"src": targets, "inputs": targets, "targets": targets, "weights": weights}
    objective, sums = loss(Table(logits), batch, None, label_smoothing=0.1, z_loss=1e-3)
    expected_objective, expected_nll = reference(logits, targets, 0.1, 1e-3)
    np.testing.assert_allclose(objective, np.sum(weights * expected_objective), rtol=1e-5)
    np.testing.assert_allclose(sums["nll"], np.sum(weights * expected_nll), rtol=1e-5)
    np.testing.assert_allclose(sums["weight"], np.sum(weights, dtype=np.float64), rtol=1e-6)


def test_weight_zero_removes_a_token():
    logits, targets, weights = example()
    weights[1, 2:] = 0
    batch = {"inputs": targets, "targets": targets, "weights": weights}
    grad = jax.grad(lambda x: lm_loss(Table(x), batch)[0])(logits)
    assert not np.any(grad[1, 2:])
    assert np.all(np.any(grad[1, :2], -1))


def test_packed_documents_reach_the_model():
    """Two documents in one row give the loss of the two alone."""
    config = nn.preset("nano", vocab_size=V, width=16, heads=2, layers=1)
    graphdef, params = build(config)
    random = np.random.default_rng(0)
    a, b = (random.integers(0, V, (2, n)).astype(np.int32) for n in (4, 4))

    def batch(inputs_targets, **packing):
        inputs, targets = inputs_targets
        return {"inputs": inputs[None], "targets": targets[None], "weights": np.ones((1, len(inputs)), np.float32),
                **{name: np.array([values], np.int32) for name, values in packing.items()}}

    @jax.jit
    def loss(params, batch):
        return make_loss(config)(nnx.merge(graphdef, params), batch, None)[0]

    packing = dict(segment_ids=[1] * 4 + [2] * 4, positions=[0, 1, 2, 3] * 2)
    together = loss(params, batch(np.concatenate([a, b], 1), **packing))
    np.testing.assert_allclose(together, loss(params, batch(a)) + loss(params, batch(b)), rtol=1e-6)
