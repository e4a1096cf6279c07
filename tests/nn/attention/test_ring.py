"""Attention over sequences split over devices: a ring of parts is the whole, values and gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.core.sharding import make_mesh
from jaxlm.core.tree import flatten
from jaxlm.nn.attention.layer import attend
from jaxlm.nn.attention.masks import MaskSpec
from jaxlm.nn.attention.ring import ring_attend, uses_ring
from jaxlm.training.objectives.loss import make_loss
from tests.models import build

B, T, S, H, G, K = 2, 16, 24, 4, 2, 8
DECODER = nn.DecoderConfig(
    vocab_size=32, width=16, heads=4, kv_heads=2, ffn=32, layers=2, windows=(0, 5), attention_softcap=4.0,
    rope_local_theta=100.0, remat="full",
)
SEQ2SEQ = nn.preset("tiny", vocab_size=32, width=16, heads=4, ffn=32, encoder_layers=1, decoder_layers=1, dropout=0.0,
                    positions="relative")


def arrays(seed=0):
    random = np.random.default_rng(seed)
    q, k, v, bias = (jnp.asarray(random.normal(size=shape), jnp.float32)
                     for shape in ((B, T, H, K), (B, G, S, K), (B, G, S, K), (1, H, T, S)))
    return random, q, k, v, bias


def close(left, right, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("kind", [
    "all", "everything", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("causal", "packed"))])
def test_a_ring_is_attention(kind):
    random, q, k, v, bias = arrays()
    slots = jnp.arange(T)[None], jnp.arange(S)[None]
    segment_ids = [jnp.asarray(random.integers(0, 3, (B, n))) for n in (T, S)]
    real = jnp.asarray(random.random((B, S)) < 0.7).at[0].set(False)  # a row that may look at nothing
    mask_spec = {
        "all": MaskSpec(*slots),
        "causal": MaskSpec(*slots, causal=True),
        "packed": MaskSpec(*slots, *segment_ids, real),
        "everything": MaskSpec(*slots, *segment_ids, real, window=jnp.array(5), causal=True),
    }[kind]
    if kind != "everything":
        bias = None
    sinks = None if bias is None else jnp.linspace(-1.0, 2.0, q.shape[2])

    def value(how):
        def sums(q, k, v, bias, sinks):
            return jnp.sum(jnp.sin(how(q, k, v, bias=bias, sinks_H=sinks)))

        return jax.jit(jax.value_and_grad(sums, (0, 1, 2) if bias is None else (0, 1, 2, 3, 4)))(q, k, v, bias, sinks)

    want = value(lambda q, k, v, bias, sinks_H: attend(
        q, k, v, mask_spec.mask(), bias, scale=0.3, cap=2.0, sinks_H=sinks_H))
    with jax.set_mesh(make_mesh(data=1, sequence=4, tensor=2)):
        close(value(lambda q, k, v, bias, sinks_H: ring_attend(
            q, k, v, mask_spec, bias, scale=0.3, cap=2.0, sinks_H=sinks_H)), want)


def test_what_goes_around():
    config = nn.DecoderConfig(ring_min_keys=64)
    assert not uses_ring(config, 64, 64)  # no mesh
    with jax.set_mesh(make_mesh(data=1, sequence=8)):
        assert uses_ring(config, 64, 64)
        assert not uses_ring(config, 32, 32)
        assert not uses_ring(config, 1, 64)  # decoding
        assert not uses_ring(config, 68, 68)
        assert not uses_ring(dataclasses.replace(config, attention_dropout=0.1), 64, 64)
    with jax.set_mesh(make_mesh(data=8)):
        assert not uses_ring(config, 64, 64)


def batch_of(config):
    random = np.random.default_rng(0)
    batch = {name: jnp.asarray(random.integers(3, 32, (4, T))) for name in ("inputs", "targets")}
    batch["weights"] = jnp.asarray(random.random((4, T)) < 0.8, jnp.float32)
    if config.kind == "seq2seq":
        return batch | {"src": jnp.asarray(random.integers(0, 6, (4, S)))}  # 0 is padding
    segment_ids = jnp.asarray(np.sort(random.integers(0, 3, (4, T)), -1))
    starts = jnp.argmax(segment_ids[:, :, None] == segment_ids[:, None, :], -1)
    return batch | {"segment_ids": segment_ids, "positions": jnp.arange(T) - starts}


def loss_of(config):
    graphdef = nn.abstract(config)[0]
    return lambda params, batch: make_loss(config)(nnx.merge(graphdef, params), batch, None)[0]


@functools.cache
def on_one_device(config):
    params = build(config)[1]
    return jax.jit(jax.value_and_grad(loss_of(config)))(params, batch_of(config))


@pytest.mark.parametrize("ring_min_keys", [1, 10**6], ids=["ring", "gather"])
@pytest.mark.parametrize(
    "config", [DECODER, pytest.param(SEQ2SEQ, marks=pytest.mark.slow)], ids=lambda config: config.kind
)
def test_models_on_split_sequences(config, ring_min_keys):
    """Packed documents, windows, rotary and relative positions, padding, cross-attention: gradients of one device. In
    the compiled program of a ring nothing is gathered that has all keys of a layer."""
    params, batch = build(config)[1], batch_of(config)
    want = on_one_device(config)
    ringed = dataclasses.replace(config, ring_min_keys=ring_min_keys)
    with jax.set_mesh(make_mesh(data=2, sequence=4)):
        compiled = jax.jit(jax.value_and_grad(loss_of(ringed))).lower(params, batch).compile()
        got = compiled(params, batch)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for path, leaf in flatten(want[1]).items():
        np.testing.assert_allclose(flatten(got[1])[path], leaf, rtol=1e-4, atol=2e-5, err_msg=path)
    assert ("collective-permute" in compiled.as_text()) == (ring_min_keys == 1)
