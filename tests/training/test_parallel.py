"""Parallelism: training on eight devices equals training on one, and compiled programs move only what they must.

The tests try a selection of the mixes; ``python -m tests.training.mixes`` tries all of them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.compression.names import load_recipe
from jaxlm.compression.schedule import fake_compress
from jaxlm.core.leaves import LoRA
from jaxlm.core.sharding import batch_sharding, make_mesh, override_sharding, shardings
from jaxlm.core.tree import flatten, map_params
from jaxlm.training.objectives.loss import make_loss
from jaxlm.training.state import abstract_state, init_state
from jaxlm.training.step import Step, StepOptions, make_step
from tests.models import build
from tests.training.hlo import collectives
from tests.training.mixes import MIXES, differences, name

CHECKED = [
    ("decoder", "data2-fsdp2-tensor2-accumulate2-rematfull-offload_optimizerTrue"),
    pytest.param("decoder", "fsdp2-sequence2-tensor2-ring_min_keys1-accumulate2", marks=pytest.mark.slow),
    pytest.param("seq2seq", "fsdp4-tensor2", marks=pytest.mark.slow),
    pytest.param("moe", "data2-fsdp2-tensor2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "mix"), CHECKED)
def test_a_mesh_is_one_device(model, mix):
    (mix,) = (each for each in MIXES if name(each) == mix)
    worst = differences(model, mix, steps=2)
    assert max(worst.values()) < 1e-5, worst


# Sizes that tell a layer's kernels (2048 and 4096), the table (16384), all layers' kernels (from 16384 x 2) and a
# device's logits apart.
CONFIG = nn.DecoderConfig(vocab_size=512, width=32, heads=8, ffn=128, layers=16, remat="full", tie_embeddings=False)
LAYER, TABLE = 32 * 128, 512 * 32


def compiled(sizes, rows=16, length=64, config=CONFIG, **options):
    mesh, (graphdef, like) = make_mesh(**sizes), nn.abstract(config)
    tx = optax.adamw(1e-3)
    state = abstract_state(like, tx, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(graphdef, like, make_loss(config), tx, layout=layout, **options)
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    with jax.set_mesh(mesh):
        batch = {key: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh, length))
                 for key, dtype in dtypes.items()}
        return collectives(step.lower(state, batch).compile().as_text())


def test_fsdp_gathers_a_kernel_at_a_time():
    """Outside of the loop over layers only the embedding and the head are gathered, never the model."""
    gathered = [each for each in compiled(dict(data=1, fsdp=8)) if each.kind == "all-gather"]
    assert {each.elements for each in gathered if each.in_loop} <= {32 * 32, LAYER}
    assert max(each.elements for each in gathered) == TABLE
    assert sum(each.elements == TABLE for each in gathered) <= 3  # lookup; head, forward and backward
    assert sum(each.in_loop for each in gathered) >= 7  # all kernels of a layer are split


def test_the_vocabulary_stays_split():
    """Tensor parallelism gathers neither table nor logits: losses and embeddings are sums over devices."""
    rows, length = 4, 128
    found = compiled(dict(data=1, tensor=8), rows, length)
    assert not [each for each in found if each.kind in ("all-gather", "all-to-all") and each.elements >= LAYER]
    largest = rows * length * max(CONFIG.width, CONFIG.vocab_size // 8)  # activations, or a device's logits
    assert max(each.elements for each in found) <= largest < rows * length * CONFIG.vocab_size


def test_split_sequences_gather_keys_and_values_only():
    rows, length = 2, 512
    gathered = [each for each in compiled(dict(data=1, sequence=8), rows, length) if each.kind == "all-gather"]
    assert {each.elements for each in gathered if each.in_loop} == {rows * length * CONFIG.width}
    assert sum(each.elements == rows * length * CONFIG.width for each in gathered) <= 6
    ring = compiled(dict(data=1, sequence=8), rows, length, dataclasses.replace(CONFIG, ring_min_keys=1))
    assert not [each for each in ring if each.kind == "all-gather" and each.dtype == "f32"]
    assert {each.elements for each in ring if each.kind == "collective-permute" and each.dtype == "f32"} == {
        rows * length // 8 * CONFIG.width}


SMALL = nn.DecoderConfig(vocab_size=64, width=16, heads=8, ffn=32, layers=2, tie_embeddings=False)


def gradient(config, mesh=None, transform=None, **options):
    """The gradient of one batch, by the step itself: with momentum it is the optimizer's state."""
    graphdef, like = nn.abstract(config)
    tx, random, layout = optax.sgd(0.1, momentum=0.9), np.random.default_rng(0), None
    batch = {key: random.integers(3, 64, (16, 16)).astype(np.int32) for key in ("inputs", "targets")}
    batch["weights"] = np.ones((16, 16), np.float32)
    places = {key: options.pop(key) for key in ("shard_optimizer",) if key in options}
    if mesh is not None:
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(like, tx, mesh, **places))
        batch = jax.device_put(batch, batch_sharding(mesh))
    step = make_step(graphdef, like, make_loss(config), tx, transform, layout=layout, **options)
    with jax.set_mesh(mesh or make_mesh(devices=jax.devices()[:1])):
        state = init_state(build(config)[1], tx, 0, layout)
        program = step.lower(state, batch).compile()
        state, metrics = Step(program)(state, batch)
    return jax.device_get(optax.tree.get(state.opt_state, "trace")), metrics, collectives(program.as_text())


@pytest.fixture(scope="module")
def plain():
    return gradient(SMALL)


@pytest.mark.parametrize(("bits", "shard_optimizer"), [
    ("bf16", True), *(pytest.param("int8", sharded, marks=pytest.mark.slow) for sharded in (True, False))])
def test_gradients_in_fewer_bits(bits, shard_optimizer, plain):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    want, want_metrics, _ = plain
    got, metrics, found = gradient(
        SMALL, mesh, options=StepOptions(gradient_compression=bits, accumulate=2), shard_optimizer=shard_optimizer
    )
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-6)
    worst = {path: np.max(np.abs(got[path] - leaf)) / np.max(np.abs(leaf)) for path, leaf in want.items()}
    # Half a step of bfloat16, a step of int8, of two parts of the sum, and of the sum if it is rounded too.
    limit = {"bf16": 2**-8, "int8": 1 / 127}[bits] * (1.5 if shard_optimizer else 2.5) * 1.5
    assert 1e-5 < max(worst.values()) < limit, worst
    mean = {path: np.mean(got[path] - leaf) / np.std(leaf) for path, leaf in want.items() if leaf.size > 500}
    assert max(map(abs, mean.values())) < 4e-3, mean  # always rounding down would be 2e-2
    moved = {each.dtype for each in found if each.kind == "all-to-all" and each.elements > 64}
    assert ({"bf16": "bf16", "int8": "s8"}[bits] in moved) or bits == "bf16"  # XLA on CPU widens bfloat16


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [pytest.param("w4a16-rtn-g8", dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
     pytest.param("w8a8-dynamic", dict(data=1, sequence=4, tensor=2), marks=pytest.mark.slow)],
)
def test_training_for_compression(recipe, sizes):
    """Gradients on a mesh; by default optimizers/test_sparsity has a compression-aware training on a mesh."""
    transform = fake_compress(load_recipe(recipe), 0)
    want, want_metrics, _ = gradient(SMALL, transform=transform)
    got, metrics, _ = gradient(SMALL, make_mesh(**sizes), transform=transform)
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-5)
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, atol=2e-3 * np.max(np.abs(leaf)), err_msg=path)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [pytest.param("w4a16-rtn-g8", dict(data=1, sequence=4, tensor=2), marks=pytest.mark.slow),
     pytest.param("w8a8-dynamic", dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
     ("w8a8-dynamic under lora", dict(data=1, sequence=2, fsdp=2, tensor=2))],
)
def test_compressed_leaves_are_split_like_dense_ones(kind, sizes):
    graphdef, params = build(SMALL)
    params = load_recipe(kind.split()[0]).apply(params)
    if "lora" in kind:
        def adapt(path, leaf):
            if not path.endswith("up/kernel"):
                return leaf
            a, b = (0.1 * jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 16, 4), (2, 4, 32)]))
            return LoRA(leaf, a, b, jnp.ones((2, 1, 1)))

        params = map_params(adapt, params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 16)))
    logits = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    want = logits(params, tokens)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(params, mesh))
        np.testing.assert_allclose(logits(placed, tokens), want, rtol=1e-4, atol=1e-5)
    part = jax.tree.leaves(flatten(placed)["decoder/layers/0/mlp/up/kernel"])[0]
    share = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert {shard.data.nbytes for shard in part.addressable_shards} == {part.nbytes // share}


def test_rules_by_path_change_nothing_but_the_place():
    like = override_sharding((".*/mlp/(up|gate)/kernel=- - fsdp+tensor", "embed/table=- -"))(nn.abstract(SMALL)[1])
    mesh, tx = make_mesh(data=2, fsdp=2, tensor=2), optax.sgd(0.1)
    state = abstract_state(like, tx, mesh)
    shards = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in state.params.items()}
    assert shards["decoder/layers/0/mlp/up/kernel"] == (2, 16, 8)
    assert shards["embed/table"] == (64, 16)
