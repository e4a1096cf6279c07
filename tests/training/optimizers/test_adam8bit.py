"""8-bit Adam: its rounding, and that it trains as Adam does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import batch_sharding, bytes_per_device, make_mesh
from jaxlm.training.config import OptimConfig
from jaxlm.training.objectives.loss import lm_loss
from jaxlm.training.optimizers.adam8bit import BlockQuantized, dynamic_table, scale_by_adam8bit
from jaxlm.training.optimizers.optimizer import decay_mask, make_optimizer
from jaxlm.training.state import abstract_state, init_state
from jaxlm.training.step import make_step
from tests.training.llamas import batch


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_values(signed):
    x = np.random.default_rng(0).standard_normal((3, 600)) ** 3
    x = np.float32(x if signed else np.abs(x))
    coded, table = BlockQuantized.of(jnp.asarray(x), signed), np.float64(dynamic_table(signed))
    assert coded.codes.dtype == np.uint8 and coded.codes.shape == x.shape and coded.scale.shape == (3, 3)
    assert table[-1] == 1 and 0 in table and np.all(np.diff(table) > 0)
    for row, block in np.ndindex(3, 3):
        part = x[row, 256 * block : 256 * (block + 1)].astype(np.float64)
        largest = np.abs(part).max()
        nearest = table[np.abs(part[:, None] / largest - table).argmin(-1)] * largest
        np.testing.assert_allclose(np.asarray(coded.array)[row, 256 * block : 256 * (block + 1)], nearest,
                                   rtol=1e-4, atol=1e-7 * largest)
    assert not np.any(np.asarray(BlockQuantized.of(jnp.zeros((2, 5)), signed).array))


def test_large_matrices_only():
    params = {"embed/table": jnp.zeros((64, 64)), "a/kernel": jnp.zeros((64, 64)), "b/kernel": jnp.zeros((8, 8))}
    state = scale_by_adam8bit(0.9, 0.95, 1e-8).init(params)
    assert [isinstance(state.nu[path], BlockQuantized) for path in params] == [False, True, False]
    assert state.mu["a/kernel"].codes.nbytes == 64 * 64 and state.mu["a/kernel"].scale.nbytes == 64 * 4


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "lion", "muon"])
def test_each_finds_the_minimum(name):
    """Of a badly conditioned quadratic; the 8-bit one stays near the other."""
    random = np.random.default_rng(0)
    goal = {"decoder/layers/0/q/kernel": random.standard_normal((2, 64, 64)), "final_norm/scale": np.ones(64)}
    scales = np.geomspace(0.1, 10, 64)
    rate = 0.2 if name == "muon" else 0.05
    config = OptimConfig(name=name, lr=rate, warmup_steps=0, schedule="linear", weight_decay=0.0, clip_norm=0.0)
    tx = make_optimizer(config, 150)

    @jax.jit
    def run(params):
        def body(carry, _):
            params, state = carry
            grads = {path: scales * (leaf - goal[path]) for path, leaf in params.items()}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None
        return jax.lax.scan(body, (params, tx.init(params)), None, 150)[0][0]

    start = {path: jnp.full(leaf.shape, 0.5, jnp.float32) for path, leaf in goal.items()}
    found = run(start)
    for path, leaf in goal.items():
        before, after = (float(np.mean(np.square(each[path] - leaf))) for each in (start, found))
        assert after < 0.1 * before + 1e-4, (path, before, after)


def test_decay_goes_by_rule():
    params = {"a/kernel": jnp.ones((4, 4)), "head/kernel": jnp.ones((4, 4)), "norm/scale": jnp.ones(4)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for name in ("adamw", "adamw8bit", "adafactor", "lion", "muon"):
        tx = make_optimizer(OptimConfig(name=name, lr=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5,
                                        decayed="a/.*"), 10)
        updates = jax.jit(lambda params, tx=tx: tx.update(zeros, tx.init(params), params)[0])(params)
        np.testing.assert_allclose(updates["a/kernel"], -0.05, rtol=1e-5, err_msg=name)
        assert not np.any(updates["head/kernel"]) and not np.any(updates["norm/scale"])
    with pytest.raises(UserError, match="optim.decayed 'nothing'"):
        decay_mask("nothing", params)
    with pytest.raises(UserError, match=r"optim.decayed: '\('"):
        decay_mask("(", params)


def test_adapters_decay_like_matrices_and_magnitudes_do_not():
    names = ["x/q/kernel/a", "x/q/kernel/b", "x/q/kernel/magnitude"]
    assert list(decay_mask(OptimConfig().decayed, dict.fromkeys(names)).values()) == [True, True, False]


WIDE = nn.DecoderConfig(vocab_size=32, width=64, heads=4, ffn=128, layers=2)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion", "muon"])
def test_moments_are_split_over_data(name, offload):
    """ZeRO-1: each of eight devices has an eighth of them, or, offloaded, nothing; codes and their scales alike."""
    like, tx = nn.abstract(WIDE)[1], make_optimizer(OptimConfig(name=name), 1000)
    whole = bytes_per_device(abstract_state(like, tx, make_mesh(devices=jax.devices()[:1])).opt_state)
    split = abstract_state(like, tx, make_mesh(), offload_optimizer=offload)
    assert bytes_per_device(split.opt_state) < (0.01 if offload else 0.13) * whole
    adam = bytes_per_device(abstract_state(like, make_optimizer(OptimConfig(), 1000), make_mesh()).params)
    ratio = {"adamw": 2, "adamw8bit": 0.55, "lion": 1, "muon": 1.03}[name]
    assert whole == pytest.approx(ratio * adam, rel=0.05)


@pytest.mark.slow
def test_split_in_codes_trains_as_whole():
    """Two steps on a mesh of four devices, offloaded too, against one; a code may round the other way."""
    config, tx = WIDE, make_optimizer(OptimConfig(name="adamw8bit", lr=1e-3, warmup_steps=0), 10)
    graphdef, like = nn.abstract(config)
    init, data, found = nn.initializer(config)[1], batch(8), []
    for mesh in (None, make_mesh(data=2, tensor=2, devices=jax.devices()[:4])):
        layout = placed = None
        if mesh is not None:
            state = abstract_state(like, tx, mesh, offload_optimizer=True)
            layout, placed = jax.tree.map(lambda leaf: leaf.sharding, state), jax.device_put(data, batch_sharding(mesh))
        with jax.set_mesh(mesh or make_mesh(devices=jax.devices()[:1])):
            step = make_step(graphdef, like, lm_loss, tx, layout=layout)
            state = init_state(lambda: init(jax.random.key(0)), tx, 0, layout)
            for _ in range(2):
                state, metrics = step(state, placed or data)
            found.append((float(metrics["loss"]), jax.device_get(state.params)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for path, leaf in found[0][1].items():
        assert np.mean(np.abs(leaf - found[1][1][path])) < 1e-5, path
