"""Rotated models compute what they did, in a basis without outliers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import nn
from jaxlm.compression.names import parse
from jaxlm.compression.quantize.rotate import fuse_norms, hadamard, rotate
from jaxlm.compression.residual_stream import learned_positions, role
from jaxlm.core.errors import UserError
from jaxlm.core.tree import flatten, map_params
from jaxlm.nn.positions import sinusoids
from tests.compression.models import assert_whole, logits, make, some
from tests.models import build


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 28, 36, 44, 64, 96, 256, 704, 768])
def test_hadamard_matrices(n):
    h = hadamard(n)
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(np.abs(h), n**-0.5, rtol=1e-12)


@pytest.mark.parametrize("n,block", [(6, 2), (18, 2), (22, 2), (7, 1), (92 * 3, 4)])
def test_where_no_construction_is_known_there_are_blocks(n, block):
    h = hadamard(n)
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-12)
    assert (h != 0).sum() >= n * block


REFUSED = {"post-norm": "post", "olmo2": "output", "gemma3": "sandwich", "seq2seq-unequal": "sandwich"}
ROTATED = some("qwen3-moe", "seq2seq-pre-norm",
               slow="gpt2 untied gemma neox no-bias-norm seq2seq-relative seq2seq-rotary")


@pytest.mark.parametrize("name", ROTATED)
def test_the_logits_stay_as_they_were(name):
    config, params = make(name)
    new_config, new = rotate(config, params, jax.random.key(3))
    assert_whole(new_config, new)
    want, got = logits(config, params), logits(new_config, new)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()) + 2e-5)
    for path, leaf in flatten(new).items():
        assert not role(path) == "norm" or (leaf == 1).all()
    assert new_config.norm == "rmsnorm" and not new_config.tie_embeddings


@pytest.mark.parametrize("name,changes", [
    ("olmo", dict(clip_qkv=0.0)), pytest.param("cohere", dict(qk_norm="none"), marks=pytest.mark.slow),
])
def test_norms_without_scales_get_some_and_shared_norms_are_fused_into_all_that_read_them(name, changes):
    config, params = make(name, **changes)
    new_config, new = rotate(config, params, jax.random.key(3))
    assert_whole(new_config, new)
    want = logits(config, params)
    np.testing.assert_allclose(logits(new_config, new), want, atol=1e-5 * float(jnp.abs(want).max()) + 2e-5)


@pytest.mark.parametrize("name", some("gpt2", slow="mixtral"))
def test_norms_are_fused_in_the_basis_that_there_is(name):
    config, params = make(name)
    new_config, new = fuse_norms(config, params)
    assert_whole(new_config, new)
    np.testing.assert_allclose(logits(new_config, new), logits(config, params), atol=5e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_norms_that_write_to_the_stream_are_refused(name):
    config, params = make(name)
    with pytest.raises(UserError, match=REFUSED[name]):
        rotate(config, params, jax.random.key(0))


def test_what_else_cannot_be_rotated_is_refused():
    for changes, reason in (
        (dict(norm="layernorm", qk_norm="head"), "queries and keys"),
        (dict(norm="layernorm", experts=4), "experts have no biases"),
        (dict(embed_norm=True), "after the embedding"),
        (dict(clip_qkv=1.0), "clip_qkv"),
    ):
        config, params = make("llama", **changes)
        with pytest.raises(UserError, match=reason):
            rotate(config, params, jax.random.key(0))
    config, params = make("llama")
    with pytest.raises(UserError, match="comes before other compression"):
        rotate(config, parse("w8a8-dynamic").apply(params), jax.random.key(0))
    config = nn.LSTMConfig(vocab_size=20, width=16)
    with pytest.raises(UserError, match="recurrent"):
        rotate(config, build(config)[1], jax.random.key(0))


@pytest.mark.parametrize("name", some("gpt2", slow="llama"))
def test_one_number_before_the_head_leaves_the_embeddings_tied(name):
    config, params = make(name)
    params = map_params(lambda path, leaf: 0 * leaf + 1.5 if path.endswith("final_norm/scale") else leaf, params)
    new_config, new = rotate(config, params, jax.random.key(0))
    assert new_config.tie_embeddings and "head/kernel" not in flatten(new)
    np.testing.assert_allclose(logits(new_config, new), logits(config, params), atol=2e-4)


def test_outliers_vanish():
    """What it is for: a stream with a channel a hundred times the others is flat afterwards, and rounds better."""
    config, params = make("llama", width=64, layers=1)

    def spike(path, leaf):
        return leaf.at[:, 5].multiply(100) if path == "embed/table" else leaf

    params = map_params(spike, params)
    new_config, new = rotate(config, params, jax.random.key(0))
    before, after = (flatten(each)["embed/table"] for each in (params, new))
    np.testing.assert_allclose(logits(new_config, new), logits(config, params), atol=1e-3)
    assert jnp.abs(before).max() > 5 * jnp.sqrt(jnp.mean(before**2)) > 0
    assert jnp.abs(after).max() < 5 * jnp.sqrt(jnp.mean(after**2))
    assert not np.allclose(flatten(rotate(config, params, jax.random.key(1))[1])["embed/table"], after)


@pytest.mark.parametrize("kind", ["sinusoidal", pytest.param("sinusoidal_t2t", marks=pytest.mark.slow)])
def test_learned_positions_are_the_sinusoids(kind):
    config, params = make("gpt2", positions=kind)
    new_config, new = learned_positions(config, params)
    rows = jnp.arange(config.max_positions + config.position_offset)[None]
    np.testing.assert_allclose(flatten(new)["decoder/pos/table"], sinusoids(rows, config)[0], atol=2e-5)
    np.testing.assert_allclose(logits(new_config, new), logits(config, params), atol=1e-4)
    assert dataclasses.replace(new_config, positions=kind) == config
