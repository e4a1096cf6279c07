"""Fine-tuning: adapters, averages and their runs, on disk and over devices."""

from __future__ import annotations

import dataclasses
import json
import random

import jax
import numpy as np
import optax
import pytest

import jaxlm
from jaxlm.core.config import from_dict
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import LoRA
from jaxlm.core.sharding import batch_sharding, make_mesh
from jaxlm.core.tree import flatten
from jaxlm.core.untrusted import read_sealed_json
from jaxlm.training import loop
from jaxlm.training.config import DataConfig, Experiment, LoraConfig, OptimConfig, TrainConfig
from jaxlm.training.loop import train
from jaxlm.training.metrics import read_metrics
from jaxlm.training.objectives.loss import lm_loss
from jaxlm.training.partition import Partition
from jaxlm.training.run.checkpoints import Store, fresh_state
from jaxlm.training.run.export import Exporter
from jaxlm.training.run.signals import StopSignal
from jaxlm.training.setup import prepare
from jaxlm.training.state import abstract_state, init_state
from jaxlm.training.step import StepOptions, make_step
from tests.training.llamas import batch, tiny_llama
from tests.training.programs import shared_programs  # noqa: F401 - a fixture
from tests.training.test_lora import adapted

DECAY = 0.8  # of the moving average


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def experiment(base, tmp_path_factory):
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(["ab", "bcd", "dae", "f", "gha"], k=800)))
    data = DataConfig(train=f"text:{text}[:90%]", valid=f"text:{text}[90%:]", tokenizer_kind="char", seq_len=8,
                      batch_size=8)
    return Experiment(
        data=data, optim=OptimConfig(lr=0.02, warmup_steps=2, weight_decay=0.0), init_from=str(base),
        train=TrainConfig(
            steps=8, log_every=1, eval_every=4, checkpoint_every=1, keep_latest=8, keep_best=1, ema=DECAY),
        lora=LoraConfig(rank=2, alpha=4.0, dropout=0.1, base="nf4-g16", target=".*/(q|v|up|down)/kernel"),
    )


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory, shared_programs):  # noqa: F811
    run = tmp_path_factory.mktemp("run")
    return run, train(experiment, run)


def test_a_run_of_adapters(experiment, finished, base):
    """The model comes from the base; the run exports an adapter, which is loaded by the name of the run."""
    run, path = finished
    assert path == run / "adapter" and not (run / "model").exists()
    settings = json.loads((path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and settings["r"] == 2
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert np.mean([row["loss"] for row in rows[-2:]]) < 0.9 * rows[0]["loss"]
    lm = jaxlm.load(run, merge=False)
    assert sum(isinstance(leaf, LoRA) for leaf in flatten(lm.params).values()) == 4
    assert lm.tokenizer.vocab_size <= lm.config.vocab_size
    stored = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(flatten(lm.params)))
    assert json.loads((run / "experiment.json").read_text())["model"]["width"] == 16
    assert not list((run / "checkpoints").rglob("*frozen*")) and stored > 0 and trained > 0


def adapters_at_the_start(run):
    """The trained arrays of a run at step 0, by path."""
    config = from_dict(Experiment, read_sealed_json(run / "experiment.json"), stored=True)
    params = flatten(prepare(config, run).initial)
    return Partition(params).split(params)[0]


def test_resumed_is_uninterrupted(experiment, finished, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    advance = loop.Trainer.advance

    def until_five(self, each):
        if self.position.step == 5:
            raise Stopped
        advance(self, each)

    monkeypatch.setattr(loop.Trainer, "advance", until_five)
    with pytest.raises(Stopped):
        train(experiment, tmp_path)
    monkeypatch.undo()
    path = train(experiment, tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (path / name).read_bytes() == (finished[1] / name).read_bytes()


def test_merged_besides(experiment, finished, tmp_path):
    """The merged model is the one that was trained and validated, over the rounded weights."""
    merging = dataclasses.replace(experiment, lora=dataclasses.replace(experiment.lora, merge=True))
    setup = prepare(merging, tmp_path)
    trainer = loop.Trainer(setup, tmp_path, StopSignal())
    trainer.state = fresh_state(setup, trainer.program)
    Exporter(setup, trainer.program.compression, tmp_path).write(trainer.model_params(), [0], lambda _: None)
    merged, apart = jaxlm.load(tmp_path / "model"), jaxlm.load(tmp_path / "adapter")
    trained = merged.replace(params=setup.initial)
    np.testing.assert_allclose(merged(batch()["inputs"]), trained(batch()["inputs"]), atol=1e-4)
    assert np.abs(np.asarray(merged(batch()["inputs"]) - apart(batch()["inputs"]))).max() > 1e-2


@pytest.mark.parametrize("options", [
    pytest.param({"base": "nf4-g16", "dora": True}, marks=pytest.mark.slow), {"base": "w4a16-rtn-g16"},
], ids=lambda options: options["base"])
def test_sharded_is_unsharded(base, options):
    lm, data = adapted(base, target=".*/(q|up|down)/kernel", **options), batch(8)
    tx = optax.sgd(0.1, momentum=0.9)

    def two_steps(mesh):
        layout = placed = None
        if mesh is not None:
            layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(lm.params, tx, mesh))
            placed = jax.device_put(data, batch_sharding(mesh))
        step = make_step(lm.graphdef, lm.params, lm_loss, tx, layout=layout, options=StepOptions(accumulate=2))
        state, losses = init_state(lm.params, tx, 0, layout), []
        for _ in range(2):
            state, metrics = step(state, placed or data)
            losses.append(float(metrics["loss"]))
        return state, losses

    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        state, losses = two_steps(mesh)
    other, others = two_steps(None)
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    for path, leaf in other.params.items():
        np.testing.assert_allclose(np.asarray(state.params[path]), leaf, atol=1e-5, err_msg=path)
    codes = state.frozen["decoder/layers/0/mlp/up/kernel"].base.codes
    assert codes.addressable_shards[0].data.size * 4 == codes.size


def test_the_average_is_validated_and_exported(finished):
    """The average equals a loop of the formula; checkpoints hold it, and the run is loaded with that of the best."""
    run, path = finished
    trained = {name: leaf for name, leaf in flatten(jaxlm.load(path, merge=False).params).items()
               if isinstance(leaf, LoRA)}
    like = {f"{name}/{part}": getattr(leaf, part) for name, leaf in trained.items() for part in ("a", "b")}
    store = Store(run / "checkpoints", keep_latest=8, read_only=True)
    valid = {row["step"]: row["valid_loss"] for row in read_metrics(run / "metrics.jsonl") if "valid_loss" in row}
    best = min(valid, key=valid.get)
    assert sorted(valid) == [4, 8]
    initial = adapters_at_the_start(run)
    mean = {name: np.asarray(initial[name], np.float64) for name in like}
    for step in range(1, best + 1):
        params = store.restore_part(step, "params", like)
        rate = min(DECAY, step / (step + 9))
        mean = {name: rate * leaf + (1 - rate) * np.asarray(params[name]) for name, leaf in mean.items()}
    average = store.restore_part(best, "average", like)
    store.close()
    for name, leaf in mean.items():
        np.testing.assert_allclose(average[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(like[name], average[name], err_msg=name)
        assert np.abs(like[name] - np.asarray(params[name])).max() > 1e-4


def test_mistakes(experiment, tmp_path):
    for changes, message in [
        ({"init_from": ""}, "init_from"),
        ({"init_from": "", "model": jaxlm.nn.DecoderConfig(width=16, heads=2, layers=1)}, "lora.rank .*init_from"),
        ({"lora": LoraConfig(rank=-1)}, "lora.rank=-1"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(dataclasses.replace(experiment, **changes), tmp_path)
