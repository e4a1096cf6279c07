"""The mesh and the table from logical axes to it, on eight devices."""

from __future__ import annotations

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import nn
from jaxlm.compression.names import load_recipe
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import (
    AXES,
    PRESETS,
    RULES,
    batch_sharding,
    constrain,
    describe_mesh,
    make_mesh,
    mesh_sizes,
    override_sharding,
    shard_over,
    shardings,
    spec,
)
from jaxlm.core.tree import flatten
from jaxlm.training.config import MeshConfig
from tests.models import build

CONFIG = nn.DecoderConfig(vocab_size=16, width=16, heads=4, kv_heads=2, ffn=32, layers=3)
MESHES = [
    dict(data=2, fsdp=2, tensor=2), dict(data=1, sequence=2, expert=2, tensor=2),
    *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in (
        dict(data=8), dict(data=1, fsdp=8), dict(data=1, tensor=8))),
]


def test_one_size_may_be_what_is_left():
    assert describe_mesh(make_mesh(data=-1, fsdp=2, tensor=2).shape) == "data 2 x fsdp 2 x tensor 2"
    assert describe_mesh(make_mesh(data=2, stage=-1, expert=2).shape) == "stage 2 x data 2 x expert 2"
    assert dict(make_mesh(devices=jax.devices()[:3]).shape) == {**dict.fromkeys(AXES, 1), "data": 3}
    assert make_mesh().axis_names == AXES
    assert describe_mesh(make_mesh(devices=jax.devices()[:1]).shape) == "one device"


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3), "does not fit 8 devices"),
        (dict(data=2, fsdp=2), "does not fit 8 devices"),
        (dict(data=-1, fsdp=-1), "at most one is -1"),
        (dict(data=0), "sizes are positive"),
        (dict(data=-1, tensor=3), "does not fit 8 devices"),
    ],
)
def test_impossible_meshes_are_told_in_one_line(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**sizes)


@pytest.mark.parametrize(
    "preset, devices, explicit, expected",
    [
        ("ddp", 8, {}, "data 8"),
        ("ddp", 8, dict(fsdp=2, tensor=2, data=0), "data 2 x fsdp 2 x tensor 2"),
        ("ddp", 8, dict(fsdp=-1, tensor=2), "fsdp 4 x tensor 2"),
        ("fsdp", 8, {}, "fsdp 8"),
        ("fsdp", 8, dict(fsdp=2), "data 4 x fsdp 2"),
        ("fsdp+tp", 8, {}, "fsdp 4 x tensor 2"),
        ("fsdp+tp", 8, dict(tensor=4), "fsdp 2 x tensor 4"),
        ("fsdp+tp", 256, {}, "fsdp 32 x tensor 8"),
        ("3d", 8, {}, "stage 2 x data 2 x tensor 2"),
        ("3d", 64, {}, "stage 4 x data 4 x tensor 4"),
        ("3d", 64, dict(tensor=8), "stage 2 x data 4 x tensor 8"),
        ("moe", 64, {}, "fsdp 8 x expert 8"),
        ("moe", 6, {}, "fsdp 3 x expert 2"),
    ],
)
def test_presets(preset, devices, explicit, expected):
    sizes = mesh_sizes(preset, explicit, devices)
    known = math.prod(size for size in sizes.values() if size > 0)
    whole = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    assert describe_mesh(whole) == expected and math.prod(whole.values()) == devices
    if devices == 8:
        assert make_mesh(**sizes).shape == whole


def test_the_presets_are_those_of_the_configuration():
    assert typing.get_args(typing.get_type_hints(MeshConfig)["preset"]) == tuple(PRESETS)


def test_parameters_go_where_their_path_says():
    like, mesh = nn.abstract(CONFIG)[1], make_mesh(data=1, fsdp=2, tensor=4)
    overrides = ".*/mlp/.*/kernel=- tensor fsdp", "decoder/layers/0/mlp/down/kernel = - - fsdp+tensor"
    moved = override_sharding(overrides)(like)
    before, after = (flatten(shardings(tree, mesh)) for tree in (like, moved))
    layer = "decoder/layers/0/mlp/"
    assert after[layer + "up/kernel"].spec == P(None, "tensor", "fsdp") != before[layer + "up/kernel"].spec
    assert after[layer + "down/kernel"].spec == P(None, None, ("fsdp", "tensor"))
    assert after["embed/table"] == before["embed/table"]
    coded = load_recipe("w4a16-rtn-channel").apply(
        override_sharding((layer + "up/kernel=- tensor fsdp",))(build(CONFIG)[1]))
    assert flatten(shardings(coded, mesh))[layer + "up/kernel"].codes.spec == P(None, "fsdp", "tensor")  # [L, out, in]


@pytest.mark.parametrize(
    "override, message",
    [
        ("embed/tabel=tensor -", "matches no parameter"),
        ("embed/table=tensro -", "no mesh axis 'tensro'; the nearest is 'tensor'"),
        ("embed/table=tensor", "is for 1 dimensions, and embed/table has 2"),
        ("embed/table=tensor tensor", "tensor tensor.*twice"),
        ("embed/table", "is not PATTERN=AXES"),
        ("embed/(=tensor -", "regular expression"),
    ],
)
def test_mistakes_in_overrides(override, message):
    with pytest.raises(UserError, match=message):
        override_sharding((override,))(nn.abstract(CONFIG)[1])


@pytest.mark.parametrize(
    "shape, before, after",
    [
        ((3, 16, 32), P(None, "fsdp", "tensor"), P(None, "fsdp", ("tensor", "data"))),
        ((3, 16, 15), P(None, "fsdp", None), P(None, ("fsdp", "data"), None)),
        ((4, 16, 32), P(None, "fsdp", "tensor"), P(None, "fsdp", ("tensor", "data"))),
        ((16, 16, 32), P(None, "fsdp", "tensor"), P("data", "fsdp", "tensor")),
        ((64, 16), P(), P("data", None)),
        ((3,), P(), P()),
        ((4,), P("data"), P("data")),
    ],
)
def test_moments_are_split_over_data_too(shape, before, after):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert shard_over(NamedSharding(mesh, before), shape) == NamedSharding(mesh, after)


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


@pytest.fixture(scope="module")
def one_device():
    """A loss and its gradient as a compiled function, what they are of, and what they are on one device."""
    graphdef, params = build(CONFIG)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (8, 6)))

    def loss(params, tokens):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(tokens)))

    function = jax.jit(jax.value_and_grad(loss))
    return function, params, tokens, function(params, tokens)


@pytest.mark.parametrize("sizes", MESHES)
def test_sharded_logits_and_gradients_equal_those_of_one_device(sizes, one_device):
    function, params, tokens, (want, want_gradient) = one_device
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(params, mesh))
        got, gradient = function(placed, jax.device_put(tokens, batch_sharding(mesh)))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for path, leaf in flatten(want_gradient).items():
        np.testing.assert_allclose(flatten(gradient)[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


def test_moments_and_codes_lie_like_their_parameter():
    params = build(CONFIG)[1]
    mesh = make_mesh(data=1, fsdp=2, tensor=4)
    path = "decoder/layers/0/mlp/up/kernel"
    assert flatten(shardings(params, mesh))[path].spec == P(None, "fsdp", "tensor")
    moments = shardings(jax.eval_shape(optax.adam(1e-3).init, params), mesh)[0]
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
