"""The mesh and the table from logical axes to it, on eight devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import nn
from jaxlm.compression.recipe import load_recipe
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import AXES, RULES, batch_sharding, constrain, describe, make_mesh, shardings, spec
from jaxlm.core.tree import flatten

CONFIG = nn.DecoderConfig(vocab_size=16, width=16, heads=4, kv_heads=2, ffn=32, layers=3)
MESHES = [dict(data=8), dict(data=1, fsdp=8), dict(data=1, tensor=8), dict(data=2, fsdp=2, tensor=2),
          dict(data=1, sequence=2, expert=2, tensor=2)]


def test_one_size_may_be_what_is_left():
    assert describe(make_mesh(data=-1, fsdp=2, tensor=2).shape) == "data 2 x fsdp 2 x tensor 2"
    assert describe(make_mesh(data=2, stage=-1, expert=2).shape) == "stage 2 x data 2 x expert 2"
    assert dict(make_mesh(devices=jax.devices()[:3]).shape) == {**dict.fromkeys(AXES, 1), "data": 3}
    assert make_mesh().axis_names == AXES
    assert describe(make_mesh(devices=jax.devices()[:1]).shape) == "one device"


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3), "does not fit 8 devices"),
        (dict(data=2, fsdp=2), "does not fit 8 devices; make the product of its sizes that"),
        (dict(data=-1, fsdp=-1), "at most one is -1"),
        (dict(data=0), "sizes are positive"),
        (dict(data=-1, tensor=3), "does not fit 8 devices"),
    ],
)
def test_impossible_meshes_are_told_in_one_line(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**sizes)


def test_what_does_not_divide_is_replicated():
    mesh = make_mesh(data=1, fsdp=2, tensor=4)
    assert spec((16, 32), ("embed", "mlp"), mesh) == P("fsdp", "tensor")
    assert spec((16, 30), ("embed", "mlp"), mesh) == P("fsdp", None)
    assert spec((6, 15), ("batch", None), mesh) == P("fsdp", None)
    mesh = make_mesh(data=2, expert=2, fsdp=2)
    assert spec((8, 15), ("batch", None), mesh) == P(("data", "fsdp", "expert"), None)


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="'colour'"):
        spec((4,), ("colour",), make_mesh())


def test_every_axis_of_every_model_has_a_rule():
    used = set()
    variants = [dataclasses.replace(config, vocab_size=8) for config in nn.PRESETS.values()]
    variants += [nn.LSTMConfig(vocab_size=8), nn.DecoderConfig(vocab_size=8, positions="relative")]
    for config in variants:
        for _, variable in nnx.to_flat_state(nn.abstract(config)[1]):
            axes = variable.get_metadata("axes")
            assert len(axes) == len(variable.get_value().shape)
            used |= set(axes)
    assert used <= set(RULES)


@pytest.mark.parametrize("sizes", MESHES)
def test_sharded_logits_and_gradients_equal_those_of_one_device(sizes):
    graphdef, params = nn.build(CONFIG, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (8, 6)))

    def loss(params, tokens):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(tokens)))

    want, want_gradient = jax.jit(jax.value_and_grad(loss))(params, tokens)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(params, mesh))
        got, gradient = jax.jit(jax.value_and_grad(loss))(placed, jax.device_put(tokens, batch_sharding(mesh)))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for path, leaf in flatten(want_gradient).items():
        np.testing.assert_allclose(flatten(gradient)[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


def test_moments_and_codes_lie_like_their_parameter():
    params = nn.build(CONFIG, jax.random.key(0))[1]
    mesh = make_mesh(data=1, fsdp=2, tensor=4)
    path = "decoder/layers/0/mlp/up/kernel"
    assert flatten(shardings(params, mesh))[path].spec == P(None, "fsdp", "tensor")
    moments = shardings(optax.adam(1e-3).init(params), mesh)[0]
    assert flatten(moments.mu)[path].spec == P(None, "fsdp", "tensor")
    assert moments.count == NamedSharding(mesh, P())

    small = load_recipe("w4a16-rtn-g32").apply(params)
    placed = jax.device_put(small, shardings(small, mesh))
    leaf = flatten(placed)[path]
    assert leaf.codes.sharding.spec == P(None, "tensor", "fsdp")  # [layers, out, in]
    assert leaf.scale.sharding.spec == P(None, "tensor", None)  # one group of 16 does not divide by 2
    assert flatten(small)[path].shape == (3, 16, 32)


def test_axes_that_are_manual_already_are_left_out():
    mesh = make_mesh(data=2, tensor=4)

    def inside(x):
        assert spec(x.shape, ("batch", "features", "mlp"), jax.sharding.get_abstract_mesh()) == P(None, None, "tensor")
        return constrain(x, ("batch", "features", "mlp"))

    with jax.set_mesh(mesh):
        x = jnp.arange(64.0).reshape(2, 4, 8)
        run = jax.jit(jax.shard_map(inside, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}))
        np.testing.assert_array_equal(run(x), x)


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((2, 3))
    assert constrain(x, ("batch", None)) is x
