"""The LSTM against float64 NumPy, and its decoding protocol."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.core.tree import flatten
from tests.models import build


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(config, weights, tokens):
    x = weights["embed/table"][tokens]
    for i in range(config.layers):
        w, b, u = (weights[f"layers/{i}/{name}"] for name in ("input/kernel", "input/bias", "recurrent/kernel"))
        h = c = np.zeros(config.d_hidden)
        out = []
        for step in x:
            i_, f, g, o = np.split(step @ w + b + h @ u, 4)
            c = sigmoid(f) * c + sigmoid(i_) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out.append(h)
        x = np.stack(out)
    if "bridge/kernel" in weights:
        x = x @ weights["bridge/kernel"]
    return x @ (weights["head/kernel"] if "head/kernel" in weights else weights["embed/table"].T)


@pytest.mark.parametrize("changes", [{}, {"hidden": 20}, {"tie_embeddings": False, "hidden": 20}])
def test_matches_the_float64_reference_and_decodes_alike(changes):
    config = nn.LSTMConfig(vocab_size=17, width=12, layers=2, **changes)
    graphdef, params = build(config)
    model = nnx.merge(graphdef, params)
    batch = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 9)))
    full = jax.jit(lambda params: nnx.merge(graphdef, params)(batch))(params)
    weights = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    np.testing.assert_allclose(full, [reference(config, weights, row) for row in np.asarray(batch)], atol=1e-5)

    padded = jnp.stack([jnp.pad(batch[0], (0, 2)), jnp.pad(batch[1], (2, 0))])
    cache = model.init_cache(2, 11).replace(start=jnp.array([0, 2]))
    decode = jax.jit(lambda params, tokens, cache: nnx.merge(graphdef, params).decode(tokens, cache))
    first, cache = decode(params, padded[:, :5], cache)
    second, cache = decode(params, padded[:, 5:], cache)
    cached = jnp.concatenate([first, second], 1)
    np.testing.assert_allclose(cached[0, :9], full[0], atol=1e-5)
    np.testing.assert_allclose(cached[1, 2:], full[1], atol=1e-5)


def test_the_forget_gate_starts_open():
    _, params = nn.build(nn.LSTMConfig(vocab_size=5, width=4, layers=1), jax.random.key(0))
    bias = flatten(params)["layers/0/input/bias"]
    np.testing.assert_array_equal(bias, [0] * 4 + [1] * 4 + [0] * 8)
