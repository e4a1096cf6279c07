"""Whole trainings: killed, terminated, resumed, stopped early and averaged, and the files they write."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.tree import flatten
from jaxlm.hf.directory import read_model
from jaxlm.training import loop
from jaxlm.training.config import DataConfig, EvalConfig, Experiment, MeshConfig, OptimConfig, TrainConfig
from jaxlm.training.loop import train
from jaxlm.training.metrics import read_metrics
from jaxlm.training.optimizers.optimizer import make_optimizer
from jaxlm.training.run.checkpoints import Store
from jaxlm.training.run.steps import StepQueue
from jaxlm.training.setup import prepare
from jaxlm.training.state import init_state
from tests.training.programs import shared_programs  # noqa: F401 - a fixture

MODEL = nn.DecoderConfig(width=16, heads=2, layers=1, dropout=0.1)
TIMINGS = ("step_ms", "tokens_per_second", "mfu", "peak_memory_bytes")


def experiment(folder: Path, **changes) -> Experiment:
    """A tiny character model on made-up words; ``changes`` go to its TrainConfig."""
    text = folder / "text.txt"
    if not text.exists():
        words = random.Random(0).choices(["ab", "bcd", "dae", "f", "gha"], k=3000)
        text.write_text(" ".join(words))
    options = dict(steps=30, log_every=1, eval_every=10, checkpoint_every=5, keep_latest=2)
    data = DataConfig(
        train=f"text:{text}[:90%]", valid=f"text:{text}[90%:]", tokenizer_kind="char", seq_len=8, batch_size=8
    )
    return Experiment(model=MODEL, data=data, optim=OptimConfig(lr=1e-2, warmup_steps=5),
                      train=TrainConfig(**options | changes), eval=EvalConfig(batches=4))


def rows(run: Path) -> list[dict]:
    """The logged rows of a run, without timings and without the rows of its starts."""
    return [{name: value for name, value in row.items() if name not in TIMINGS}
            for row in read_metrics(run / "metrics.jsonl") if "start" not in row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_programs):  # noqa: F811
    """Where the data is."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def finished(folder):
    """A training that nothing interrupted."""
    train(experiment(folder), folder / "finished")
    return folder / "finished"


def test_it_learns_and_writes_everything(finished):
    log = read_metrics(finished / "metrics.jsonl")
    training = [row for row in log if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 31))
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert training[0]["step_ms"] is training[0]["tokens_per_second"] is None, "the first step compiles"
    assert all(row["step_ms"] > 0 and row["tokens_per_second"] > 0 for row in training[1:])
    assert all(row["peak_memory_bytes"] > 0 for row in training)
    assert training[0]["mfu"] is None and training[0]["tokens"] == 64 and training[0]["lr"] == pytest.approx(1e-2 / 6)
    assert [row["step"] for row in log if "valid_loss" in row] == [10, 20, 30]
    assert "6 x matrix parameters" in log[0]["start"]["flop_convention"]
    assert {"experiment.json", "tokenizer.json", "metrics.jsonl", "tensorboard", "checkpoints", "model"} <= {
        path.name for path in finished.iterdir()}
    assert list((finished / "tensorboard").iterdir())
    config, params, tokenizer, _ = read_model(finished / "model")
    assert config.vocab_size == tokenizer.vocab_size and flatten(params)["embed/table"].shape[0] == config.vocab_size


def killed(folder: Path, run: Path, step: int) -> None:
    """Trains in another process, and kills it once it has logged ``step``."""
    command = [sys.executable, __file__, str(folder), str(run)]
    here = {"PYTHONPATH": str(Path(loop.__file__).parents[2])}
    with subprocess.Popen(command, env=os.environ | here, stdout=subprocess.DEVNULL) as process:
        log = run / "metrics.jsonl"
        while not (log.exists() and any(row["step"] >= step for row in read_metrics(log))):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        process.kill()


def test_killed_at_a_random_step_it_resumes_bitwise(folder, finished):
    run = folder / "killed"
    killed(folder, run, random.randint(6, 27))
    train(experiment(folder), run)
    assert_same_run(run, finished)


def assert_same_run(run: Path, other: Path) -> None:
    """The same log, and the same model to the last bit."""
    assert rows(run) == rows(other)
    params = flatten(read_model(run / "model")[1])
    for path, leaf in flatten(read_model(other / "model")[1]).items():
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)


def terminate_when(monkeypatch, name: str, call: int) -> None:
    """Sends SIGTERM at the ``call``-th call of a method of the trainer."""
    original, calls = getattr(loop.Trainer, name), []

    def wrapped(self, *args):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(loop.Trainer, name, wrapped)


def terminated(config: Experiment, run: Path, name: str, call: int) -> None:
    """Trains until SIGTERM, which comes at the ``call``-th call of a method."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        terminate_when(patch, name, call)
        with pytest.raises(SystemExit) as stopped:
            train(config, run)
    assert stopped.value.code == 0 and signal.getsignal(signal.SIGTERM) is handler


@pytest.fixture(scope="module")
def interrupted(folder):
    """A training that SIGTERM stopped after step 8, where no checkpoint was due."""
    run = folder / "interrupted"
    terminated(experiment(folder, checkpoint_every=0), run, "advance", 8)
    return run


def test_sigterm_saves_and_exits_with_0(folder, finished, interrupted, tmp_path):
    """Between steps, and then in the middle of a validation, which is done again."""
    assert rows(interrupted)[-1]["step"] == 8 and not (interrupted / "model").exists()
    run = shutil.copytree(interrupted, tmp_path / "run")
    config = experiment(folder, checkpoint_every=0)
    terminated(config, run, "evaluate", 2)  # at 20
    assert rows(run)[-1]["step"] == 20 and not (run / "model").exists()
    train(config, run)
    assert_same_run(run, finished)


def test_another_mesh_may_resume(folder, finished, interrupted, tmp_path):
    run = shutil.copytree(interrupted, tmp_path / "run")
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    train(dataclasses.replace(experiment(folder, checkpoint_every=0), mesh=mesh), run)
    losses, others = ([row["loss"] for row in rows(run) if "loss" in row] for run in (finished, run))
    np.testing.assert_allclose(losses, others, rtol=1e-4)


def test_the_best_may_have_been_saved_in_the_middle_of_its_validation(folder, interrupted, tmp_path, monkeypatch):
    run, config = shutil.copytree(interrupted, tmp_path / "run"), experiment(folder, checkpoint_every=0, keep_latest=1)
    terminated(config, run, "evaluate", 2)  # at 20
    for step, losses in ((24, [1.0]), (None, [2.0])):  # stops between the validations at 20 and 30
        with monkeypatch.context() as patch:
            scripted(patch, losses)
            if step is None:
                train(config, run)
            else:
                terminated(config, run, "advance", step - 20)
    assert read_model(run / "model")[3]["training"]["steps"] == [20]


def test_in_a_thread_rows_hold_the_mean_since_the_last_row(folder, finished, tmp_path):
    """Signals cannot be handled outside the main thread; everything else works there."""
    config = experiment(folder, log_every=10, eval_every=0, checkpoint_every=0)
    thread = threading.Thread(target=train, args=(config, tmp_path))
    thread.start()
    thread.join()
    assert (tmp_path / "model").exists()
    each = [row for row in rows(finished) if "loss" in row]
    found = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in found] == [10, 20, 30]
    for row in found:
        since = each[row["step"] - 10:row["step"]]
        tokens = [one["tokens"] for one in since]
        assert row["tokens"] == sum(tokens)
        assert row["loss"] == pytest.approx(np.average([one["loss"] for one in since], weights=tokens), rel=1e-6)


def test_poison(folder, tmp_path, monkeypatch):
    """A batch with a NaN: abort names the step, skip goes on without it, also after a resumption."""
    original = StepQueue.dispatch

    def dispatch(self, number, state, batch):
        poison = {"weights": batch["weights"] * np.float32(np.nan)} if number == 8 else {}
        return original(self, number, state, batch | poison)

    monkeypatch.setattr(StepQueue, "dispatch", dispatch)
    with pytest.raises(UserError, match="^step 8: .*nan.*train.on_nan"):
        train(experiment(folder, eval_every=0), tmp_path)
    train(experiment(folder, eval_every=0, on_nan="skip"), tmp_path)  # from the checkpoint at step 5
    training = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["skipped"] for row in training] == [0] * 7 + [1] * 23
    assert training[7]["loss"] is None and training[-1]["loss"] < training[0]["loss"] - 0.5
    assert training[8]["lr"] == training[7]["lr"]  # the schedule waits for the update that was skipped


class Scripted:
    """Replaces the validator: returns the given losses, and keeps the parameters that it saw."""

    def __init__(self, losses):
        self.losses, self.seen = iter(losses), []

    def __call__(self, params, reference):
        self.seen.append(jax.tree.map(np.array, params))
        return {"valid_loss": next(self.losses)}


def scripted(monkeypatch, losses) -> Scripted:
    validator = Scripted(losses)
    monkeypatch.setattr(loop, "Validator", lambda *_: validator)
    return validator


def test_patience(folder, tmp_path, monkeypatch):
    scripted(monkeypatch, [3.0, 2.0, 2.5, float("nan"), 1.0])
    train(experiment(folder, eval_every=2, patience=2, checkpoint_every=0), tmp_path)
    assert [row["step"] for row in rows(tmp_path) if "valid_loss" in row] == [2, 4, 6, 8]
    assert rows(tmp_path)[-1]["step"] == 8


def test_export_of_the_best(folder, tmp_path, monkeypatch):
    """The mean of the two best; without a checkpoint that is damaged; and the best alone: of one training, for a run
    that has ended exports again."""
    validator = scripted(monkeypatch, [3.0, 2.0, 4.0, 1.0, 5.0, 5.0])
    config = experiment(folder, eval_every=5, average=2, checkpoint_every=0)

    def assert_mean(path, chosen):
        for name, leaf in flatten(read_model(path)[1]).items():
            expected = np.mean([validator.seen[i][name].astype(np.float64) for i in chosen], 0)
            np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7, err_msg=name)

    assert_mean(train(config, tmp_path), [1, 3])
    original = Store.restore_part

    def restore_part(self, step, name, abstract):
        if step == 20:
            raise UserError("checkpoint 20 cannot be read")
        return original(self, step, name, abstract)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "restore_part", restore_part)
        path = train(config, tmp_path)
    assert read_model(path)[3]["training"]["steps"] == [10]
    assert_mean(path, [1])
    assert_mean(train(changed(config, "train", average=0), tmp_path), [3])
    assert len(validator.seen) == 6


def test_init_from(folder, finished, tmp_path):
    setup = prepare(dataclasses.replace(experiment(folder), init_from=str(finished / "model")), tmp_path)
    state = init_state(setup.initial, make_optimizer(setup.config.optim, 30), 0)
    for path, leaf in flatten(read_model(finished / "model")[1]).items():
        np.testing.assert_array_equal(leaf, state.params[path], err_msg=path)
    with pytest.raises(UserError, match="decoder/layers/0/attn/k/kernel is .*, the model wants"):
        prepare(dataclasses.replace(changed(experiment(folder), "model", layers=2), init_from=str(finished)), tmp_path)


def changed(config: Experiment, section: str, **fields) -> Experiment:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("data", dict(batch_size=12), "batch_size 12 .* 8"),
        ("train", dict(accumulate=3), "batch_size 8 .* 24"),
        ("mesh", dict(data=3), "mesh .* 8 devices"),
        ("mesh", dict(preset="fsdp", compress_gradients="bf16"), "mesh.compress_gradients"),
        ("mesh", dict(rules=("embed/tabel=- -",)), "embed/tabel"),
        ("model", dict(positions="learned", max_positions=4), "8 tokens .* 4 learned positions"),
        ("model", dict(vocab_size=3), "model.vocab_size=3"),
        ("optim", dict(warmup_steps=30), "optim.warmup_steps=30 .*train.steps=30"),
        ("eval", dict(metric="bleu"), "eval.metric .*data.valid"),
        (None, dict(model=nn.preset("tiny")), "seq2seq .*bitext"),
    ],
)
def test_mistakes_are_found_before_the_first_step(folder, tmp_path, section, fields, message):
    """... and nothing is written for them."""
    config = experiment(folder)
    config = changed(config, section, **fields) if section else dataclasses.replace(config, **fields)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_changed_experiment_does_not_resume(folder, finished):
    before = json.loads((finished / "experiment.json").read_text())
    for section, fields, name in (("optim", dict(lr=0.5), "optim.lr"), ("model", dict(width=32), "model.width")):
        with pytest.raises(UserError, match=f"{name} = .*--out"):
            train(changed(experiment(folder), section, **fields), finished)
    assert json.loads((finished / "experiment.json").read_text()) == before


def test_fields_newer_than_a_run_count_as_their_defaults(folder, finished, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(finished / name, tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    older = json.loads((finished / "experiment.json").read_text())
    del older["prune"], older["optim"]["decay_fraction"]
    (tmp_path / "experiment.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match="experiment.json was damaged or changed"):
        prepare(experiment(folder), tmp_path)
    del older["checksum"]  # older files have none
    (tmp_path / "experiment.json").write_text(json.dumps(older))
    assert prepare(experiment(folder), tmp_path).resuming
    with pytest.raises(UserError, match="was trained with optim.decay_fraction = 0.2, not 0.5"):
        prepare(changed(experiment(folder), "optim", decay_fraction=0.5), tmp_path)


if __name__ == "__main__":
    train(experiment(Path(sys.argv[1])), Path(sys.argv[2]))
