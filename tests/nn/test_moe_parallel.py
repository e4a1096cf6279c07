"""Experts on several devices: what one device computes, by all-to-all; and capacity against a plain reference."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import batch_sharding, make_mesh, shardings
from jaxlm.core.tree import flatten
from jaxlm.nn.layers import ParamKeys
from jaxlm.nn.moe.layer import Moe
from jaxlm.training.objectives.loss import router_loss
from tests.nn.test_pipeline import train
from tests.training.test_step import DECODER, assert_same

B, T, D, F, E, K = 8, 6, 8, 12, 4, 2
CONFIG = nn.DecoderConfig(width=D, ffn=F, experts=E, experts_per_token=K, activation="swiglu", capacity_factor=0.5)
CAPACITY = dataclasses.replace(CONFIG, expert_routing="capacity", capacity_factor=0.7)

GROUPS = dataclasses.replace(
    CONFIG, router_scores="sigmoid", correction_bias=True, n_group=2, topk_group=1, routed_scaling_factor=1.5,
    expert_bias=True, shared_expert_ffn=10, shared_expert_gate=True,
)


@functools.cache
def moe(config):
    """A layer whose router prefers some experts, and its input."""
    graphdef, params = nnx.split(Moe(config, keys=ParamKeys(jax.random.key(0)), scale=1.0))
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(params):
        if "bias" in path[-1]:
            leaf.value = jnp.asarray(rng.normal(0, 0.5, leaf.get_value().shape), jnp.float32)
    params["router"]["kernel"].value = jnp.asarray(rng.normal(0, 1, (D, E)) + [1, 0, 0, -1], jnp.float32)
    return graphdef, params, jnp.asarray(rng.normal(0.5, 1, (B, T, D)), jnp.float32)


def reference(config, params, x_BxTxD):
    """Capacity routing in float64, one choice at a time: (output, chosen, probability, square, dropped)."""
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    router = leaves["router/kernel"]
    gate, up, down = (leaves[f"experts/{name}/kernel"] for name in ("gate", "up", "down"))
    x_BxTxD, y_BxTxD = np.asarray(x_BxTxD, np.float64), np.zeros((B, T, D))
    slots = min(T, int(np.ceil(config.capacity_factor * T * K / E)))
    chosen, probability, square, dropped = np.zeros(E), np.zeros(E), 0.0, 0
    for x_TxD, y_TxD in zip(x_BxTxD, y_BxTxD, strict=True):
        free = np.full(E, slots)
        logits = x_TxD @ router
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        best = np.argsort(-p, -1)[:, :K]
        probability += p.sum(0)
        square += np.sum(np.log(np.exp(logits).sum(-1)) ** 2)
        for k in range(K):
            for t in range(T):
                e = best[t, k]
                chosen[e] += 1
                if free[e] == 0:
                    dropped += 1
                    continue
                free[e] -= 1
                h = x_TxD[t] @ gate[e]
                h = h / (1 + np.exp(-h)) * (x_TxD[t] @ up[e])
                y_TxD[t] += p[t, e] / p[t, best[t]].sum() * (h @ down[e])
    return y_BxTxD, chosen, probability, square, dropped


def test_capacity_is_the_reference():
    graphdef, params, x = moe(CAPACITY)
    y, routing = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, None))(params, x)
    expected, *sums = reference(CAPACITY, params, x)
    assert 0 < sums[-1] < B * T * K / 2
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for got, want in zip((routing.chosen_E, routing.probability_E, routing.square, routing.dropped), sums, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_router_losses():
    """Equation 4 of arXiv:2101.03961 and equation 5 of arXiv:2202.08906, summed over layers."""
    graphdef, params, x = moe(CONFIG)
    routing = jax.jit(lambda: nnx.merge(graphdef, params)(x, None)[1])()
    routing = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), routing)
    _, chosen, probability, square, _ = reference(CONFIG, params, x)
    balance = E * np.sum(chosen / (B * T * K) * probability / (B * T))
    np.testing.assert_allclose(router_loss(routing, (0.3, 0.0)), 0.3 * 2 * balance, rtol=1e-5)
    np.testing.assert_allclose(router_loss(routing, (0.0, 0.2)), 0.2 * 2 * square / (B * T), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (CONFIG, dict(data=1, expert=4)), (CAPACITY, dict(data=1, fsdp=2, expert=2)),
        (GROUPS, dict(data=1, fsdp=2, expert=2)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [
            (CONFIG, dict(data=2, expert=2, tensor=2)), (CONFIG, dict(data=1, fsdp=2)),
            (GROUPS, dict(data=1, expert=2, tensor=2)),
            (dataclasses.replace(CAPACITY, scale_expert_inputs=True), dict(data=1, expert=2, sequence=2)),
            (CAPACITY, dict(data=1, expert=2, sequence=2))]),
    ],
    ids=lambda value: getattr(value, "expert_routing", None) or "-".join(value),
)
def test_experts_on_several_devices_equal_one(config, sizes):
    """Output, sums and gradients; dropless takes several rounds here, and capacity drops."""
    graphdef, params, x = moe(config)
    weight = np.random.default_rng(1).normal(0, 1, x.shape)

    def objective(params, x):
        y, routing = nnx.merge(graphdef, params)(x, None)
        return jnp.sum(y * weight) + router_loss(routing, (1.0, 1.0)), (y, routing)

    gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
    expected = jax.jit(gradient)(params, x)
    mesh = make_mesh(**sizes, devices=jax.devices()[: np.prod(list(sizes.values()))])
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, x), (shardings(params, mesh), batch_sharding(mesh)))
        compiled = jax.jit(gradient).lower(*placed).compile()
        got = compiled(*placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    text = compiled.as_text()
    assert ("all-to-all" in text) == ("expert" in sizes)
    if sizes.keys() <= {"data", "expert"}:
        gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
        assert all(np.prod([int(size) for size in shape.split(",")]) <= D * E for shape in gathered)  # the router


def test_experts_that_do_not_divide_and_have_no_capacity():
    graphdef, params, x = moe(CONFIG)
    with jax.set_mesh(make_mesh(data=1, expert=8)), pytest.raises(UserError, match="4 experts do not divide among 8"):
        jax.eval_shape(lambda: nnx.merge(graphdef, params)(x, None))
    graphdef, params, x = moe(dataclasses.replace(CAPACITY, capacity_factor=0.0))
    with pytest.raises(UserError, match="capacity_factor is 0.0; it must be positive"):
        jax.eval_shape(lambda: nnx.merge(graphdef, params)(x, None))


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_training_in_a_pipeline_with_experts(routing):
    """The whole: experts, stages, microbatches and the losses of routers, against one device."""
    config = dataclasses.replace(
        DECODER, experts=4, layers=2, microbatches=2, expert_routing=routing, capacity_factor=0.8
    )
    mesh = make_mesh(data=1, stage=2, expert=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        state, history, text = train(config, mesh)
    expected, expected_history, _ = train(config)
    assert_same((jax.device_get(state), history), (expected, expected_history), 1e-5)
    assert "all-to-all" in text and "collective-permute" in text
    assert (history[0].get("dropped", 0) > 0) == (routing == "capacity")
    kernel = state.params["decoder/layers/0/mlp/experts/up/kernel"]
    assert kernel.addressable_shards[0].data.nbytes * 4 == kernel.nbytes
