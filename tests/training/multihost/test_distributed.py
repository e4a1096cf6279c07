"""Several processes, as far as one process can test them: environment, rendezvous, rows, checks before step 0."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import AXES, make_mesh
from jaxlm.core.tree import flatten
from jaxlm.data.sources.types import Bitext
from jaxlm.training import validation
from jaxlm.training.config import DataConfig, EvalConfig, Experiment
from jaxlm.training.multihost.distributed import (
    ProcessInfo,
    all_gather_object,
    batch_shard,
    distributed_runtime,
    find_process,
)
from jaxlm.training.multihost.preflight import compare, facts, preflight, timed_all_reduce
from jaxlm.training.multihost.rendezvous import rendezvous
from jaxlm.training.setup import prepare

OURS = {"JAX_COORDINATOR_ADDRESS": "n1:7", "JAXLM_PROCESS_COUNT": "4", "JAXLM_PROCESS_ID": "3"}
SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0"}
EACH_GPU = SLURM | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
SLICES = TPU | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        (OURS | {"JAXLM_HOSTS": "a,b,c,d"}, ProcessInfo(4, 3, "n1:7", ("a", "b", "c", "d"))),
        (OURS | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, ProcessInfo(4, 3, "n1:7", devices=None)),
        (OURS | {"JAXLM_PROCESS_COUNT": "1", "JAXLM_PROCESS_ID": "0"}, None),
        (SLURM, ProcessInfo(2, 1)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "n1:7"}, ProcessInfo(2, 1, "n1:7")),
        (EACH_GPU, ProcessInfo(4, 3, devices=(1,))),
        (EACH_GPU | {"CUDA_VISIBLE_DEVICES": "5"}, ProcessInfo(4, 3)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, None),  # the batch script, not a step
        (TPU, ProcessInfo(2, 1, devices=None)),
        (SLICES, ProcessInfo(6, 5, devices=None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
)
def test_the_environment_says_who_we_are(environ, place):
    assert find_process(environ) == place


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": None}, "JAX_COORDINATOR_ADDRESS"),
        ({"JAXLM_PROCESS_ID": "4"}, "JAXLM_PROCESS_ID=4 "),
        ({"JAXLM_PROCESS_ID": None}, "JAXLM_PROCESS_ID=''"),
        ({"JAXLM_PROCESS_COUNT": "two"}, "JAXLM_PROCESS_COUNT='two'"),
    ],
)
def test_half_an_environment_is_a_mistake(changes, message):
    environ = {name: value for name, value in (OURS | changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        find_process(environ)


def test_alone_nothing_is_started():
    with distributed_runtime({}):
        assert not jax.distributed.is_initialized()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def called(count: int, callers: tuple[int, ...], timeout: float) -> dict[int, str]:
    """The error message of each process that calls ``rendezvous``, "" where there is none."""
    address, said = f"127.0.0.1:{free_port()}", {}

    def call(index):
        try:
            rendezvous(address, index, count, [f"host{i}" for i in range(count)], timeout)
            said[index] = ""
        except UserError as error:
            said[index] = str(error)

    threads = [threading.Thread(target=call, args=(index,)) for index in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_a_rendezvous_ends_when_all_are_there():
    assert called(3, (2, 0, 1), timeout=60) == {0: "", 1: "", 2: ""}


def test_a_rendezvous_names_who_is_missing():
    said = called(4, (2, 0), timeout=0.7)
    assert said[0] == said[2] and "host1 (process 1), host3 (process 3)" in said[0]


def test_without_process_0_a_rendezvous_says_so():
    assert "process 0 did not answer at 127.0.0.1" in called(2, (1,), timeout=0.4)[1]


def mesh_of(processes: np.ndarray, **sizes: int):
    """A mesh whose devices are those of these processes, in order."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = np.array([SimpleNamespace(process_index=int(i)) for i in processes.flat]).reshape(shape)
    return SimpleNamespace(axis_names=AXES, shape=dict(zip(AXES, shape, strict=True)), devices=devices)


@pytest.mark.parametrize(
    ("processes", "sizes", "shares"),
    [
        ([0, 0, 1, 1], dict(data=4), [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], dict(data=2, tensor=2), [(0, 2), (1, 2)]),
        ([0, 1, 0, 1], dict(data=2, tensor=2), [(0, 1), (0, 1)]),  # both need every row: each holds half of each layer
        ([0, 0, 1, 1], dict(stage=2, data=2), [(0, 1), (0, 1)]),
        ([0, 1, 0, 1], dict(data=4), [(0, 2), (1, 2)]),  # the order of a torus
        ([0, 0, 1, 1, 2, 2, 3, 3], dict(data=2, fsdp=2, tensor=2), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], dict(data=2, tensor=4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_share_rows_as_their_devices_do(processes, sizes, shares):
    mesh = mesh_of(np.array(processes), **sizes)
    assert [batch_shard(mesh, process) for process in range(max(processes) + 1)] == shares


def test_rows_that_cannot_be_shared_are_a_mistake():
    with pytest.raises(UserError, match="shared evenly"):
        batch_shard(mesh_of(np.array([0, 0, 0, 1]), data=2, tensor=2), 0)


def test_what_differs_is_named_with_its_host():
    same = {"code": "c", "jax": "1", "experiment": "e", "data": "d", "devices": 4}
    hosts = {0: "alpha", 1: "beta", 2: "gamma"}
    compare({0: same, 1: same, 2: same}, hosts)
    for name in same:
        with pytest.raises(UserError, match=rf"not the same {name} as on alpha .*: gamma \(process 2: other\); "):
            compare({0: same, 1: same, 2: same | {name: "other"}}, hosts)


def experiment(**data) -> Experiment:
    data = dict(train="builtin:phrasebook:train[:30]", tokenizer_kind="char", buckets=(128,)) | data
    model = nn.Seq2SeqConfig(width=16, heads=2, ffn=32, encoder_layers=1, decoder_layers=1)
    return Experiment(model=model, data=DataConfig(**data), eval=EvalConfig(metric="bleu"))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return prepare(experiment(), tmp_path_factory.mktemp("run"))


def test_facts_are_those_of_the_experiment_and_the_data(setup, tmp_path):
    mine = facts(setup)
    assert mine == facts(dataclasses.replace(setup)) and mine["devices"] == 8 and json.loads(json.dumps(mine)) == mine
    other = facts(prepare(experiment(train="builtin:phrasebook:train[30:60]"), tmp_path))
    assert {name for name in other if other[name] != mine[name]} == {"experiment", "data"}
    assert preflight(setup, tmp_path) is None  # alone, there is nothing to compare


def test_an_all_reduce_is_timed():
    assert timed_all_reduce(make_mesh(data=4, tensor=2)) > 0


def test_alone_everything_is_gathered():
    assert all_gather_object({"a": ["ä", 1]}) == [{"a": ["ä", 1]}]


@pytest.mark.parametrize("parts", [1, 3])
def test_processes_share_the_sentences_of_a_validation(setup, monkeypatch, parts):
    """A translator that is right about every sentence gets 100, for any number of processes."""
    source = Bitext("made up", [f"s{i}" for i in range(8)], [f"the sentence number {i} of eight" for i in range(8)])
    right = dict(zip(source.src, source.tgt, strict=True))
    shares = [[right[s] for s in source.src[part:7:parts]] for part in range(parts)]
    seen = []

    def translate(lm, sentences, **options):
        seen.append(list(sentences))
        return [right[s] for s in sentences]

    config = dataclasses.replace(setup.config, eval=EvalConfig(metric="bleu", bleu_sentences=7))
    setup = dataclasses.replace(setup, config=config, valid_source=source)
    monkeypatch.setattr(validation, "translate", translate)
    monkeypatch.setattr(validation, "all_gather_object", lambda mine: [*shares[:-1], mine])
    monkeypatch.setattr(jax, "process_count", lambda: parts)
    monkeypatch.setattr(jax, "process_index", lambda: parts - 1)
    validator = validation.Validator(setup, lambda batch: batch, lambda: None)
    assert validator._bleu(flatten(setup.like)) == pytest.approx(100)
    assert seen == [source.src[parts - 1:7:parts]]
