"""Checks before step 0 of a training of several processes: all are there, with the same code, experiment and data."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.core.config import to_dict
from jaxlm.core.errors import UserError
from jaxlm.core.untrusted import read_sealed_json
from jaxlm.training.multihost.distributed import coordination_client, host_names
from jaxlm.training.setup import Setup

__all__ = ["compare", "preflight", "timed_all_reduce"]

_BYTES = 4 << 20  # of the all-reduce that is timed
_VISIBLE = 60.0  # seconds that a network file system may take to show a new file

# What must be the same in all processes, and the remedy where it is not.
_REMEDIES = {
    "code": "install the same jaxlm on every host",
    "jax": "install the same versions on every host",
    "experiment": "start all processes with the same CONFIG.py and options",
    "data": "give every host the same files",
    "devices": "give every process the same number of devices",
}


def preflight(setup: Setup, run: Path, timeout: float = 300.0) -> str | None:
    """Compares the processes, and returns a line for the user about them; None where this process is the only one.

    Process 0 must have written ``run/experiment.json`` before.

    Raises:
        UserError: when a process differs from process 0, does not see ``run``, or has not called this ``timeout``
            seconds after this process; the message names its host.
    """
    if jax.process_count() == 1:
        return None
    client = coordination_client()
    if client is None:
        raise UserError(
            f"there are {jax.process_count()} processes without a coordinator; start them with a script of "
            "launch/, or call jax.distributed.initialize() first"
        )
    mine = facts(setup)
    client.key_value_set(f"jaxlm/preflight/{jax.process_index()}", json.dumps(mine), allow_overwrite=True)
    try:
        client.wait_at_barrier("jaxlm/preflight", int(1000 * timeout))
    except jax.errors.JaxRuntimeError:
        there = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get("jaxlm/preflight")}
        names = host_names()
        missing = ", ".join(f"{names[i]} (process {i})" for i in range(jax.process_count()) if i not in there)
        raise UserError(f"not ready for step 0 after {timeout:.0f} s: {missing}; look in its log") from None
    found = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get("jaxlm/preflight")}
    compare(found, host_names())
    _check_shared(setup, run)
    hosts, milliseconds = len(set(host_names().values())), 1e3 * timed_all_reduce(setup.mesh)
    return (
        f"preflight: {len(found)} processes of {mine['devices']} devices on {hosts} hosts; code {mine['code']}, "
        f"experiment {mine['experiment']}; all-reduce of {_BYTES >> 20} MiB: {milliseconds:.1f} ms"
    )


def facts(setup: Setup) -> dict[str, str | int]:
    """What must be the same in all processes of a training."""
    code = hashlib.sha256()
    package = Path(__file__).parents[2]
    for path in sorted(package.rglob("*.py")):
        code.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    data = [setup.loader.report(), setup.tokenizer.vocab_size]
    return {
        "code": code.hexdigest()[:12], "jax": jax.__version__, "experiment": _digest(to_dict(setup.config)),
        "data": _digest(data), "devices": jax.local_device_count(),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def compare(found: Mapping[int, Mapping[str, str | int]], hosts: Mapping[int, str]) -> None:
    """Compares the ``facts`` of all processes with those of process 0.

    Raises:
        UserError: when a process differs; the message names its host, the fact and both values.
    """
    for name, remedy in _REMEDIES.items():
        others = [i for i in sorted(found) if found[i][name] != found[0][name]]
        if others:
            named = ", ".join(f"{hosts[i]} (process {i}: {found[i][name]})" for i in others)
            raise UserError(f"not the same {name} as on {hosts[0]} (process 0: {found[0][name]}): {named}; {remedy}")


def _check_shared(setup: Setup, run: Path) -> None:
    """Raises UserError where this process does not see the file that process 0 has written."""
    path, deadline = run / "experiment.json", time.monotonic() + _VISIBLE
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{host_names()[jax.process_index()]} does not see {run}, which process 0 has written; "
                "choose an --out on a file system that all hosts share"
            )
        time.sleep(1)
    if read_sealed_json(path) != json.loads(json.dumps(to_dict(setup.config))):
        raise UserError(
            f"{host_names()[jax.process_index()]} sees another {path} than process 0; "
            "choose an --out on a file system that all hosts share"
        )


def timed_all_reduce(mesh: Mesh) -> float:
    """Seconds of an all-reduce of 4 MiB over all devices, the best of three.

    Raises:
        UserError: when the sum is wrong.
    """
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (mesh.size, _BYTES // 4)
    x_NxK = jax.make_array_from_callback(shape, everywhere, lambda at: np.ones((1, shape[1]), np.float32))
    add = jax.jit(lambda x_NxK: jnp.sum(x_NxK, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    total_K = add(x_NxK).block_until_ready()
    if not np.all(np.asarray(total_K) == mesh.size):
        raise UserError(f"a sum over {mesh.size} devices came out wrong; test the network and the devices")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        add(x_NxK).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)
