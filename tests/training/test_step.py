"""The step: accumulation, meshes, bad updates, transforms, frozen leaves and dropout keys."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.core.sharding import batch_sharding, make_mesh, shard_over
from jaxlm.core.tree import flatten, map_params
from jaxlm.training.config import OptimConfig
from jaxlm.training.objectives.loss import lm_loss, make_loss
from jaxlm.training.optimizers.optimizer import make_optimizer
from jaxlm.training.state import abstract_state, init_state
from jaxlm.training.step import StepOptions, make_eval, make_step
from tests.models import build

ROWS, LENGTH, VOCABULARY = 16, 6, 32
# The gradient of a key's bias is zero but for rounding; with AdamW's usual eps its sign alone would move the bias.
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, eps=1e-5)
DECODER = nn.preset("1b", vocab_size=VOCABULARY, width=16, heads=4, kv_heads=2, ffn=32, layers=2, dtype="float32",
                    remat="none")
SEQ2SEQ = nn.preset("tiny", vocab_size=VOCABULARY, width=16, heads=4, ffn=32, encoder_layers=1, decoder_layers=1)


def batches(config, count, seed=0):
    random = np.random.default_rng(seed)
    names = ["inputs", "targets"] + ["src"] * (config.kind == "seq2seq")
    return [
        {name: random.integers(3, VOCABULARY, (ROWS, LENGTH)).astype(np.int32) for name in names}
        | {"weights": (random.random((ROWS, LENGTH)) < 0.7).astype(np.float32)}
        for _ in range(count)
    ]


def run(config, data, mesh=None, **options):
    """Final state and the metrics of every step."""
    graphdef, like = nn.abstract(config)
    tx = make_optimizer(OPTIM, 20)
    layout = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, abstract_state(like, tx, mesh))
    loss = make_loss(config, label_smoothing=0.1, z_loss=1e-3)
    step = make_step(graphdef, like, loss, tx, layout=layout, **options)
    state = init_state(build(config)[1], tx, 0, layout)
    history = []
    for batch in data:
        if mesh is not None:
            batch = jax.device_put(batch, batch_sharding(mesh))
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    assert step.compiled._cache_size() == 1
    return jax.device_get(state), history


def assert_same(left, right, tolerance):
    (state, history), (other, others) = left, right
    for name in ("loss", "nll", "grad_norm", "weight"):
        np.testing.assert_allclose([m[name] for m in history], [m[name] for m in others], rtol=tolerance, err_msg=name)
    for path, leaf in state.params.items():
        np.testing.assert_allclose(leaf, other.params[path], atol=tolerance, rtol=0, err_msg=path)


@pytest.fixture(scope="module")
def on_one_device():
    """A function from a model to its training on one device."""
    return cache(lambda config: run(config, batches(config, 2)))


def test_accumulation_is_one_big_batch(on_one_device):
    accumulated = run(DECODER, batches(DECODER, 2), options=StepOptions(accumulate=4))
    assert_same(on_one_device(DECODER), accumulated, 1e-5)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        *(pytest.param(DECODER, sizes, marks=pytest.mark.slow) for sizes in (  # test_parallel has decoders on meshes
            dict(data=8), dict(data=1, fsdp=8), dict(data=1, fsdp=2, tensor=4), dict(data=2, fsdp=2, tensor=2))),
        (SEQ2SEQ, dict(data=2, fsdp=2, tensor=2)),
    ],
    ids=lambda value: getattr(value, "kind", None) or "-".join(f"{k}{v}" for k, v in value.items()),
)
def test_eight_devices_equal_one(config, sizes, on_one_device):
    """Loss, gradient norm and parameters after several steps, with dropout on in the translation model."""
    alone, mesh = on_one_device(config), make_mesh(**sizes)
    with jax.set_mesh(mesh):
        assert_same(alone, run(config, batches(config, 2), mesh), 1e-5)


@pytest.mark.parametrize("shard_optimizer", [False, True])
def test_where_moments_lie(shard_optimizer):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state = abstract_state(nn.abstract(DECODER)[1], make_optimizer(OPTIM, 20), mesh, shard_optimizer=shard_optimizer)
    for path, leaf in optax.tree.get(state.opt_state, "mu").items():
        like = state.params[path].sharding
        assert leaf.sharding == (shard_over(like, leaf.shape) if shard_optimizer else like)
    assert not state.params["embed/table"].sharding.is_fully_replicated


def test_bfloat16_is_for_activations_only():
    """Parameters, moments and metrics stay float32; nothing is compiled to see it."""
    config = dataclasses.replace(DECODER, dtype="bfloat16")
    graphdef, like = nn.abstract(config)
    tx = make_optimizer(OPTIM, 20)
    before = abstract_state(like, tx, make_mesh())
    step = make_step(graphdef, like, make_loss(config), tx, options=StepOptions(accumulate=2))
    state, metrics = jax.eval_shape(step, before, batches(config, 1)[0])
    for leaf in jax.tree.leaves((state.params, state.opt_state, metrics)):
        assert leaf.dtype in (np.float32, np.int32, np.bool_)
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(lambda leaf: leaf.dtype, before)


class Linear(nnx.Module):
    """logits = table[token], with a leaf of integers, and noise where a key is given."""

    def __init__(self):
        self.config = nn.DecoderConfig(vocab_size=VOCABULARY)
        self.table = nnx.Param(jnp.linspace(-1, 1, VOCABULARY**2).reshape(VOCABULARY, VOCABULARY), axes=("vocab", None))
        self.shift = nnx.Param(jnp.arange(VOCABULARY), axes=("vocab",))

    def __call__(self, tokens, key=None):
        noise = 0.0 if key is None else jax.random.normal(key, (VOCABULARY,))
        return self.table.get_value()[tokens] + noise + 0.01 * self.shift.get_value()


@cache
def linear_step(**options):
    graphdef, params = nnx.split(Linear())
    tx = make_optimizer(OptimConfig(lr=1e-2, warmup_steps=0), 100)
    return make_step(graphdef, params, lm_loss, tx, **options), lambda seed=0: init_state(params, tx, seed)


def test_integer_leaves_are_carried_along():
    step, start = linear_step()
    state, _ = step(start(), batches(DECODER, 1)[0])
    np.testing.assert_array_equal(state.frozen["shift"], np.arange(VOCABULARY))
    assert "shift" not in state.params and not state.saved.frozen
    assert np.any(state.params["table"] != start().params["table"])


def test_transform_runs_before_the_forward_pass():
    """A mask on the parameters stops the gradient of what it hides."""
    def mask(params):
        return map_params(lambda path, leaf: leaf.at[:, 5:].set(0) if path == "table" else leaf, params)

    step, start = linear_step(transform=lambda step: mask)
    moments = optax.tree.get(step(start(), batches(DECODER, 1)[0])[0].opt_state, "mu")["table"]
    assert np.any(moments[:, :5]) and not np.any(moments[:, 5:])


def test_dropout_depends_on_seed_and_step():
    step, start = linear_step()
    batch = batches(DECODER, 1)[0]

    def losses(seed):
        state, seen = start(seed), []
        for _ in range(2):
            state, metrics = step(state, batch)
            seen.append(float(metrics["loss"]))
        return seen

    assert losses(0) == losses(0) != losses(1)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bad_update_changes_nothing(poison):
    step, start = linear_step()
    batch = batches(DECODER, 1)[0]
    before = jax.device_get(start())
    after, metrics = step(start(), batch | {"weights": np.where(batch["weights"], np.float32(poison), 0)})
    assert metrics["bad"] and after.step == 1
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if old.shape:
            np.testing.assert_array_equal(old, new)
    after, metrics = step(after, batch)
    assert not metrics["bad"] and np.isfinite(metrics["grad_norm"])


def test_spike():
    """A jump of the gradient norm over the limit is bad, once there is a mean to compare with."""
    step, start = linear_step(options=StepOptions(spike_factor=2.0))
    calm = batches(DECODER, 1)[0]
    wild = calm | {"inputs": np.full_like(calm["inputs"], 3), "targets": np.full_like(calm["targets"], 4)}
    state, metrics = step(start(), wild)
    assert not metrics["bad"]  # the first steps are always taken
    for _ in range(30):
        state, metrics = step(state, calm)
        assert not metrics["bad"]
    mean = float(state.norm_mean)
    state, metrics = step(state, wild)
    assert metrics["bad"] and metrics["grad_norm"] > 2 * mean
    for _ in range(300):
        state, metrics = step(state, wild)
    assert not metrics["bad"]  # what stays is no spike


def test_eval_is_deterministic_and_plain():
    """Without the noise that the model adds where it is given a key."""
    graphdef, params = nnx.split(Linear())
    batch = batches(DECODER, 1)[0]
    sums = make_eval(graphdef, params, lm_loss)(flatten(params), batch)
    table = np.linspace(-1, 1, VOCABULARY**2).reshape(VOCABULARY, VOCABULARY) + 0.01 * np.arange(VOCABULARY)
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    expected = -(logp[batch["inputs"], batch["targets"]] * batch["weights"]).sum()
    np.testing.assert_allclose(sums["nll"], expected, rtol=1e-5)
    assert sums["weight"] == batch["weights"].sum()
