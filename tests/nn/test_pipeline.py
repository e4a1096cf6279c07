"""Pipelines: what comes out is what one device gives, and what goes between devices is microbatches, not layers."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import batch_sharding, make_mesh, shardings
from jaxlm.core.tree import flatten
from jaxlm.nn.pipeline import Schedule, make_schedule
from jaxlm.training.config import DataConfig, Experiment, MeshConfig
from jaxlm.training.objectives.loss import make_loss
from jaxlm.training.setup import prepare
from jaxlm.training.state import abstract_state, init_state
from jaxlm.training.step import Step, make_step
from tests.models import build
from tests.training.test_step import DECODER, SEQ2SEQ, VOCABULARY, assert_same, batches

ONCE = dataclasses.replace(DECODER, layers=4, microbatches=4, windows=(3, 0), positions="relative")
TWICE = dataclasses.replace(DECODER, layers=4, layer_groups=(2, 2), microbatches=4, scan_layers=False)
TRANSLATION = dataclasses.replace(
    SEQ2SEQ, encoder_layers=2, decoder_layers=4, decoder_layer_groups=(2, 2), dropout=0.0, microbatches=2, remat="full"
)
CASES = {
    "once around": (ONCE, dict(stage=4, data=1)),
    "twice around": (TWICE, dict(stage=2, data=1, fsdp=2)),
    "translation": (TRANSLATION, dict(stage=2, data=1, tensor=2)),
}


def packed(config, count):
    """Batches of which some rows hold two documents."""
    data = batches(config, count)
    if config.kind == "decoder":
        for batch in data:
            rows, length = batch["inputs"].shape
            cut = np.random.default_rng(0).integers(1, length + 1, (rows, 1))
            place = np.arange(length)[None]
            batch["segment_ids"] = (place >= cut).astype(np.int32)
            batch["positions"] = np.where(place < cut, place, place - cut)
    return data


@functools.cache
def built(config):
    return build(config)


def train(config, mesh=None):
    """State and metrics after two steps, and the program of one."""
    graphdef, like = nn.abstract(config)
    tx = optax.sgd(0.3)  # Adam would blow up the rounding of gradients near zero
    layout = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, abstract_state(like, tx, mesh))
    state = init_state(built(config)[1], tx, 0, layout)
    step, history = make_step(graphdef, like, make_loss(config, router=(0.1, 0.1)), tx, layout=layout), []
    data = packed(config, 2)
    data = data if mesh is None else jax.device_put(data, batch_sharding(mesh))
    compiled = step.lower(state, data[0]).compile()
    for batch in data:
        state, metrics = Step(compiled)(state, batch)
        history.append(jax.device_get(metrics))
    return state, history, compiled.as_text()


@pytest.mark.parametrize("name", [
    name if name == "once around" else pytest.param(name, marks=pytest.mark.slow) for name in CASES
])
def test_training_equals_one_device(name):
    config, sizes = CASES[name]
    mesh = make_mesh(**sizes, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        state, history, text = train(config, mesh)
    assert_same((jax.device_get(state), history), train(config)[:2], 1e-5)
    for path, leaf in state.params.items():
        ways = math.prod(mesh.shape[axis] for axis in jax.tree.leaves(tuple(leaf.sharding.spec)))
        assert leaf.addressable_shards[0].data.nbytes * ways == leaf.nbytes
        assert ways % sizes["stage"] == 0 or "/layers/" not in path
    assert "collective-permute" in text
    gathered = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)]
    assert bool(gathered) == ("fsdp" in sizes)
    of_one_layer = max(math.prod(leaf.shape[1:]) for path, leaf in state.params.items() if "/layers/" in path)
    assert max(gathered, default=0) <= max(of_one_layer, batches(config, 1)[0]["inputs"].size * config.width)


@pytest.mark.parametrize(("stages", "microbatches", "repeats"), [(1, 3, 1), (4, 6, 1), (4, 2, 1), (2, 4, 3), (3, 6, 2)])
def test_a_schedule_takes_every_microbatch_through_every_layer(stages, microbatches, repeats):
    schedule = Schedule(stages, microbatches, repeats)
    ticks = {}
    for stage in range(stages):
        for visit in range(microbatches * repeats):
            ticks.setdefault(int(schedule.microbatch(visit)), []).append(visit + stage)
    assert sorted(ticks) == list(range(microbatches))
    for seen in ticks.values():  # one tick after the other, in the order of stages, again and again
        assert sorted(seen) == list(range(min(seen), min(seen) + stages * repeats))
    last = max(map(max, ticks.values()))
    assert schedule.ticks == last + 1
    assert schedule.bubble == pytest.approx(1 - microbatches * repeats / (last + 1))


def outputs(config, stages, rows=8, key=None):
    graphdef, params = built(config)
    tokens = np.tile(np.arange(3, 9, dtype=np.int32), (rows, 1))
    mesh = make_mesh(stage=stages, data=1, devices=jax.devices()[:stages])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(params, mesh))
        return np.asarray(jax.jit(lambda params: nnx.merge(graphdef, params)(tokens, key=key))(params))


def test_dropout_differs_by_layer_and_microbatch_not_by_stage():
    config = dataclasses.replace(TWICE, dropout=0.0, ffn_dropout=0.5, scan_layers=True, layer_groups=())
    by_two, by_four = (outputs(config, stages, key=jax.random.key(1)) for stages in (2, 4))
    np.testing.assert_allclose(by_two, by_four, atol=1e-5)
    assert len({row.tobytes() for row in by_two}) == 8  # all rows are the same text


@pytest.mark.parametrize("layer_groups", [(), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_remat_in_a_pipeline_keeps_what_its_name_says(layer_groups):
    """Products with parameters differ from stage to stage there, and are kept all the same."""
    tokens = np.zeros((4, 6), np.int32)

    def products(remat):
        config = dataclasses.replace(TWICE, layer_groups=layer_groups, microbatches=2, remat=remat, scan_layers=True)
        graphdef, like = nn.abstract(config)
        with jax.set_mesh(make_mesh(stage=2, data=4)):
            gradient = jax.grad(lambda params: nnx.merge(graphdef, params)(tokens).sum())
            return str(jax.make_jaxpr(gradient)(like)).count("dot_general")

    assert products("none") < products("dots") < products("full")


def test_rows_that_do_not_divide_go_layer_by_layer():
    config = dataclasses.replace(TWICE, scan_layers=True)
    np.testing.assert_allclose(outputs(config, 2, rows=3), outputs(config, 1, rows=3), atol=1e-5)


def test_decoding_on_a_mesh_with_stages():
    graphdef, params = built(dataclasses.replace(TRANSLATION, remat="none"))
    src = np.random.default_rng(0).integers(3, VOCABULARY, (3, 5)).astype(np.int32)

    @jax.jit
    def decode(params):
        model = nnx.merge(graphdef, params)
        cache = model.init_cache(model.encode(src), src != 0, 4)
        first, cache = model.decode(src[:, :3], cache)
        return first, model.decode(src[:, 3:4], cache)[0]

    expected, mesh = decode(params), make_mesh(stage=2, data=4)
    with jax.set_mesh(mesh):
        for got, want in zip(decode(jax.device_put(params, shardings(params, mesh))), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("layer_groups", "microbatches", "message"),
    [
        ((6,), 0, "layer groups of 6 layers do not divide among 4 stages; .* such as one of 8"),
        ((4, 8), 0, "layer groups of 4 and 8 layers do not divide"),
        ((4,), -1, "model.microbatches is -1; it must not be negative"),
        ((4, 4), 6, "6 microbatches do not go 2 times around 4 stages; make model.microbatches a multiple of 4"),
    ],
)
def test_what_does_not_divide_is_told_in_one_line(layer_groups, microbatches, message):
    with pytest.raises(UserError, match=message):
        make_schedule([range(size) for size in layer_groups], 4, microbatches)


def test_preparing_a_pipelined_training(tmp_path):
    """The report names the bubble, batches divide, and what cannot be pipelined is told before the first step."""
    text = tmp_path / "text.txt"
    text.write_text("abc bca " * 200)

    def setup(model, rows=32, **sizes):
        data = DataConfig(train=f"text:{text}", tokenizer_kind="char", seq_len=8, batch_size=rows)
        return prepare(Experiment(model=model, data=data, mesh=MeshConfig(**sizes)), tmp_path / "run")

    model = nn.DecoderConfig(width=16, heads=2, layers=8, layer_groups=(4, 4), microbatches=8)
    ready = setup(model, stage=4)
    assert "pipeline of the decoder: 8 microbatches x 2, bubble 15.8%" in ready.report
    with pytest.raises(UserError, match="batch_size 20 cannot be shared evenly by 16"):  # 2 rows x 8 microbatches
        setup(model, rows=20, stage=4)
    mixed = dataclasses.replace(model, experts=4, dense_layers=(0, 1, 2, 3))
    with pytest.raises(UserError, match="all alike"):
        setup(mixed, stage=4)
    with pytest.raises(UserError, match="stage.*Transformers"):
        setup(nn.LSTMConfig(width=16), stage=2)
    assert not flatten(ready.like).keys() ^ flatten(setup(model).like).keys()  # nor does the mesh change the model
