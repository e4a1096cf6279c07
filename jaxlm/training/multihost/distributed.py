"""Several processes as one training: finds the others where the environment says that there are any, starts JAX's
runtime, and ends this process when another one dies.

Environment:
    JAX_COORDINATOR_ADDRESS    host:port of process 0
    JAXLM_PROCESS_COUNT        how many processes
    JAXLM_PROCESS_ID           which one this is
    JAXLM_HOSTS                their hosts, in order, with commas: names for messages; may be left out
    JAXLM_START_TIMEOUT        seconds to wait for all of them (300)
    JAXLM_HEARTBEAT_TIMEOUT    seconds after which a silent process is dead (30)

In a SLURM step of several tasks and on the workers of a TPU slice, count and number are known without these, and JAX
finds an address where none is given.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlm.core.errors import UserError
from jaxlm.core.sharding import RULES
from jaxlm.training.multihost.rendezvous import rendezvous

__all__ = ["ProcessInfo", "coordination_client", "find_process", "all_gather_object", "host_names", "distributed_runtime", "batch_shard"]

_PAUSE = 2.0  # seconds between looks at the others
_GRACE = 5.0  # seconds in which what failed elsewhere may fail here too, with a message of its own
_FAREWELL = 10.0  # seconds a failed process stays, so that the others read why
_END = 600.0  # seconds for all to come to the end of a training
_FAILED, _HOSTS = "jaxlm/failed", "jaxlm/hosts"


@dataclass(frozen=True)
class ProcessInfo:
    """One process among several. ``address`` and ``devices`` (which local ones it uses; none: all) are None where JAX
    finds them."""

    count: int
    index: int
    address: str | None = None
    hosts: tuple[str, ...] = ()
    devices: tuple[int, ...] | None = ()


def find_process(environ: Mapping[str, str]) -> ProcessInfo | None:
    """Where the environment puts this process; None where it is alone. UserError where it says so by halves."""
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    hosts = tuple(filter(None, environ.get("JAXLM_HOSTS", "").split(",")))
    devices = None if environ.get("JAX_LOCAL_DEVICE_IDS") else ()
    workers = [name for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if "JAXLM_PROCESS_COUNT" in environ:
        place = ProcessInfo(_number(environ, "JAXLM_PROCESS_COUNT"), _number(environ, "JAXLM_PROCESS_ID"), address, hosts,
                      devices)
        if place.count > 1 and address is None:
            raise UserError("JAXLM_PROCESS_COUNT is set and JAX_COORDINATOR_ADDRESS is not; set it to host:port")
        if not 0 <= place.index < place.count:
            raise UserError(f"JAXLM_PROCESS_ID={place.index} is none of {place.count} processes; count from 0")
    elif "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        if devices == () and environ.get("SLURM_STEP_NUM_TASKS") != environ.get("SLURM_STEP_NUM_NODES"):
            visible = environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")  # one: SLURM has chosen it for this task
            devices = (_number(environ, "SLURM_LOCALID"),) if len(visible) > 1 else ()
        place = ProcessInfo(_number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID"), address, hosts,
                      devices)
    elif len(workers) > 1 or _number(environ, "MEGASCALE_NUM_SLICES", "1") > 1:
        slices, at = _number(environ, "MEGASCALE_NUM_SLICES", "1"), _number(environ, "MEGASCALE_SLICE_ID", "0")
        index = at * len(workers) + _number(environ, "TPU_WORKER_ID")
        place = ProcessInfo(slices * len(workers), index, address, hosts, None)
    else:
        return None
    return place if place.count > 1 else None


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    try:
        return int(environ.get(name, default))
    except ValueError:
        raise UserError(f"{name}={environ.get(name, default)!r} must be a whole number; set all that belong to it "
                        "(launch/ has scripts that do)") from None


@contextmanager
def distributed_runtime(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """The block runs as one of several processes where the environment says so, and as it is elsewhere.

    Must come before anything that asks JAX for devices. All processes leave together. When one dies or fails, each of
    the others prints one line that names it and exits with status 1.
    """
    place = find_process(environ)
    if place is None:
        yield
        return
    timeout = _number(environ, "JAXLM_START_TIMEOUT", "300")
    heartbeat = _number(environ, "JAXLM_HEARTBEAT_TIMEOUT", "30")
    if place.address:
        rendezvous(place.address, place.index, place.count, place.hosts, timeout)
    if place.index:
        logging.getLogger("jaxlm").setLevel(logging.ERROR)  # what all could say, process 0 says
    # Without this JAX aborts all processes as soon as one is gone, before anyone can say which.
    jax.config.update("jax_enable_recoverability", True)
    jax.distributed.initialize(
        place.address, place.count if place.address else None, place.index if place.address else None,
        None if place.devices is None else list(place.devices),
        initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat,
    )
    watch = _Watch(place, heartbeat)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(heartbeat + 3 * _PAUSE)  # a peer may have died: the watch will know, and ends this process
        watch.fail(error)
        raise
    except Exception as error:
        watch.fail(error)
        raise
    except SystemExit:
        watch.end()
        raise
    watch.end()


def coordination_client() -> Any:
    """The client of JAX's coordinator: barriers, and a store of keys and values."""
    from jax._src import distributed  # has no public name; Orbax takes it from here too

    return distributed.global_state.client


def host_names() -> dict[int, str]:
    """The host of each process, as it calls itself; of those started without ``distributed_runtime`` only the number is known."""
    client = coordination_client()
    named = client.key_value_dir_get(_HOSTS) if client else []
    known = {int(key.rpartition("/")[2]): name for key, name in named}
    return {i: known.get(i, f"host of process {i}") for i in range(jax.process_count())}


def batch_shard(mesh: Mesh, process: int) -> tuple[int, int]:
    """(part, parts): of the parts that the rows of a batch are cut into, the one for a process.

    Processes that hold the same rows, because layers are split over them, get the same part.
    """
    batch = [axis for axis in RULES["batch"] if axis in mesh.axis_names]
    others = [axis for axis in mesh.axis_names if axis not in batch]
    order = [mesh.axis_names.index(axis) for axis in (*batch, *others)]
    ways = math.prod(mesh.shape[axis] for axis in batch)
    devices_WxO = mesh.devices.transpose(order).reshape(ways, -1)
    rows: dict[int, set[int]] = {}
    for way, devices in enumerate(devices_WxO):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(way)
    parts = sorted({tuple(sorted(mine)) for mine in rows.values()})
    if sum(map(len, parts)) != ways or len({len(part) for part in parts}) > 1:
        raise UserError("the rows of a batch cannot be shared evenly by these processes; make each mesh axis a "
                        "multiple or a divisor of a process's devices")
    return parts.index(tuple(sorted(rows[process]))), len(parts)


def all_gather_object(value: Any) -> list[Any]:
    """What each process gave, in order; JSON-safe. All must call."""
    text_N = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.asarray([len(text_N)])))
    padded_N = np.zeros(sizes.max(), np.uint8)
    padded_N[: len(text_N)] = text_N
    texts_PxN = np.atleast_2d(multihost_utils.process_allgather(padded_N))
    return [json.loads(bytes(text_N[:size])) for text_N, size in zip(texts_PxN, sizes, strict=True)]


class _Watch:
    """A thread that ends this process when another one is gone or has failed: no collective operation would."""

    def __init__(self, place: ProcessInfo, heartbeat: int):
        self._place, self._heartbeat = place, heartbeat
        self._client = coordination_client()
        self._client.key_value_set(f"{_HOSTS}/{place.index}", socket.gethostname())
        self._client.wait_at_barrier(_HOSTS, 1000 * heartbeat)
        self._names = host_names()
        self._leaving = threading.Event()  # this process has failed or is done
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _name(self, index: int) -> str:
        return f"process {index} on {self._names[index]}"

    def _live(self) -> set[int]:
        """Who lives; returns when all of those have asked."""
        return set(self._client.get_live_nodes(list(range(self._place.count))))

    def _run(self) -> None:
        while not self._over.wait(_PAUSE):
            try:
                failed = self._client.key_value_dir_get(_FAILED)
                if failed and not self._leaving.wait(_GRACE):
                    key, reason = failed[0]
                    self._quit(f"{self._name(int(key.rpartition('/')[2]))} failed: {reason}")
                live = self._live()
            except jax.errors.JaxRuntimeError:
                if not self._leaving.is_set():
                    self._quit(f"{self._name(0)} is gone, and with it the coordinator")
                return
            if (gone := sorted(set(range(self._place.count)) - live)) and not self._leaving.is_set():
                names = ", ".join(map(self._name, gone))
                self._quit(f"lost {names}: killed, or silent for {self._heartbeat} s; run again to go on from the "
                           "newest checkpoint")

    def _quit(self, line: str) -> NoReturn:
        print(f"jaxlm: {line}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread waits for a collective that will not end

    def fail(self, error: Exception) -> None:
        """Tells the others why this process ends."""
        self._leaving.set()
        reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("UserError: ").split())
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_FAILED}/{self._place.index}", reason[:1000])
            self._client.wait_at_barrier("jaxlm/end", int(1000 * _FAREWELL))  # at once where all fail alike
        self._shut_down()

    def end(self) -> None:
        """Waits for the others, and leaves with them."""
        self._leaving.set()  # before the others can be gone
        with suppress(jax.errors.JaxRuntimeError):  # one is lost that had nothing left to do
            self._client.wait_at_barrier("jaxlm/end", int(1000 * _END))
        self._shut_down()

    def _shut_down(self) -> None:
        """Process 0, at whose exit the coordinator goes, is the last to leave."""
        self._over.set()
        if self._place.index == 0:
            self._thread.join(_FAREWELL)
            deadline = time.monotonic() + _FAREWELL
            with suppress(jax.errors.JaxRuntimeError):
                while len(self._live()) > 1 and time.monotonic() < deadline:
                    time.sleep(0.05)
        jax.distributed.shutdown()
