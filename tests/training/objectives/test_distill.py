"""Distillation: the loss against NumPy, and a student that lost layers learns from the model that has them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxlm
from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import batch_sharding, make_mesh
from jaxlm.training.config import DistillConfig, Experiment
from jaxlm.training.objectives.distill import PROJECTION, Teacher, distill_loss, divergence, teacher_layers
from jaxlm.training.objectives.objective import make_objective
from jaxlm.training.objectives.reference_model import make_reference_model
from jaxlm.training.state import abstract_state, init_state
from jaxlm.training.step import make_step
from tests.models import build
from tests.training.llamas import CONFIG, batch, tiny_llama

SEQ2SEQ = nn.preset("tiny", vocab_size=32, width=16, heads=2, ffn=32, encoder_layers=1, decoder_layers=2, dropout=0.0)


def test_divergence_is_numpys():
    random = np.random.default_rng(0)
    ours, theirs = 3 * random.standard_normal((2, 2, 3, 7))
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in (theirs, ours))
    np.testing.assert_allclose(divergence(jnp.asarray(ours), jnp.asarray(theirs), 2.0),
                               4 * (p * np.log(p / q)).sum(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(divergence(jnp.asarray(ours), jnp.asarray(ours), 3.0), 0, atol=1e-6)


def test_layers_are_spread_evenly():
    assert teacher_layers(2, 4) == [2, 4] and teacher_layers(3, 4) == [2, 3, 4] and teacher_layers(4, 4) == [1, 2, 3, 4]
    assert teacher_layers(2, 4, (1, 3)) == [1, 3]
    for chosen in ((1,), (0, 2), (2, 5)):
        with pytest.raises(UserError, match="distill.hidden_layers .*4 .*2"):
            teacher_layers(2, 4, chosen)


@pytest.mark.parametrize(
    "config", [pytest.param(CONFIG, marks=pytest.mark.slow), SEQ2SEQ], ids=lambda config: config.kind
)
def test_the_parts_of_the_loss(config):
    """The cross-entropy, the divergence and the difference of states, each by itself and all together; the states are
    those that the next layer is given."""
    (graphdef, ours), (_, theirs) = (build(config, seed) for seed in (0, 1))
    data = batch() | ({"src": batch(seed=3)["inputs"]} if config.kind == "seq2seq" else {})
    inputs = (data["src"], data["inputs"]) if "src" in data else (data["inputs"],)

    @jax.jit
    def loss(student, weight):
        config = DistillConfig("it", weight, 2.0, 0.5)
        return distill_loss(
            nnx.merge(graphdef, student), data, None, Teacher(nnx.merge(graphdef, theirs)), config=config)

    @jax.jit
    def forward(params):
        model = nnx.merge(graphdef, params)
        logits, states = model.with_hidden_states(*inputs)
        return logits, states, model(*inputs), nn.decoder.head_logits(model, model.decoder.finish(states[-1]))

    logits, states, plain, of_states = forward(ours)
    assert states.shape == (2, 4, 8, 16)
    np.testing.assert_allclose(logits, plain, atol=1e-5)
    np.testing.assert_allclose(of_states, logits, atol=1e-5)
    whole, sums = loss(ours, 0.3)
    difference = np.square(states - forward(theirs)[1]).mean((0, -1))
    np.testing.assert_allclose(sums["difference"], (difference * data["weights"]).sum(), rtol=1e-5)
    parts = 0.7 * sums["nll"] + 0.3 * sums["divergence"] + 0.5 * sums["difference"]
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
    assert float(loss(theirs, 1.0)[0]) == pytest.approx(0, abs=1e-4)


def test_a_student_without_layers_recovers(tmp_path):
    """Two layers of four are dropped: the student starts far from the teacher and comes near, faster than it would by
    the data alone, which here says nothing."""
    config = dataclasses.replace(CONFIG, layers=4)
    home = tiny_llama(tmp_path / "teacher", config=config)
    student = jaxlm.compress(jaxlm.load(home), "drop-layers2")
    student.save(tmp_path / "student")
    student = jaxlm.load(tmp_path / "student")
    assert student.config.layers == 2
    experiment = Experiment(model=student.config, distill=DistillConfig(str(home), 1.0, 1.0, hidden=0.1))
    reference = make_reference_model(experiment, student.graphdef, student.params, student.params)
    tx = optax.adam(0.02)
    step = make_step(student.graphdef, student.params, make_objective(experiment), tx, reference=reference.build)
    state, seen = init_state(student.params, tx, 0, reference=reference.params), []
    for number in range(30):
        state, metrics = step(state, batch(16, seed=number))
        seen.append(float(metrics["divergence"]))
    assert np.mean(seen[-5:]) < 0.5 * seen[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, state.reference, {
        path: np.asarray(leaf) for path, leaf in jaxlm.core.tree.flatten(jaxlm.load(home).params).items()}))


def test_a_narrower_student_learns_a_projection(tmp_path):
    """The projection is trained with the model, but is not part of it."""
    home = tiny_llama(tmp_path / "teacher")
    config = dataclasses.replace(CONFIG, width=8)
    graphdef, params = build(config)
    experiment = Experiment(model=config, distill=DistillConfig(str(home), 0.5, hidden=1.0))
    reference = make_reference_model(experiment, graphdef, params, params)
    assert reference.extra[PROJECTION].shape == (8, 16)
    tx, mesh = optax.adam(0.02), make_mesh(data=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        abstract = abstract_state(params, tx, mesh, reference=reference.like, extra=reference.extra)
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = init_state(params, tx, 0, layout, reference=reference.params, extra=reference.extra)
        step = make_step(graphdef, params, make_objective(experiment), tx, reference=reference.build, layout=layout)
        seen = []
        for _ in range(10):
            state, metrics = step(state, jax.device_put(batch(), batch_sharding(mesh)))
            seen.append(float(metrics["difference"]))
    assert seen[-1] < 0.9 * seen[0]
    assert np.abs(np.asarray(state.params[PROJECTION] - reference.extra[PROJECTION])).max() > 0.05


def test_a_teacher_may_be_compressed_and_must_fit(tmp_path):
    home = tiny_llama(tmp_path / "teacher")
    lm = jaxlm.load(home)
    jaxlm.compress(lm, "w8a8-dynamic").save(tmp_path / "small")
    experiment = Experiment(model=lm.config, distill=DistillConfig(str(tmp_path / "small")))
    reference = make_reference_model(experiment, lm.graphdef, lm.params, lm.params)
    small = reference.build(None, jaxlm.core.tree.flatten(reference.params), {}).model
    np.testing.assert_allclose(small(batch()["inputs"]), lm(batch()["inputs"]), atol=1.0)
    other = dataclasses.replace(experiment, model=dataclasses.replace(lm.config, vocab_size=64))
    with pytest.raises(UserError, match="distill.teacher .*32.*64"):
        make_reference_model(other, lm.graphdef, lm.params, lm.params)
    with pytest.raises(UserError, match="distill.weight=2.0"):
        make_objective(dataclasses.replace(experiment, distill=DistillConfig("x", weight=2.0)))
