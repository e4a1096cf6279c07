"""A narrower model equals the wide one in which the channels that went are zero."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression.prune.heads import prune_heads
from jaxlm.compression.prune.width import prune_width
from jaxlm.compression.residual_stream import input_norm, learned_positions, role
from jaxlm.core.errors import UserError
from jaxlm.core.tree import flatten, map_params
from jaxlm.hf.writer import to_hf_config
from tests.compression.models import assert_whole, logits, make, some

EXACT = some("gemma3", "seq2seq-pre-norm", "olmo",
             slow="cohere llama gpt2 untied post-norm gemma olmo2 neox qwen3-moe seq2seq-post-norm seq2seq-relative")
GONE = np.array([1, 6, 7, 13])


def silence(config, params, channels):
    """The model with channels of its stream zero; the others have a mean of zero where a norm takes it out, so that
    the zeros stay zero through it."""
    kept = np.setdiff1d(np.arange(config.width), channels)

    def of(path, leaf):
        kind, out = role(path), np.array(leaf)
        if kind in ("table", "writer"):
            out[..., channels] = 0
            if config.norm == "layernorm":
                out[..., kept] -= out[..., kept].mean(-1, keepdims=True)
        if kind == "norm" and path.endswith("/bias"):
            out[..., channels] = 0
        return jnp.asarray(out)

    return map_params(of, params)


@pytest.mark.parametrize("name", EXACT)
def test_channels_of_zeros_go_and_nothing_changes(name):
    config, params = learned_positions(*make(name))
    if config.norm == "layernorm" and config.norm_position == "post":  # norms of other scales write what has a mean
        norms = {path: leaf for path, leaf in flatten(params).items() if role(path) == "norm"}
        plain = {path: 0 * leaf + path.endswith("scale") for path, leaf in norms.items()}
        params = map_params(lambda path, leaf: plain.get(path, leaf), params)
    params = silence(config, params, GONE)
    new_config, new = prune_width(config, params, 0.25)
    assert_whole(new_config, new)
    assert new_config.width == 12 and new_config.d_head == config.d_head and new_config.d_ffn == config.d_ffn
    want = logits(config, params)
    np.testing.assert_allclose(logits(new_config, new), want, atol=5e-5 * float(jnp.abs(want).max() + 1))


def test_biases_take_up_what_a_norm_gave_through_its_bias():
    config, params = make("gpt2", logits_bias=True, tie_embeddings=False)
    biases = {path: leaf for path, leaf in flatten(params).items() if path.endswith("_norm/bias")}
    params = silence(config, params, GONE)
    params = map_params(lambda path, leaf: biases.get(path, leaf), params)
    new_config, new = prune_width(config, params, 0.25)
    want = logits(config, params)
    np.testing.assert_allclose(logits(new_config, new), want, atol=5e-5 * float(jnp.abs(want).max() + 1))


def test_statistics_say_which_channels_matter():
    config, params = make("llama", tie_embeddings=False)
    readers = {path: leaf for path, leaf in flatten(params).items() if role(path) == "reader"}
    square = np.where(np.isin(np.arange(16), GONE), 1e-6, 1.0)
    data = {path: np.broadcast_to(square, leaf.shape[:-1]) for path, leaf in readers.items()}
    grams = {path: each[..., None] * np.eye(16) for path, each in data.items()}
    for given in ({"mean_squares": data}, {"grams": grams}):
        new = flatten(prune_width(config, params, 0.25, **given)[1])
        kept = np.setdiff1d(np.arange(16), GONE)
        np.testing.assert_allclose(new["embed/table"], flatten(params)["embed/table"][:, kept] * 0.75**0.5, rtol=1e-5)


def test_kernels_are_solved_anew_where_there_are_gram_matrices():
    config, params = make("llama", layers=1)
    path = "decoder/layers/0/mlp/up/kernel"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 16))  # six dimensions: twelve channels tell all sixteen
    new_config, new = prune_width(config, params, 0.25, grams={path: (x.T @ x / 200)[None]}, damping=1e-9)
    assert input_norm(config, path) == "decoder/layers/0/mlp_norm"
    # Which went is read from the table; what the norm's scale became is undone.
    table, small = (flatten(each)["embed/table"] for each in (params, new))
    kept = [int(np.argmin(np.abs(table * 0.75**0.5 - column[:, None]).sum(0))) for column in small.T]
    np.testing.assert_allclose(x[:, kept] @ flatten(new)[path][0], x @ flatten(params)[path][0], atol=1e-3)


def test_a_narrower_gpt2_with_fewer_heads_is_a_gpt2():
    config, params = make("gpt2", position_offset=0)
    config, params = prune_width(*prune_heads(config, params, 0.25), 0.25, multiple=4)
    assert_whole(config, params)
    assert to_hf_config(config, "gpt2")["n_embd"] == 12
    with pytest.raises(UserError, match="cannot be written as gpt2"):
        to_hf_config(prune_width(config, params, 0.3, multiple=4)[0], "gpt2")
