"""Attention block by block is attention: values, gradients, and far less memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.core.sharding import make_mesh
from jaxlm.nn.attention import flash
from jaxlm.nn.attention import layer as attention
from jaxlm.nn.attention.quantized_kv import quantize_kv
from jaxlm.training.objectives.loss import make_loss
from tests.models import build

B, H, G, K = 2, 4, 2, 8


def arrays(T, S):
    random = np.random.default_rng(T + S)
    shapes = (B, T, H, K), (B, G, S, K), (B, G, S, K), (1, H, T, S)
    return random, *(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)


def plain(monkeypatch, fn, *args):
    with monkeypatch.context() as patch:
        patch.setattr(attention, "uses_flash", lambda *_: False)
        return fn(*args)


def close(left, right, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize(("kind", "T", "S"), [
    ("keys", 600, 130), ("causal", 384, 384), ("everything", 300, 300), ("nothing", 384, 256),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in [
        ("all", 256, 384), ("all", 150, 600), ("causal", 300, 300), ("everything", 384, 384),
        ("everything", 230, 290)]),
])
def test_blocks_are_attention(monkeypatch, kind, T, S):
    """Also lengths that are no whole blocks, a mask of keys only, and queries that may look at nothing."""
    random, q, k, v, bias = arrays(T, S)
    causal = np.tril(np.ones((T, S), bool))[None]
    mask = {
        "all": None, "causal": causal, "keys": random.random((B, 1, S)) < 0.7, "nothing": np.zeros((B, T, S), bool),
        "everything": causal & (random.random((B, T, S)) < 0.7) | np.eye(T, S, dtype=bool)[None],
    }[kind]
    sinks = jnp.linspace(-1.0, 2.0, H)
    wanted = (0, 1, 2, 3, 4) if kind == "everything" else (0, 1, 2)
    hidden = T == S and kind in ("causal", "everything")

    def value(how, hidden):
        def sums(q, k, v, bias, sinks):
            out = how(q, k, v, None if mask is None else jnp.asarray(mask), bias if 3 in wanted else None, scale=0.3,
                      cap=2.0 if 3 in wanted else 0.0, sinks_H=sinks if 4 in wanted else None, causal=hidden)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(sums, wanted, has_aux=True))(q, k, v, bias, sinks)

    assert flash.uses_flash(T, S)
    want = plain(monkeypatch, value, attention.attend, False)
    monkeypatch.setattr(attention, "softcap", None)  # what only the plain way uses
    close(value(attention.attend, hidden), want)


def test_float64_numpy_agrees():
    """Written out, a head at a time."""
    random, q, k, v, _ = arrays(300, 300)
    mask = np.tril(np.ones((300, 300), bool))[None] & (random.random((B, 300, 300)) < 0.8) | np.eye(300, dtype=bool)
    got = jax.jit(lambda q, k, v: attention.attend(q, k, v, jnp.asarray(mask), scale=0.5, causal=True))(q, k, v)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b in range(B):
        for h in range(H):
            weights = np.exp(0.5 * q[b, :, h] @ k[b, h // (H // G)].T) * mask[b]
            want = weights / weights.sum(-1, keepdims=True) @ v[b, h // (H // G)]
            np.testing.assert_allclose(got[b, :, h], want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", [
    pytest.param("int8", marks=pytest.mark.slow), "int4", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_rounded_cache_is_read_by_blocks(monkeypatch, kind):
    _, q, k, v, _ = arrays(256, 320)
    kept = quantize_kv(k, v, kind)
    mask = jnp.asarray(np.tril(np.ones((256, 320), bool), 64))[None]
    read = jax.jit(lambda: attention.attend(q, *kept, mask, scale=0.3))
    want = plain(monkeypatch, jax.jit(lambda: attention.attend(q, *kept, mask, scale=0.3)))
    close(read(), want)


@pytest.mark.parametrize("config", [
    nn.DecoderConfig(vocab_size=32, width=16, heads=4, kv_heads=2, ffn=32, layers=2, windows=(0, 50), remat="dots",
                     attention_softcap=4.0, rope_local_theta=100.0),
    pytest.param(
        nn.preset("tiny", vocab_size=32, width=16, heads=4, ffn=32, encoder_layers=1, decoder_layers=1, dropout=0.0,
                  positions="relative", qkv_bias=False),  # the gradient of a bias of keys is zero but for rounding
        marks=pytest.mark.slow),
], ids=lambda config: config.kind)
def test_training_on_a_mesh_goes_by_blocks(monkeypatch, config):
    """Loss and gradients of long packed rows, of one device's plain attention and of eight devices' blocks."""
    graphdef, params = build(config)
    random, (rows, length) = np.random.default_rng(0), (8, 288)
    batch = {name: jnp.asarray(random.integers(3, 32, (rows, length)), jnp.int32) for name in ("inputs", "targets")}
    batch["weights"] = jnp.ones((rows, length))
    if config.kind == "seq2seq":
        batch["src"] = batch["inputs"][:, ::-1].at[:, 240:].set(0)
    else:
        batch["segment_ids"] = jnp.asarray(1 + (np.arange(length) > 100) * np.ones((rows, 1)), jnp.int32)
    loss = make_loss(config)

    def value():
        return jax.jit(jax.value_and_grad(lambda params: loss(nnx.merge(graphdef, params), batch, None)[0]))(params)

    want = plain(monkeypatch, value)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        close(value(), want, 1e-4)


def test_memory_does_not_grow_with_the_square_of_the_length():
    def temporaries(T):
        q, k, v, _ = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(T, T)[1:])

        def loss(q, k, v):
            return jnp.sum(attention.attend(q, k, v, None, scale=1.0, causal=False) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(512), temporaries(2048)
    assert long < 6 * short  # 16 times, were it the square
    assert long < B * H * 2048 * 2048 * 4 / 10


def test_where_there_is_one_block_it_is_plain():
    assert not flash.uses_flash(128, 128) and not flash.uses_flash(1, 10**6) and not flash.uses_flash(64, 4096)
    assert not flash.uses_flash(256, 256) and flash.uses_flash(128, 640) and flash.uses_flash(2048, 2048)
