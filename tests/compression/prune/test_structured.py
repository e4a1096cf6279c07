"""Pruned models equal the dense ones whose pruned units are zero, and give their outputs back as nearly as they can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import nn
from jaxlm.compression.names import parse
from jaxlm.compression.prune.depth import block_influence, drop_layers, layers_to_drop
from jaxlm.compression.prune.feed_forward import prune_experts, prune_ffn
from jaxlm.compression.prune.heads import prune_heads
from jaxlm.compression.prune.units import refit, remaining
from jaxlm.core.errors import UserError
from jaxlm.core.tree import flatten, map_params
from jaxlm.hf.directory import read_model, write_model
from jaxlm.hf.writer import simplest_hf_config, to_hf_config
from tests.compression.models import assert_whole, logits, make, some
from tests.models import build


def zeroed(params, pattern_axis_units):
    """The parameters with some units zero: {end of path: (axis, [L, units] or [units])}."""

    def of(path, leaf):
        for end, (axis, units) in pattern_axis_units.items():
            if path.endswith(end):
                out = np.array(leaf)
                for layer, row in enumerate(np.broadcast_to(units, (len(out), np.shape(units)[-1]))):
                    np.moveaxis(out[layer], axis, 0)[row] = 0
                return jnp.asarray(out)
        return leaf

    return map_params(of, params)


def same_logits(before, after, atol=5e-5):
    want = logits(*before)
    np.testing.assert_allclose(logits(*after), want, atol=atol * float(np.abs(want).max() + 1))


# Heads ----------------------------------------------------------------------------------------------------------------


def features(heads, size):
    return (np.asarray(heads)[..., None] * size + np.arange(size)).reshape(*np.shape(heads)[:-1], -1)


@pytest.mark.parametrize("name", some("gpt2", "olmo2", "cohere", slow="llama gemma seq2seq-post-norm seq2seq-relative"))
def test_heads_of_zeros_go_and_nothing_changes(name):
    config, params = make(name)
    size, groups = config.d_head, config.n_kv_heads
    ratio = config.heads // groups
    count = groups // 2
    rng = np.random.default_rng(5)
    gone = np.stack([rng.permutation(groups)[:count] for _ in range(6)])
    if config.positions == "relative":
        gone[:] = gone[0]
    query = (gone[..., None] * ratio + np.arange(ratio)).reshape(6, -1)

    def of(path, leaf):
        axis, heads = {
            "o/kernel": (-2, query), "v/kernel": (-1, gone), "v/bias": (-1, gone)
        }.get("/".join(path.split("/")[-2:]), (None, None))
        if config.qk_norm == "width" and path.endswith(("/q/kernel", "/k/kernel")):  # else they count in the norm
            axis, heads = -1, query if path.endswith("/q/kernel") else gone
        if axis is None:
            return leaf
        start = 3 * path.startswith("encoder")
        keep = np.ones(leaf.shape, bool)
        for layer in range(len(leaf)):
            np.moveaxis(keep[layer], axis, 0)[features(heads[start + layer], size)] = False
        return jnp.asarray(np.where(keep, leaf, 0))

    params = map_params(of, params)
    new_config, new = prune_heads(config, params, count / groups)
    assert_whole(new_config, new)
    assert (new_config.heads, new_config.n_kv_heads) == (config.heads - count * ratio, groups - count)
    same_logits((config, params), (new_config, new))


@pytest.mark.parametrize("name", some("llama", slow="qwen3-moe"))
def test_query_heads_go_evenly(name):
    config, params = make(name, heads=6, kv_heads=2, head_dim=4)
    gone = np.array([[0, 5], [2, 4], [1, 3]])  # one of each group of three
    scale = np.ones((3, 6, 4), np.float32)
    for layer, heads in enumerate(gone):
        scale[layer, heads] = 0
    # Two layers or layer groups of them: the same rows.
    ends = iter(scale.reshape(3, 24, 1))
    params = map_params(
        lambda path, leaf: leaf * np.stack([next(ends) for _ in leaf]) if path.endswith("/o/kernel") else leaf, params
    )
    new_config, new = prune_heads(config, params, 1 / 3, by="query")
    assert_whole(new_config, new)
    assert (new_config.heads, new_config.kv_heads, new_config.d_head) == (4, 2, 4)
    same_logits((config, params), (new_config, new))


def test_which_heads_go_follows_the_data_where_there_is_any():
    config, params = make("llama", layers=1)
    path = "decoder/layers/0/attn/o/kernel"
    weights = flatten(params)
    v, o = weights["decoder/layers/0/attn/v/kernel"][0], weights[path][0]
    sizes = [sum(float(jnp.square(v[:, g * 4 : g * 4 + 4] @ o[h * 4 : h * 4 + 4]).sum()) for h in (2 * g, 2 * g + 1))
             for g in (0, 1)]
    kept = int(np.argmax(sizes))
    got = flatten(prune_heads(config, params, 0.5)[1])
    np.testing.assert_array_equal(got[path][0], o[kept * 8 : kept * 8 + 8])
    np.testing.assert_array_equal(got["decoder/layers/0/attn/v/kernel"][0], v[:, kept * 4 : kept * 4 + 4])
    square = np.where(np.arange(16) // 8 == kept, 1e-3, 1.0)[None]
    for data in ({"mean_squares": {path: square}}, {"grams": {path: np.eye(16)[None] * square[..., None]}}):
        got = flatten(prune_heads(config, params, 0.5, **data)[1])
        np.testing.assert_allclose(got[path][0], o[(1 - kept) * 8 : (1 - kept) * 8 + 8], rtol=1e-6)
    with pytest.raises(UserError, match="decoder/layers/0/attn/o/kernel"):
        prune_heads(config, params, 0.5, mean_squares={})


# Feed-forward channels and experts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some("gpt2", "qwen3-moe", slow="llama seq2seq-unequal"))
def test_channels_of_zeros_go_and_nothing_changes(name):
    config, params = make(name)
    rng = np.random.default_rng(5)

    def of(path, leaf):
        if not path.endswith("/down/kernel"):
            return leaf
        keep = np.ones(leaf.shape[:-1], bool).reshape(-1, leaf.shape[-2])
        for row in keep:
            row[rng.permutation(len(row))[: len(row) // 4]] = False
        return jnp.asarray(np.array(leaf) * keep.reshape(*leaf.shape[:-1], 1))

    params = map_params(of, params)
    new_config, new = prune_ffn(config, params, 0.25)
    assert_whole(new_config, new)
    assert new_config.d_ffn == config.d_ffn * 3 // 4 and new_config.d_expert == config.d_expert * 3 // 4
    same_logits((config, params), (new_config, new))


def test_what_is_left_is_a_multiple():
    config, params = make("llama", ffn=40)
    assert prune_ffn(config, params, 0.3)[0].ffn == 28
    assert prune_ffn(config, params, 0.35, multiple=8)[0].ffn == 24
    assert remaining(704, 0.3, "channels", 16) == 496


@pytest.mark.parametrize("biased", [False, True])
def test_the_refit_is_least_squares(biased):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 300, 10)) @ rng.normal(size=(10, 10)) + 3
    w, b = rng.normal(size=(2, 10, 7)), rng.normal(size=(2, 7))
    kept = np.array([[0, 3, 4, 7, 9], [1, 2, 5, 6, 8]])
    gram, mean = x.swapaxes(1, 2) @ x / 300, x.mean(1)
    bias = jnp.asarray(b, jnp.float32) if biased else None
    rows, shift = refit(jnp.asarray(w, jnp.float32), bias, jnp.asarray(kept), mean, gram, 0.0)
    for i in range(2):
        inputs = x[i][:, kept[i]]
        inputs = np.concatenate([inputs, np.ones((300, 1))], 1) if biased else inputs
        want = np.linalg.lstsq(inputs, x[i] @ w[i] + (b[i] if biased else 0), rcond=None)[0]
        np.testing.assert_allclose(rows[i], want[:5], rtol=1e-4, atol=1e-4)
        if biased:
            np.testing.assert_allclose(shift[i], want[5], rtol=1e-4, atol=1e-3)
    if biased:  # FLAP: the mean alone
        rows, shift = refit(jnp.asarray(w, jnp.float32), bias, jnp.asarray(kept), mean, None, 0.0)
        for i in range(2):
            gone = np.setdiff1d(np.arange(10), kept[i])
            np.testing.assert_allclose(shift[i], b[i] + mean[i, gone] @ w[i, gone], rtol=1e-5)
            np.testing.assert_array_equal(rows[i], w[i, kept[i]].astype(np.float32))


def test_constant_channels_go_into_the_bias():
    """With means, what does not vary is worth nothing, and the model stays as it was."""
    config, params = make("gpt2")
    gone = np.array([3, 8, 20, 21, 11, 2])
    params = zeroed(params, {"up/kernel": (-1, gone)})  # constant by their biases
    gelu = flatten(params)["decoder/layers/0/mlp/up/bias"]
    constant = jax.nn.gelu(gelu, approximate=True)
    path = "decoder/layers/0/mlp/down/kernel"
    square = jnp.where(jnp.zeros(24).at[gone].set(1) > 0, constant**2, 1.0 + constant**2)
    new_config, new = prune_ffn(config, params, 0.25, mean_squares={path: square}, means={path: constant})
    assert_whole(new_config, new)
    same_logits((config, params), (new_config, new))


def test_experts_that_no_token_goes_to_go():
    config, params = make("mixtral", layers=2)

    def of(path, leaf):
        if path == "embed/table":
            return leaf.at[:, 0].set(40.0)  # positive after every norm
        if path.endswith(("/mlp_norm/scale", "/attn_norm/scale")):
            return jnp.abs(leaf) + 0.5
        if path.endswith(("/o/kernel", "/down/kernel")):
            return leaf.at[..., 0].set(0.0)
        return leaf.at[:, 0, jnp.array([1, 3])].set(-1e4) if path.endswith("/router/kernel") else leaf

    params = map_params(of, params)
    router = "decoder/layers/0/mlp/router/kernel"
    loads = {router: jnp.array([[0.4, 0, 0.3, 0, 0.3]] * 2)}
    new_config, new = prune_experts(config, params, 0.4, loads=loads)
    assert_whole(new_config, new)
    assert new_config.experts == 3
    same_logits((config, params), (new_config, new))
    down = "decoder/layers/0/mlp/experts/down/kernel"
    square = jnp.ones((2, 5, 12)).at[0, 2].set(0).at[1, 4].set(0)
    new = flatten(prune_experts(config, params, 0.2, mean_squares={down: square})[1])
    for layer, gone in ((0, 2), (1, 4)):
        np.testing.assert_array_equal(new[down][layer], np.delete(flatten(params)[down][layer], gone, 0))
    with pytest.raises(UserError, match="1 experts .* 2"):
        prune_experts(config, params, 0.8)


# Layers ---------------------------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name,side,layers", [
    ("gemma3", "decoder", [0, 2]), ("cohere", "decoder", [0]), ("seq2seq-pre-norm", "decoder", [0, 2]),
    pytest.param("llama", "decoder", [1], marks=SLOW), pytest.param("gemma", "decoder", [0], marks=SLOW),
    pytest.param("qwen3-moe", "decoder", [1], marks=SLOW), pytest.param("qwen3-moe", "decoder", [0], marks=SLOW),
    pytest.param("seq2seq-rotary", "encoder", [0], marks=SLOW),
])
def test_layers_that_add_nothing_go_and_nothing_changes(name, side, layers):
    config, params = make(name)
    starts, last = {}, 0
    for path, leaf in flatten(params).items():
        if path.startswith(f"{side}/layers/") and (layer_group := path.split("/")[2]) not in starts:
            starts[layer_group] = last
            last += len(leaf)

    def of(path, leaf):
        ends = ("_out_norm/scale", "_out_norm/bias", "/o/kernel", "/o/bias", "/down/kernel", "/down/bias")
        if not path.startswith(f"{side}/layers/") or not path.endswith(ends):
            return leaf
        here = np.isin(starts[path.split("/")[2]] + np.arange(len(leaf)), layers)
        return jnp.asarray(np.array(leaf) * ~here.reshape(-1, *[1] * (leaf.ndim - 1)))

    params = map_params(of, params)
    new_config, new = drop_layers(config, params, layers, side=side)
    assert_whole(new_config, new)
    same_logits((config, params), (new_config, new))


def test_which_layers():
    assert layers_to_drop(7, 3) == (1, 3, 5)
    assert layers_to_drop(3, 2) == (1, 2)
    assert layers_to_drop(12, 3) and not {0, 11} & set(layers_to_drop(12, 3))
    assert layers_to_drop(4, 2, [0.4, 0.1, 0.3, 0.2]) == (1, 3)
    x = np.random.default_rng(0).normal(size=(2, 5, 8))
    y = x + np.random.default_rng(1).normal(size=x.shape)
    cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    np.testing.assert_allclose(block_influence(jnp.asarray(x), jnp.asarray(y)), 1 - cosines.mean(), rtol=1e-5)
    np.testing.assert_allclose(block_influence(jnp.asarray(x), 3 * jnp.asarray(x)), 0, atol=1e-6)


# All of them ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused():
    config, params = make("llama")
    for call, reason in (
        (lambda: prune_heads(config, params, 0.1), "pruning 10% of 2 key/value heads leaves 2"),
        (lambda: prune_heads(config, params, 1.0), "more than 0% and less than 100%"),
        (lambda: prune_ffn(config, params, 0.99), "leaves 0"),
        (lambda: prune_ffn(config, parse("w8a8-dynamic").apply(params), 0.5), "comes before other compression"),
        (lambda: prune_experts(config, params, 0.5), "no experts"),
        (lambda: drop_layers(config, params, [3]), "layers 0 to 2"),
        (lambda: drop_layers(config, params, [0, 1, 2]), "layers 0 to 2"),
        (lambda: layers_to_drop(3, 3), "use 1 to 2"),
        (lambda: layers_to_drop(3, 1, [0.0]), "3 layers and 1 influences"),
        (lambda: prune_heads(*make("seq2seq-unequal"), 0.5), "of the encoder"),
        (lambda: drop_layers(*make("seq2seq-pre-norm", windows=(3, 0)), [0]), "different windows"),
    ):
        with pytest.raises(UserError, match=reason):
            call()
    config = nn.LSTMConfig(vocab_size=20, width=16)
    with pytest.raises(UserError, match="recurrent"):
        prune_ffn(config, build(config)[1], 0.5)


@pytest.mark.parametrize("name,kind", [
    ("llama", "llama"), pytest.param("gpt2", "gpt2", marks=SLOW), ("seq2seq-pre-norm", "m2m_100")
])
def test_pruned_models_are_saved_as_those_of_their_family(tmp_path, name, kind):
    config, params = make(name, **({"position_offset": 0} if name == "gpt2" else {}))
    config, params = drop_layers(*prune_ffn(config, params, 0.25), [1])
    if kind == "llama":
        config, params = prune_heads(config, params, 0.5)
    assert to_hf_config(config, kind) and simplest_hf_config(config, exact=False)
    write_model(tmp_path / "model", config, params, None)
    back_config, back, _, _ = read_model(tmp_path / "model")
    assert (back_config.d_ffn, back_config.heads, back_config.d_head) == (config.ffn, config.heads, config.d_head)
    same_logits((config, params), (back_config, back), atol=1e-6)
