"""A cache in pages against the whole sequence at once, however it is cut; and in place."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.nn.attention.layer import attend
from jaxlm.nn.attention.masks import MaskSpec, causal_mask, window_mask
from jaxlm.nn.attention.paged import LayerPages, PagedCache, _attend_rows
from tests import models

MODELS = {
    "local": {"windows": (4, 0), "rope_local_theta": 300.0, "attention_softcap": 4.0},
    "relative": {"positions": "relative", "scan_layers": False},
    "int4": {"kv_cache": "int4"},
}


def build(**changes):
    options = {"vocab_size": 23, "width": 32, "heads": 4, "kv_heads": 2, "ffn": 24, "layers": 3} | changes
    graphdef, params = models.build(nn.DecoderConfig(**options))
    return graphdef, jax.tree.map(lambda x: x * 3, params)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name == "relative" else name for name in MODELS])
def test_rows_that_grow_apart_see_what_a_full_pass_sees(name):
    graphdef, params = build(**MODELS[name])
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 23, (3, 30))
    want = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens))(params)
    pool = nnx.merge(graphdef, params).init_pages(26, 4)
    table = rng.permutation(np.arange(1, 26))[:24].reshape(3, 8)
    table[2] = 0  # a row of nothing

    @jax.jit
    def step(params, pool, tokens, index, real):
        logits, cache = nnx.merge(graphdef, params).decode(tokens, PagedCache(pool, table, index, real))
        return logits, cache.pool

    done = np.zeros(3, np.int32)
    for counts in [(13, 7, 0), (0, 16, 0), (16, 1, 0), (1, 1, 0)]:
        real = np.arange(16) < np.array(counts)[:, None]
        new = np.zeros((3, 16), np.int32)
        for row, count in enumerate(counts):
            new[row, :count] = tokens[row, done[row] : done[row] + count]
        logits, pool = step(params, pool, new, done, real)
        for row, count in enumerate(counts):
            np.testing.assert_allclose(
                logits[row, :count], want[row, done[row] : done[row] + count], atol=1e-4, rtol=1e-4
            )
        assert np.isfinite(logits).all()
        done += np.array(counts, np.int32)


@pytest.mark.parametrize(("queries", "window"), [
    (1, 5), (6, None), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1, None), (6, 5)])])
def test_rows_together_and_rows_in_turn_are_one(queries, window):
    """What accelerators do is what CPUs do, and plain attention."""
    rng = np.random.default_rng(0)
    pool = jnp.asarray(rng.normal(size=(2, 2, 40, 4, 2, 8)), jnp.float32)  # keys and values of two layers
    table = rng.permutation(np.arange(1, 40))[:30].reshape(3, 10)
    first = np.array([0, 17, 34 - queries])
    slots = first[:, None] + np.arange(queries)
    past = LayerPages(pool[0], pool[1], jnp.int32(1), table, None, None, slots[:, -1] + 1)
    mask_spec = MaskSpec(slots, np.arange(40)[None], window=window)
    q = jnp.asarray(rng.normal(size=(3, queries, 4, 8)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=(3, 4, queries, 40)), jnp.float32)
    k, v = (x[1][table].reshape(3, 40, 2, 8).swapaxes(1, 2) for x in pool)
    mask = causal_mask(slots, np.arange(40)[None])
    mask = mask if window is None else mask & window_mask(slots, np.arange(40)[None], window)
    sinks = None if window is None else jnp.linspace(-1.0, 2.0, 4)
    want = jax.jit(lambda q: attend(q, k, v, mask, bias, scale=0.3, cap=2.0, sinks_H=sinks))(q)
    for one_by_one in (True, False):
        attend_rows = partial(_attend_rows, one_by_one=one_by_one)
        got = jax.jit(
            lambda q, bias, attend_rows=attend_rows: attend_rows(q, past, mask_spec, bias, sinks, 0.3, 2.0)
        )(q, bias)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "int8"])
def test_a_step_writes_in_place(kind):
    """It needs room for the page it looks at, and not for the pool, nor for the pages of its rows."""
    graphdef, _ = nn.abstract(nn.DecoderConfig(
        vocab_size=23, width=32, heads=4, kv_heads=2, ffn=24, layers=16, kv_cache=kind,
    ))
    params = nn.abstract(nn.DecoderConfig(vocab_size=23, width=32, heads=4, kv_heads=2, ffn=24, layers=16))[1]
    pool = jax.eval_shape(lambda p: nnx.merge(graphdef, p).init_pages(1000, 16), params)
    like = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 1), (4, 128), (4,))]
    real = jax.ShapeDtypeStruct((4, 1), bool)

    def step(params, pool, tokens, table, index, real):
        logits, cache = nnx.merge(graphdef, params).decode(tokens, PagedCache(pool, table, index, real))
        return logits, cache.pool

    compiled = jax.jit(step, donate_argnums=1).lower(params, pool, *like, real).compile()
    memory = compiled.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool))
    assert memory.alias_size_in_bytes >= held
    rows = 4 * 128 * 16 * 2 * 8 * 4  # bytes of the rows' keys in a layer
    assert memory.temp_size_in_bytes < rows / 4
