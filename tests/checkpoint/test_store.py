"""Checkpoints: what comes back, what is kept, and what happens to damage and full disks."""

from __future__ import annotations

import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoint.store import Store
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray
from jaxlm.core.sharding import make_mesh
from jaxlm.core.untrusted import seal, unseal


def make_state(seed: int = 0) -> dict:
    """A tree with every kind of node and leaf that a training state may have."""
    kernel = jnp.asarray(np.random.default_rng(seed).normal(size=(16, 8)), jnp.float32)
    params = {"layers/0/kernel": kernel, "norm/scale": jnp.ones(8, jnp.bfloat16)}
    codes = jnp.arange(32, dtype=jnp.int8).reshape(4, 8)
    return {
        "params": params,
        "opt_state": optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params),
        "keys": (jax.random.key(3), jax.random.split(jax.random.key(4, impl="rbg"), 2)),
        "nnx": nnx.State({"w": nnx.Param(jnp.arange(3.0))}),
        "packed": QArray(codes, jnp.ones((4, 1)), None, 8),
        "step": jnp.int32(seed),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    def data(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(data(x), data(y))


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "checkpoints", keep_latest=1, keep_best=2)
    yield store
    store.close()


def test_everything_comes_back(store):
    state = make_state()
    store.save(7, state, {"examples": 11, "history": [1.5, None]})
    restored, data_state, step = store.restore_latest(abstract(state))
    assert_same(restored, state)
    assert data_state == {"examples": 11, "history": [1.5, None]}
    assert step == 7


def test_an_empty_store_has_nothing(store):
    assert store.restore_latest(make_state()) is None
    assert store.steps() == store.best_steps(3) == []


def test_a_save_is_not_affected_by_what_happens_to_the_arrays_next(store):
    """Training donates its buffers to the next step while the checkpoint is still being written."""
    state = {"x": jnp.arange(100_000.0)}
    expected = np.array(state["x"])
    store.save(1, state, {})
    state["x"] = jax.jit(lambda x: x * 2, donate_argnums=0)(state["x"])
    np.testing.assert_array_equal(store.restore(1, abstract(state))[0]["x"], expected)


@pytest.mark.parametrize(("mode", "best"), [("min", [20, 40]), ("max", [10, 40])])
def test_the_latest_and_the_best_are_kept_across_restarts(tmp_path, mode, best):
    scores = {10: 1.0, 20: 0.5, 30: None, 40: 0.7, 50: None}
    for steps in ([10, 20, 30], [40, 50]):
        store = Store(tmp_path, keep_latest=1, keep_best=2, metric_mode=mode)
        for step in steps:
            store.save(step, {"x": jnp.ones(2)}, {}, scores[step])
            store.wait()
            assert step in store.steps()  # however bad it is
        store.close()
    reopened = Store(tmp_path, keep_latest=1, keep_best=2, metric_mode=mode)
    assert reopened.steps() == sorted([*best, 50])
    assert reopened.best_steps(2) == best
    assert reopened.best_steps(1) == best[:1]
    reopened.close()


def test_restoring_onto_another_mesh(store):
    array = jnp.arange(64.0).reshape(8, 8)
    specs = [
        NamedSharding(make_mesh(data=8), PartitionSpec("data")),
        NamedSharding(make_mesh(data=1, fsdp=2, tensor=4), PartitionSpec("tensor", "fsdp")),
        NamedSharding(make_mesh(data=2, devices=jax.devices()[:2]), PartitionSpec()),
    ]
    store.save(1, {"x": jax.device_put(array, specs[0])}, {})
    for spec in specs:
        restored = store.restore(1, {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=spec)})[0]["x"]
        assert restored.sharding == spec
        np.testing.assert_array_equal(restored, array)


def test_parameters_alone(store):
    state = make_state()
    store.save(1, state, {})
    store.wait()
    params = store.restore_part(1, "params", jax.eval_shape(lambda: state["params"]))
    assert_same(params, state["params"])


def _truncate(step):
    for file in step.glob("state/**/*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def _lose_data(step):
    shutil.rmtree(step / "state" / "ocdbt.process_0")
    shutil.rmtree(step / "state" / "d")


def _lose_manifest(step):
    (step / "state" / "manifest.ocdbt").unlink()


def _lose_position(step):
    (step / "data" / "metadata").write_text('{"data_st')


def _mistype(step):
    file = step / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit_timestamp_nsecs": "x"}))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves reads under way
@pytest.mark.parametrize("damage", [
    _truncate, _lose_position, _mistype, pytest.param(_lose_data, marks=pytest.mark.slow),
    pytest.param(_lose_manifest, marks=pytest.mark.slow),
], ids=lambda f: f.__name__)
def test_damage_falls_back_to_the_newest_good_checkpoint(tmp_path, caplog, damage):
    store = Store(tmp_path, keep_latest=3)
    for step in (10, 20, 30):
        store.save(step, make_state(step), {"examples": step})
    store.close()
    damage(tmp_path / "30")
    store = Store(tmp_path, keep_latest=3)
    restored, data_state, step = store.restore_latest(abstract(make_state()))
    assert (step, data_state) == (20, {"examples": 20})
    assert_same(restored, make_state(20))
    assert "checkpoint 30 is damaged" in caplog.text
    assert ("going back to 20" in caplog.text) != (damage is _mistype)  # Orbax would not even begin
    assert store.steps() == [10, 20]
    assert (tmp_path / "30.damaged").is_dir()
    store.save(30, make_state(31), {"examples": 30})  # training gets there again
    assert_same(store.restore_latest(abstract(make_state()))[0], make_state(31))
    store.close()


def test_a_flipped_bit_of_an_array_is_noticed(tmp_path, caplog):
    """Orbax does not see it: small arrays are in its index, which has checksums, but large ones are not."""
    states = {step: {"params": {"w": jax.random.bits(jax.random.key(step), (256, 256)), "b": jnp.ones(3)}}
              for step in (1, 2)}
    store = Store(tmp_path, keep_latest=2)
    for step, state in states.items():
        store.save(step, state, {})
    store.wait()
    weight = np.asarray(states[2]["params"]["w"]).tobytes()[:8]
    files = [file for file in (tmp_path / "2" / "state").glob("**/*") if file.is_file() and weight in file.read_bytes()]
    assert files  # random bits are stored as they are
    for file in files:
        data = bytearray(file.read_bytes())
        data[data.index(weight) + 1] ^= 1
        file.write_bytes(data)
    message = f"checkpoint {tmp_path / '2'} cannot be read: params/w is damaged, its checksum is wrong"
    like = abstract(states[2])
    for restore in (lambda: store.restore(2, like), lambda: store.restore_part(2, "params", like["params"])):
        with pytest.raises(UserError) as caught:
            restore()
        assert str(caught.value) == message
    whole = {"b": like["params"]["b"]}
    assert_same(store.restore_part(2, "params", whole), {"b": states[2]["params"]["b"]})
    restored, _, step = store.restore_latest(like)
    assert step == 1 and "checkpoint 2 is damaged (params/w is damaged" in caplog.text
    assert_same(restored, states[1])
    store.close()


@pytest.mark.parametrize("damage", [
    lambda text: text.replace("1234", "1235"),  # where the data stood
    lambda text: text.replace('"score": 0.5', '"score": 0.1'),
    lambda text: text.replace('"data_state"', '"data_stats"'),
    lambda text: text.replace('"checksum"', '"checksun"'),
    lambda text: text.replace('"version"', '"versioo"'),
    lambda text: json.dumps(seal(unseal(json.loads(text)) | {"checksums": {}})),  # none of the arrays
], ids=["position", "score", "name", "checksum", "version", "arrays"])
def test_the_json_of_a_checkpoint_has_a_checksum(tmp_path, damage):
    store = Store(tmp_path)
    store.save(1, {"x": jnp.ones(4)}, {"examples": 1234}, 0.5)
    store.close()
    path = tmp_path / "1" / "data" / "metadata"
    changed = damage(text := path.read_text())
    assert changed != text
    path.write_text(changed)
    store = Store(tmp_path, read_only=True)
    with pytest.raises(UserError, match="checkpoint .*1 cannot be read: .*checksum is (missing|wrong)"):
        store.restore(1, {"x": jnp.ones(4)})
    store.close()


def test_checkpoints_from_before_the_json_had_a_checksum_load(tmp_path):
    state = {"x": jnp.arange(4.0), "y": jnp.ones(2, jnp.bfloat16)}
    store = Store(tmp_path)
    store.save(1, state, {"examples": 7})
    store.close()
    path = tmp_path / "1" / "data" / "metadata"
    data = unseal(json.loads(path.read_text()))
    del data["version"]
    data["checksums"] = {name: [dtype, total] for name, (dtype, _, total) in data["checksums"].items() if name == "x"}
    path.write_text(json.dumps(data))
    store = Store(tmp_path)
    restored, data_state = store.restore(1, abstract(state))
    assert_same(restored, state)
    assert data_state == {"examples": 7}
    store.close()


def test_another_type_is_converted_after_the_checksum_is_compared(store):
    store.save(1, {"x": jnp.array([1.0, 1 + 2**-20])}, {})
    like = {"x": jax.ShapeDtypeStruct((2,), jnp.bfloat16, sharding=jnp.ones(2).sharding)}
    np.testing.assert_array_equal(store.restore(1, like)[0]["x"], jnp.ones(2, jnp.bfloat16))


def test_a_state_of_another_shape_is_refused_and_nothing_is_touched(tmp_path):
    store = Store(tmp_path, keep_latest=2)
    for step in (1, 2):
        store.save(step, {"x": jnp.ones(4)}, {})
    store.wait()
    for other in ({"x": jnp.ones(5)}, {"y": jnp.ones(4)}, {"x": jnp.ones(4), "y": jnp.ones(1)}):
        with pytest.raises(UserError, match="no checkpoint in .* can be read"):
            store.restore_latest(other)
    assert store.steps() == [1, 2]
    with pytest.raises(UserError, match="checkpoint .*7 cannot be read"):
        store.restore(7, {"x": jnp.ones(4)})
    store.close()


def test_a_full_disk_costs_nothing_but_the_new_checkpoint(tmp_path):
    small, large = {"x": jnp.ones(8)}, {"x": jax.random.normal(jax.random.key(0), (400_000,))}
    store = Store(tmp_path)
    store.save(1, small, {"examples": 1})
    store.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError, match="no space left for a checkpoint in"):
            store.save(2, large, {"examples": 2})
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.steps() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    assert_same(store.restore_latest(abstract(small))[0], small)
    store.save(2, large, {"examples": 2})
    store.wait()
    assert store.steps() == [2]
    store.close()


def test_looking_disturbs_nobody_who_writes(tmp_path):
    store = Store(tmp_path)
    store.save(1, {"x": jnp.ones(4)}, {}, 0.5)
    store.wait()
    underway = tmp_path / "2.orbax-checkpoint-tmp"
    underway.mkdir()
    looking = Store(tmp_path, read_only=True)
    assert looking.best_steps(1) == [1]
    looking.close()
    assert underway.is_dir()
    store.close()


def test_a_store_leaves_the_signal_to_stop_to_others(store, monkeypatch):
    """JAX takes the number that it is asked with for the caller's place in the training."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: bool(asked.append(step)))
    store.save(7, {"x": jnp.ones(3)}, {})
    store.wait()
    assert store.steps() == [7] and not asked
