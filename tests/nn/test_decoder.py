"""Every switch of the decoder against a float64 reference, and the equalities that decoding and training stand on."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.core.tree import flatten, map_params
from jaxlm.nn.embeddings import embed
from tests.nn.reference import decoder_logits

SMALL = nn.DecoderConfig(vocab_size=23, width=16, heads=4, kv_heads=2, ffn=24, layers=3, max_positions=32)
VARIANTS = {
    "llama": {},
    "gpt2": dict(
        norm="layernorm", activation="gelu_tanh", positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True,
        kv_heads=0, position_offset=2,
    ),
    "post-norm": dict(
        norm="layernorm", norm_position="post", activation="relu", positions="sinusoidal", embed_scale=True,
        mlp_bias=True, embed_norm=True,
    ),
    "t2t": dict(positions="sinusoidal_t2t", position_offset=1, tie_embeddings=False),
    "no-bias-norm": dict(norm="layernorm", norm_bias=False, activation="gelu", positions="none"),
    "relative": dict(positions="relative", activation="geglu_tanh", relative_buckets=8, relative_max_distance=12),
    "gemma": dict(
        qk_norm="head", attention_softcap=5.0, logit_softcap=3.0, windows=(3, 0), head_dim=8, activation="geglu",
        attention_scale=0.3, embed_scale=True, layer_groups=(1, 2), rope_theta=100.0,
    ),
    "scaled-by-layer": dict(
        attention_scale_by_layer=True, attention_softcap=5.0, layer_groups=(1, 2), activation="reglu", norm_eps=1e-2,
        windows=(4,),
    ),
    "neox": dict(
        norm="layernorm", activation="gelu", parallel=True, rotary_fraction=0.5, head_dim=8, qkv_bias=True,
        logits_bias=True,
    ),
    "olmo2": dict(norm_position="output", qk_norm="width", activation="silu", scan_layers=False),
    "gemma3": dict(norm_position="sandwich", qk_norm="head", windows=(3, 0), rope_theta=1e4, rope_local_theta=50.0),
    "cohere": dict(
        norm="layernorm", norm_bias=False, parallel=True, shared_norm=True, activation="relu2", rope_interleaved=True,
        rotary_fraction=0.5, nope_layers=(1,), windows=(3, 0), qk_norm="each_head", qk_norm_after_rope=True, head_dim=8,
        logits_multiplier=0.5, residual_multiplier=0.6,
    ),
    "olmo": dict(
        norm="layernorm", norm_scale=False, clip_qkv=0.5, activation="xielu", embedding_multiplier=3.0,
        residual_multiplier=0.4, attention_temperature=0.7, temperature_interval=2,
    ),
    "mixtral": dict(experts=5, experts_per_token=2, expert_ffn=12),
    "qwen3-moe": dict(experts=4, experts_per_token=3, expert_renormalize=False, dense_layers=(1,), scan_layers=False),
    "deepseek-moe": dict(
        experts=6, expert_ffn=12, router_scores="sigmoid", correction_bias=True, n_group=3, topk_group=2,
        routed_scaling_factor=1.7, shared_expert_ffn=20, dense_layers=(0,),
    ),
    "llama4-moe": dict(
        experts=4, router_scores="sigmoid", expert_renormalize=False, scale_expert_inputs=True, shared_expert_ffn=12,
        shared_expert_gate=True,
    ),
    "gpt-oss": dict(
        experts=4, activation="clamped_swiglu", swiglu_limit=0.5, expert_bias=True, router_bias=True,
        attention_sinks=True, windows=(3, 0),
    ),
}


def make(**changes):
    """A small decoder whose every parameter, norms and biases included, is random."""
    return _make(tuple(sorted(changes.items())))


@functools.cache
def _make(changes):
    config = dataclasses.replace(SMALL, **dict(changes))
    graphdef, like = nn.abstract(config)
    return config, graphdef, random_params(like, 0.3)


def random_params(like, std):
    """Random numbers of NumPy, so that nothing is compiled for them."""
    rng = np.random.default_rng(1)

    def values(path, leaf):
        mean, spread = float(path.endswith("norm/scale")), leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 0.02
        return jnp.asarray(mean + rng.normal(0, np.hypot(std, spread), leaf.shape), jnp.float32)

    return map_params(values, like)


forward = jax.jit(lambda graphdef, params, *args, **kw: nnx.merge(graphdef, params)(*args, **kw), static_argnums=0)
decode = jax.jit(lambda graphdef, params, *args: nnx.merge(graphdef, params).decode(*args), static_argnums=0)


def tokens(batch=2, length=10, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(3, SMALL.vocab_size, (batch, length)))


@pytest.mark.parametrize("name", VARIANTS)
def test_matches_the_float64_reference(name):
    """The same batch as in the test of cached decoding, so that both share a compiled program."""
    config, graphdef, params = make(**VARIANTS[name])
    batch = tokens(length=9)
    got = forward(graphdef, params, batch)
    weights = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    want = np.stack([decoder_logits(config, weights, row) for row in np.asarray(batch)])
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)


def assert_decoded_alike(got, want, kv_cache, noise=2e-5):
    """Equal but for float noise. Where that moves a number across a border between two codes of a rounded cache, what
    depends on it is a step off: allowed for some, for without the rounding all of them would be."""
    got, want = np.asarray(got), np.asarray(want)
    step = {"full": 0, "int8": 0.01, "int4": 0.1, "fp8": 0.05}[kv_cache] * float(np.abs(want).max())
    np.testing.assert_allclose(got, want, atol=noise + step)
    assert np.mean(np.abs(got - want) < noise) > 0.5


@pytest.mark.parametrize(
    "name, kv_cache",
    [
        *((name, "full") for name in (
            "llama", "gpt2", "post-norm", "relative", "gemma", "neox", "cohere", "olmo", "qwen3-moe")),
        ("gemma", "int8"), ("gemma3", "int4"), ("neox", "fp8"),
        *(pytest.param(name, "full", marks=pytest.mark.slow) for name in (
            "t2t", "no-bias-norm", "scaled-by-layer", "olmo2", "gemma3", "mixtral", "gpt-oss")),
        pytest.param("relative", "int4", marks=pytest.mark.slow),
    ],
)
def test_cached_decoding_equals_the_full_forward_also_when_left_padded(name, kv_cache):
    _, graphdef, params = make(**VARIANTS[name], **({} if kv_cache == "full" else {"kv_cache": kv_cache}))
    model = nnx.merge(graphdef, params)
    batch = tokens(length=9)
    full = forward(graphdef, params, batch)
    start = jnp.array([0, 3])  # the second row begins three slots late
    padded = np.stack([np.pad(batch[0], (0, 3)), np.pad(batch[1], (3, 0))])
    cache = model.init_cache(2, 14).replace(start=start)
    steps = []
    for begin, end in [(0, 4), (4, 8), (8, 9), (9, 10), (10, 11), (11, 12)]:
        logits, cache = decode(graphdef, params, padded[:, begin:end], cache)
        steps.append(logits)
    cached = np.concatenate(steps, 1)
    assert_decoded_alike(np.stack([cached[0, :9], cached[1, 3:]]), full, kv_cache, 1e-4)
    assert int(cache.index) == 12


@pytest.mark.parametrize("name", [
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "relative")), "gemma"])
def test_no_gradient_flows_from_the_future(name):
    _, graphdef, params = make(**VARIANTS[name])
    batch, table = tokens(1, 8), params["embed"]["table"].get_value()

    def output_sum(rows_TxD, t):
        # Token i reads row i of the table, so that the gradient tells the inputs apart.
        inputs = map_params(lambda path, leaf: rows_TxD if path == "embed/table" else leaf, params)
        model = nnx.merge(graphdef, inputs)
        x_TxD = model.decoder(embed(model.embed, jnp.arange(8)[None], model.config))[0][0]
        return x_TxD[t].sum()

    gradient_at = jax.jit(jax.grad(output_sum))
    for t in range(8):
        gradient = gradient_at(table[batch[0]], t)
        size = np.abs(gradient).sum(-1)
        assert (size[t + 1 :] == 0).all()
        assert size[t] > 0


def test_batch_mates_change_nothing():
    _, graphdef, params = make()
    batch = tokens(3)
    alone = forward(graphdef, params, batch[1:2])
    np.testing.assert_allclose(forward(graphdef, params, batch)[1], alone[0], atol=1e-5)


def test_packed_documents_equal_each_alone():
    for name in ("gpt2", "gemma"):
        _, graphdef, params = make(**VARIANTS[name])
        a, b = tokens(1, 6, seed=1), tokens(1, 4, seed=2)
        packed = forward(
            graphdef,
            params,
            jnp.concatenate([a, b, jnp.zeros((1, 2), int)], 1),
            segment_ids_BxT=jnp.array([[1] * 6 + [2] * 4 + [0] * 2]),
            positions_BxT=jnp.array([[*range(6), *range(4), 0, 0]]),
        )
        a, b = (jnp.pad(each, ((0, 0), (0, 12 - each.shape[1]))) for each in (a, b))  # after the text: nothing sees it
        np.testing.assert_allclose(packed[:, :6], forward(graphdef, params, a)[:, :6], atol=1e-5)
        np.testing.assert_allclose(packed[:, 6:10], forward(graphdef, params, b)[:, :4], atol=1e-5)


def loss_and_gradient(config, params, batch, key=None):
    graphdef = nn.abstract(config)[0]

    def loss(p):
        return jnp.mean(jnp.square(nnx.merge(graphdef, p)(batch, key=key)))

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    return value, flatten(gradient)


@functools.cache
def scanned_loss_and_gradient():
    config, _, params = make(dropout=0.2, attention_dropout=0.1, ffn_dropout=0.1, windows=(3, 0))
    return loss_and_gradient(config, params, tokens(), jax.random.key(7))


@pytest.mark.parametrize("changes", [
    dict(scan_layers=False), dict(remat="offload_dots"),
    *(pytest.param(changes, marks=pytest.mark.slow) for changes in (  # the first two are in test_parallel, test_flash
        dict(remat="full"), dict(remat="dots"), dict(scan_layers=False, remat="full"), dict(remat="offload"))),
])
def test_scan_and_remat_change_nothing_but_the_schedule(changes):
    config, _, params = make(dropout=0.2, attention_dropout=0.1, ffn_dropout=0.1, windows=(3, 0))
    batch, key = tokens(), jax.random.key(7)
    want_loss, want = scanned_loss_and_gradient()
    got_loss, got = loss_and_gradient(dataclasses.replace(config, **changes), params, batch, key)
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-6)
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_layer_groups_of_one_stack_equal_the_stack():
    config, graphdef, params = make(layer_groups=(1, 2))
    flat = flatten(params)
    whole = {
        path: np.concatenate([leaf, flat[path.replace("layers/0/", "layers/1/")]])
        for path, leaf in flat.items() if "layers/0/" in path
    }
    one_graphdef, like = nn.abstract(dataclasses.replace(config, layer_groups=()))
    one = map_params(lambda path, _: jnp.asarray(whole.get(path, flat.get(path))), like)
    batch = tokens()
    np.testing.assert_allclose(forward(one_graphdef, one, batch), forward(graphdef, params, batch), atol=1e-5)


def test_dropout_needs_a_key_and_follows_it():
    _, graphdef, params = make(dropout=0.5)
    batch = tokens()
    calm = forward(graphdef, params, batch)
    one, two, again = (forward(graphdef, params, batch, key=jax.random.key(seed)) for seed in (1, 2, 1))
    assert (one == again).all()
    assert jnp.abs(one - two).max() > 1e-3
    assert jnp.abs(one - calm).max() > 1e-3


def test_bfloat16_activations_stay_close_and_logits_are_float32():
    config, _, params = make()
    low = nn.abstract(dataclasses.replace(config, dtype="bfloat16"))[0]
    high = nn.abstract(config)[0]
    got, want = forward(low, params, tokens()), forward(high, params, tokens())
    assert got.dtype == jnp.float32
    assert 0 < jnp.abs(got - want).max() < 0.05 * jnp.abs(want).max()


@pytest.mark.parametrize("name, kv_cache", [
    ("relative", "full"), ("llama", "int4"),
    *(pytest.param(*each, marks=pytest.mark.slow)
      for each in [("llama", "full"), ("gpt2", "full"), ("gemma", "full"), ("gemma", "int8")]),
])
def test_beams_remember_the_past_they_were_given(name, kv_cache):
    """Two sentences of three beams, given other pasts after every token, against each path in one full pass."""
    _, graphdef, params = make(**VARIANTS[name], kv_cache=kv_cache)
    model, rng = nnx.merge(graphdef, params), np.random.default_rng(0)
    prompt, start = tokens(2, 5), jnp.array([0, 2])
    cache = model.init_cache(2, 10).replace(start=start)
    _, cache = decode(graphdef, params, prompt, cache)
    cache = cache.fork(3)
    paths = [[np.asarray(prompt)[b, int(start[b]) :].tolist() for _ in range(3)] for b in range(2)]
    got, wants = [], []
    for _ in range(4):
        new = rng.integers(0, 23, (2, 3))
        logits, cache = decode(graphdef, params, jnp.asarray(new.reshape(6, 1)), cache)
        paths = [[[*paths[b][k], int(new[b, k])] for k in range(3)] for b in range(2)]
        for b in range(2):
            for k in range(3):
                padded = jnp.asarray([paths[b][k] + [0] * (10 - len(paths[b][k]))])
                got.append(np.asarray(logits)[3 * b + k, 0])
                wants.append(np.asarray(forward(graphdef, params, padded))[0, len(paths[b][k]) - 1])
        given = rng.integers(0, 3, (2, 3))
        cache = cache.reorder(jnp.asarray(given))
        paths = [[paths[b][k] for k in given[b]] for b in range(2)]
    assert_decoded_alike(np.stack(got), np.stack(wants), kv_cache)


def test_initial_loss_is_that_of_a_uniform_guess():
    graphdef, params = nn.build(nn.preset("124m", vocab_size=97, width=48, heads=3, layers=4), jax.random.key(0))
    batch = jnp.asarray(np.random.default_rng(0).integers(0, 97, (4, 32)))
    logits = np.asarray(forward(graphdef, params, batch), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert abs(-np.mean(log_p) - np.log(97)) < 0.1


def test_every_preset_has_the_size_its_name_says():
    sizes = {"124m": 124_439_808, "1b": 1_235_814_400, "7b": 6_738_415_616}
    for name, size in sizes.items():
        _, params = nn.abstract(nn.PRESETS[name])
        assert sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values()) == size
