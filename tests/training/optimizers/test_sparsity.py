"""Optimizers that keep weights at zero: counts, schedules, moments, meshes, and compression-aware trainings."""

from __future__ import annotations

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxlm
from jaxlm import nn
from jaxlm.compression.names import parse
from jaxlm.compression.schedule import fake_compress
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray, is_leaf
from jaxlm.core.sharding import batch_sharding, make_mesh, shard_over
from jaxlm.core.tree import flatten
from jaxlm.hf.directory import read_model
from jaxlm.training import loop
from jaxlm.training.compression_aware import CompressionAwareTraining
from jaxlm.training.config import DataConfig, Experiment, OptimConfig, PruneConfig, QatConfig, TrainConfig
from jaxlm.training.loop import train
from jaxlm.training.metrics import read_metrics
from jaxlm.training.objectives.loss import make_loss
from jaxlm.training.optimizers.optimizer import make_optimizer
from jaxlm.training.optimizers.sparsity import sr_ste_decay, with_sparsity
from jaxlm.training.program import make_program
from jaxlm.training.setup import prepare
from jaxlm.training.state import abstract_state, init_state
from jaxlm.training.step import make_step
from jaxlm.training.validation import Validator
from tests.models import build
from tests.training.programs import shared_programs  # noqa: F401 - a fixture

KERNEL, TABLE = "decoder/layers/0/mlp/up/kernel", "embed/table"
OPTIM = OptimConfig(lr=0.05, warmup_steps=0, schedule="constant")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def walk(config: PruneConfig, end: int, steps: int):
    """Parameters, state and gradients after each update, on random gradients."""
    params = {KERNEL: normal(2, 20, 10), TABLE: normal(5, 4)}
    tx = with_sparsity(make_optimizer(OPTIM, steps), config, end)
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for t in range(steps):
        grads = {path: normal(*leaf.shape, seed=100 + t) for path, leaf in params.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, state, grads))
    assert update._cache_size() == 1
    return seen


def test_gradual_pruning_follows_the_closed_form():
    config = PruneConfig(sparsity=0.77, begin=3, every=4)
    for t, (params, state, _) in enumerate(walk(config, end=21, steps=26)):
        changes = [step for step in range(3, min(t, 21) + 1) if (step - 3) % 4 == 0 or step == 21]
        share = 0.77 * (1 - (1 - (changes[-1] - 3) / 18) ** 3) if changes else 0
        zeros = np.asarray(params[KERNEL] == 0).sum((1, 2))
        assert np.all(np.abs(zeros - 200 * share) <= (0 if t >= 21 else 0.501)), t
        np.testing.assert_array_equal(state.masks[KERNEL], params[KERNEL] != 0)
        assert np.all(params[TABLE] != 0)
    assert list(zeros) == [154, 154]


def test_pruned_weights_were_the_smallest_and_never_come_back():
    seen = walk(PruneConfig(sparsity=0.5, begin=0, every=2), end=10, steps=14)
    for (before, _, _), (after, _, _) in zip(seen, seen[1:], strict=False):
        assert not np.any((np.asarray(before[KERNEL]) == 0) & (np.asarray(after[KERNEL]) != 0))
        for old, new in zip(np.abs(before[KERNEL]), np.abs(after[KERNEL]), strict=True):
            dropped = (old != 0) & (new == 0)
            assert old[dropped].max(initial=0) <= old[new != 0].min() + 2 * OPTIM.lr  # they moved by about lr since


def test_rigl():
    """The share is met from the first change on; what joins is chosen by gradient, starts at zero, without a past."""
    config = PruneConfig(method="rigl", sparsity=0.8, begin=0, every=5, drop=0.4)
    seen = walk(config, end=20, steps=30)
    changed = []
    for t in range(1, 30):
        (_, old, _), (after, new, grads) = seen[t - 1], seen[t]
        mask, was = np.asarray(new.masks[KERNEL]), np.asarray(old.masks[KERNEL])
        assert list(mask.sum((1, 2))) == [40, 40]
        assert not np.any(np.asarray(after[KERNEL])[~mask])
        if np.any(mask != was):
            changed.append(t)
            count = round(0.4 * 0.5 * (1 + np.cos(np.pi * t / 20)) * 40)
            assert (mask & ~was).sum() <= 2 * count
            assert not np.any(np.asarray(after[KERNEL])[mask & ~was])
            fresh = (mask & ~was) | ~mask
            grown = np.where(mask & ~was, np.abs(grads[KERNEL]), np.inf)
            assert np.all(grown.min((1, 2)) >= np.where(mask | was, 0, np.abs(grads[KERNEL])).max((1, 2)))
        else:
            fresh = ~mask
        for name in ("mu", "nu"):
            assert not np.any(np.asarray(optax.tree.get(new.inner, name)[KERNEL])[fresh])
    assert changed == [5, 10, 15]
    assert np.any(seen[-1][0][KERNEL] != seen[20][0][KERNEL])  # and training goes on


def test_pull_to_zero():
    def prune(params):
        return {KERNEL: jnp.where(jnp.abs(params[KERNEL]) < 0.5, 0, params[KERNEL]), TABLE: params[TABLE]}

    params = {KERNEL: normal(1, 6, 4), TABLE: normal(3, 2)}
    tx = sr_ste_decay(prune, 0.25, begin=1)
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for pull in (0, 0.25, 0.25):
        grads, state = tx.update(zeros, state, params)
        small = np.where(np.abs(params[KERNEL]) < 0.5, params[KERNEL], 0)
        np.testing.assert_allclose(grads[KERNEL], pull * small, rtol=1e-6)
        assert not np.any(grads[TABLE])


@pytest.mark.parametrize("method", [pytest.param("gradual", marks=pytest.mark.slow), "rigl"])
def test_eight_devices_change_the_same_weights(method):
    mesh, prune = make_mesh(data=2, fsdp=2, tensor=2), PruneConfig(method=method, sparsity=0.6, every=1)
    tx = with_sparsity(make_optimizer(dataclasses.replace(OPTIM, clip_norm=0.0), 9), prune, 3)
    layout, ends = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")), []
    for place in (lambda x: x, lambda x: jax.device_put(x, layout)):
        params = {KERNEL: place(normal(2, 20, 12))}
        state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
        for t in range(3):
            updates, state = update({KERNEL: place(normal(2, 20, 12, seed=t + 9))}, state, params)
            params = optax.apply_updates(params, updates)
        ends.append((params[KERNEL], state))
    (one, _), (eight, state) = ends
    assert eight.sharding.is_equivalent_to(layout, 3) and state.masks[KERNEL].sharding.is_equivalent_to(layout, 3)
    np.testing.assert_array_equal(one != 0, eight != 0)
    np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-7)


MODEL = nn.DecoderConfig(width=16, heads=2, layers=1, vocab_size=32)


def run(mesh=None):
    """Two steps before and two after quantization begins, on one device or several; the state's layout and the losses.
    """
    graphdef, like = nn.abstract(MODEL)
    prune = PruneConfig(sparsity=0.5, target=KERNEL)
    tx = with_sparsity(make_optimizer(dataclasses.replace(OPTIM, lr=1e-3), 20), prune, 8)
    layout = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, abstract_state(like, tx, mesh))
    step = make_step(graphdef, like, make_loss(MODEL), tx, fake_compress(parse("w4a8-dynamic"), begin=2), layout=layout)
    state, losses, random = init_state(build(MODEL)[1], tx, 0, layout), [], np.random.default_rng(0)
    for _ in range(4):
        batch = {name: random.integers(3, 32, (16, 6)).astype(np.int32) for name in ("inputs", "targets")}
        batch["weights"] = np.ones((16, 6), np.float32)
        state, metrics = step(state, batch if mesh is None else jax.device_put(batch, batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    assert step.compiled._cache_size() == 1
    return state, losses


def test_eight_devices_equal_one():
    """As closely as rounding to 4 bits lets them be: what lies on the edge between two codes may go either way."""
    _, losses = run()
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        state, others = run(mesh)
    np.testing.assert_allclose(losses[:2], others[:2], rtol=1e-5)
    np.testing.assert_allclose(losses[2:], others[2:], rtol=1e-3)
    mask = state.opt_state.masks[KERNEL]
    assert mask.sharding == shard_over(state.params[KERNEL].sharding, mask.shape)
    assert not mask.sharding.is_fully_replicated


# ---- whole trainings


def experiment(folder, *, qat=None, prune=None, **changes) -> Experiment:
    text = folder / "text.txt"
    if not text.exists():
        words = np.random.default_rng(0).choice(["ab", "bcd", "dae", "f", "gha"], 3000)
        text.write_text(" ".join(words))
    data = DataConfig(
        train=f"text:{text}[:90%]", valid=f"text:{text}[90%:]", tokenizer_kind="char", seq_len=8, batch_size=8
    )
    options = dict(steps=24, log_every=1, eval_every=8, checkpoint_every=6, keep_latest=2) | changes
    return Experiment(
        model=nn.DecoderConfig(width=16, heads=2, layers=1, dropout=0.1), data=data,
        optim=OptimConfig(lr=1e-2, warmup_steps=5), train=TrainConfig(**options), qat=qat or QatConfig(),
        prune=prune or PruneConfig(),
    )


BOTH = dict(
    qat=QatConfig(recipe="w3a16-rtn-g8+huffman", begin=4),
    prune=PruneConfig(method="rigl", sparsity=0.5, every=3, end=14),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shared_programs):  # noqa: F811
    folder = tmp_path_factory.mktemp("compressing")
    train(experiment(folder, **BOTH), folder / "run")
    return folder


def losses(run):
    return [{name: row[name] for name in ("step", "loss", "valid_loss", "sparsity") if name in row}
            for row in read_metrics(run / "metrics.jsonl") if "start" not in row]


def test_what_was_validated_is_what_comes_out(finished):
    """The validation loss of the best step is that of the model compressed afterwards, by hand or by the training."""
    run = finished / "run"
    validate = Validator(prepare(experiment(finished, **BOTH), run), lambda batch: batch, lambda: None)
    validated = {row["step"]: row["valid_loss"] for row in losses(run) if "valid_loss" in row}
    dense = jaxlm.load(run)
    (best,) = dense.info["training"]["steps"]
    assert best in (16, 24)  # at 8 the pruning was under way
    assert "w3a16-rtn-g8" in dense.info["notes"][0]
    small = jaxlm.compress(dense, "w3a16-rtn-g8+huffman")
    written = read_model(run / "compressed")[1]
    for path, leaf in flatten(small.params).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, flatten(written)[path])
    assert small.save(finished / "small").joinpath("model.safetensors").read_bytes() == (
        run / "compressed" / "model.safetensors").read_bytes()
    for lm in (small, jaxlm.load(run / "compressed")):
        assert validate(flatten(lm.params))["valid_loss"] == pytest.approx(validated[best], rel=1e-5)
    assert validate(flatten(dense.params))["valid_loss"] != pytest.approx(validated[best], rel=1e-3)
    for path, leaf in flatten(dense.params).items():
        pruned = path in flatten(written) and isinstance(flatten(written)[path], QArray)
        assert np.mean(np.asarray(leaf) == 0) == (0.5 if pruned else pytest.approx(0, abs=0.01)), path
    assert [row["sparsity"] for row in losses(run) if "sparsity" in row] == [0.5] * 3


def test_it_resumes_bitwise(finished, tmp_path, monkeypatch):
    """Stopped between two changes of the masks, and between checkpoints."""
    original, calls = loop.Trainer.advance, []

    def advance(self, batch):
        calls.append(batch)
        if len(calls) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop.Trainer, "advance", advance)
        train(experiment(finished, **BOTH), tmp_path)
    assert losses(tmp_path)[-1]["step"] == 11
    train(experiment(finished, **BOTH), tmp_path)
    assert losses(tmp_path) == losses(finished / "run")
    for path, leaf in flatten(read_model(tmp_path / "model")[1]).items():
        np.testing.assert_array_equal(leaf, flatten(read_model(finished / "run" / "model")[1])[path], err_msg=path)


def test_n_of_m_ends_with_zeros(finished, tmp_path):
    train(experiment(finished, qat=QatConfig(recipe="2:4-magnitude"), steps=6, eval_every=0), tmp_path)
    params = flatten(read_model(tmp_path / "model")[1])
    assert not any(is_leaf(leaf) for leaf in params.values())
    kernel = np.asarray(params[KERNEL])
    assert np.all((kernel.reshape(1, -1, 4, kernel.shape[-1]) == 0).sum(2) == 2)
    assert not (tmp_path / "compressed").exists()  # it would be the same model


@pytest.mark.parametrize(
    ("qat", "prune", "message"),
    [
        (dict(recipe="w4a16-rtm"), {}, "'w4a16-rtm'"),
        (dict(recipe="w4a16-rtn", begin=24), {}, "qat.begin=24 .*train.steps=24"),
        ({}, dict(sparsity=1.0), "prune.sparsity=1.0"),
        ({}, dict(sparsity=0.5, end=24), "prune.end=24 .*train.steps=24"),
        ({}, dict(sparsity=0.5, begin=18), "prune.begin=18, prune.end=18"),
        ({}, dict(sparsity=0.5, drop=2.0), "prune.drop=2.0"),
        ({}, dict(sparsity=0.5, target="heads"), "prune.target 'heads'"),
        ({}, dict(sparsity=0.5, target=".*bias|.*scale"), "prune.target .*(bias|scale)"),
    ],
)
def test_mistakes_are_found_before_the_first_step(finished, qat, prune, message):
    """... which is when the program is made: ``test_loop`` has it that nothing is written by then."""
    config = experiment(finished, qat=QatConfig(**qat), prune=PruneConfig(**prune))
    with pytest.raises(UserError, match=message):
        make_program(dataclasses.replace(config, model=MODEL), *nn.abstract(MODEL), make_mesh())


def test_a_plain_training_is_left_alone(finished):
    config = experiment(finished)
    plain = CompressionAwareTraining(config, nn.abstract(MODEL)[1])
    tx, params = optax.sgd(1.0), {KERNEL: normal(1, 2, 2)}
    assert plain.optimizer(tx) is tx and plain.transform is None and plain.complete_at == 0
    assert plain.for_platform(params) is params and plain.pruned(params) is params and plain.report(params) == {}
