"""How keys and values are kept: against float64 references, and as attention reads them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import make_mesh, shardings
from jaxlm.core.tree import flatten
from jaxlm.nn.attention.kv_cache import cache_bytes_per_token
from jaxlm.nn.attention.layer import attend
from jaxlm.nn.attention.quantized_kv import QuantizedKV, dequantize_kv, fake_quantize_kv, quantize_kv
from tests.models import build

ROUNDED = ("int8", "int4", "fp8")
CONFIG = nn.DecoderConfig(vocab_size=23, width=16, heads=4, kv_heads=2, ffn=24, layers=3, max_positions=32)


def vectors(*shape, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * rng.lognormal(0, 2, (*shape[:-1], 1)) + 3 * (np.arange(shape[-1]) == 1)
    x[0, 0, 0] = 0
    return jnp.asarray(x, dtype)


def reference(x, kind, turned):
    """What is given back of each vector, in float64 but for the float16 of its scale."""
    x = np.asarray(x, np.float64)
    blocks = [scipy.linalg.hadamard(8) / np.sqrt(8)] * (x.shape[-1] // 8)
    turn = scipy.linalg.block_diag(*blocks) if turned else np.eye(x.shape[-1])
    out = []
    for row in (x @ turn).reshape(-1, x.shape[-1]):
        if kind == "int4":
            low = float(np.float16(row.min()))
            scale = float(np.float16((row.max() - low) / 15))
            row = low + scale * np.clip(np.round((row - low) / (scale or 1)), 0, 15)
        else:
            scale = float(np.float16(np.abs(row).max() / (127 if kind == "int8" else 448)))
            row = row / (scale or 1)
            if kind == "int8":
                row = np.clip(np.round(row), -127, 127) * scale
            else:
                row = np.clip(row, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
        out.append(row)
    return np.reshape(out, x.shape) @ turn.T


@pytest.mark.parametrize("kind", ROUNDED)
def test_kept_vectors_are_those_of_the_reference(kind):
    k, v = vectors(2, 2, 5, 24), vectors(2, 2, 5, 24, seed=1)
    got = jax.jit(lambda k, v: dequantize_kv(*quantize_kv(k, v, kind)))(k, v)
    for x, back, turned in zip((k, v), got, (kind == "int4", False), strict=True):
        size = np.abs(x).max(-1, keepdims=True) + 1e-9
        np.testing.assert_allclose(back / size, reference(x, kind, turned) / size, atol=3e-6)
        worst = {"int8": 0.5 / 127, "int4": 0.5 * 2 / 15 * (24**0.5 if turned else 1), "fp8": 2**-4}[kind]
        assert (np.abs(back - x) <= 1.02 * worst * size).all()
        assert (back[0, 0, 0] == 0).all()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("kind", ROUNDED)
def test_attention_reads_what_was_kept(kind, dtype, tolerance):
    q, k, v = (vectors(2, n, m, 24, seed=n, dtype=dtype) / 4 for n, m in [(3, 4), (2, 5), (2, 5)])
    mask = jnp.asarray(np.random.default_rng(5).random((2, 3, 5)) < 0.8)

    @jax.jit
    def read_both_ways(q, k, v):
        quantized = quantize_kv(k, v, kind)
        dense = [x.astype(dtype) for x in dequantize_kv(*quantized)]
        return [attend(q, *kv, mask, scale=0.3, cap=2.0) for kv in (quantized, dense)]

    got, want = read_both_ways(q, k, v)
    assert got.dtype == want.dtype == dtype
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), atol=tolerance * float(jnp.abs(want).max())
    )


def test_every_float8_is_read_as_it_is_written():
    codes = jnp.asarray([code for code in range(256) if code & 0x7F != 0x7F], jnp.uint8)
    kept = QuantizedKV(codes[:, None], jnp.ones(len(codes), jnp.float16), None, "fp8")
    want = np.asarray(codes).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(dequantize_kv(kept, kept)[0][:, 0], want)


def test_a_large_channel_of_keys_costs_the_others_less_when_turned():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 1, 64, 64)) + 20 * (np.arange(64) == 7) * rng.choice([-1, 1], (64, 1)))
    k, v = dequantize_kv(*quantize_kv(x, x, "int4"))
    assert jnp.linalg.norm(k - x) < 0.6 * jnp.linalg.norm(v - x)


@pytest.mark.parametrize("kind", ("full", *ROUNDED))
def test_gradients_go_straight_through(kind):
    k, v, a, b = (vectors(2, 2, 5, 8, seed=seed) for seed in range(4))

    def loss(k, v):
        k, v = fake_quantize_kv(k, v, kind)
        return (k * a).sum() + (v * b).sum()

    got = jax.jit(jax.grad(loss, (0, 1)))(k, v)
    np.testing.assert_array_equal(got[0], a)
    np.testing.assert_array_equal(got[1], b)


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_a_model_trains_with_the_cache_it_will_have(remat):
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 23, (4, 9)))

    def loss_and_gradient(kind):
        graphdef, params = build(dataclasses.replace(CONFIG, kv_cache=kind, remat=remat, layers=2))

        def loss(params):
            log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens[:, :-1]))
            return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()

        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        return value, flatten(gradient)

    (value, gradient), (rounded_value, rounded) = loss_and_gradient("full"), loss_and_gradient("int4")
    assert value != rounded_value
    for path in gradient:  # close to those of the model as it is, to the projections that are rounded too
        distance = jnp.linalg.norm(rounded[path] - gradient[path]) / jnp.linalg.norm(gradient[path])
        assert 0 < distance < 0.3, path


@pytest.mark.parametrize("kind, size", [("full", 32), ("int8", 10), ("int4", 8), ("fp8", 10)])
def test_bytes_a_token_are_those_of_the_cache(kind, size):
    """Of 8 numbers a head."""
    config = dataclasses.replace(CONFIG, head_dim=8, kv_cache=kind, layer_groups=(1, 2))
    model = nnx.merge(*build(config))

    def cached(slots):
        cache = model.init_cache(1, slots)
        return sum(x.nbytes for x in jax.tree.leaves((cache.keys, cache.values)))

    assert cache_bytes_per_token(config) == cached(6) - cached(5) == 3 * 2 * 2 * size
    translator = nn.preset("tiny", vocab_size=23, width=32, heads=2, decoder_heads=4, kv_cache=kind, decoder_layers=3)
    assert cache_bytes_per_token(translator) == 3 * 2 * 4 * size
    assert cache_bytes_per_token(nn.LSTMConfig(vocab_size=23)) == 0


@pytest.mark.parametrize("kind", [
    "int8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int4", "fp8"))])
def test_decoding_writes_in_place(kind):
    """A step needs room for a layer's keys or values as attention multiplies them, and not for a copy of the cache."""
    config = dataclasses.replace(CONFIG, layers=16, kv_cache=kind)
    graphdef, params = nn.abstract(config)
    cache = jax.eval_shape(lambda p: nnx.merge(graphdef, p).init_cache(1, 4096), params)
    step = jax.jit(lambda p, tokens, cache: nnx.merge(graphdef, p).decode(tokens, cache), donate_argnums=2)
    memory = step.lower(params, jax.ShapeDtypeStruct((1, 1), jnp.int32), cache).compile().memory_analysis()
    layer = 4096 * config.n_kv_heads * config.d_head * 4
    assert memory.temp_size_in_bytes < 4 * layer
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.keys)) * 2


@pytest.mark.parametrize("kind", [
    "int4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "fp8"))])
def test_scales_are_spread_over_devices_like_their_codes(kind):
    config = dataclasses.replace(CONFIG, kv_cache=kind)
    graphdef, params = build(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 23, (4, 6)))

    @jax.jit
    def run(params, tokens):
        model = nnx.merge(graphdef, params)
        _, cache = model.decode(tokens[:, :4], model.init_cache(4, 8))
        return model.decode(tokens[:, 4:], cache)

    want, _ = run(params, tokens)
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        got, cache = run(jax.device_put(params, shardings(params, mesh)), tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)
    for kept in (*cache.keys, *cache.values):
        local = kept.codes.sharding.shard_shape(kept.codes.shape)
        assert kept.scale.sharding.shard_shape(kept.scale.shape) == local[:-1]


def test_int4_wants_heads_of_an_even_size():
    x = jnp.zeros((1, 1, 2, 5))
    with pytest.raises(UserError, match="int4.* 5"):
        quantize_kv(x, x, "int4")
