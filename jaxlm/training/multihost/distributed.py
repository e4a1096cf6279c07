"""Several processes as one training: reads the environment, starts JAX's runtime, ends when another process dies.

Environment:
    JAX_COORDINATOR_ADDRESS    host:port of process 0
    JAXLM_PROCESS_COUNT        how many processes
    JAXLM_PROCESS_ID           the number of this process, from 0
    JAXLM_HOSTS                optional: the host of each process, in order, separated by commas; messages name them
    JAXLM_START_TIMEOUT        seconds to wait for all of them (300)
    JAXLM_HEARTBEAT_TIMEOUT    seconds after which a silent process is dead (30)

In a SLURM step of several tasks and on the workers of a TPU slice, the environment already gives count and number, and
JAX finds the address.
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

__all__ = ["ProcessInfo", "all_gather_object", "batch_shard", "coordination_client", "distributed_runtime",
           "find_process", "host_names"]

_PAUSE = 2.0  # seconds between checks of the other processes
_GRACE = 5.0  # seconds in which a failure elsewhere may happen here too, with a message of its own
_FAREWELL = 10.0  # seconds that a failed process stays, so that the others can read why it failed
_END = 600.0  # seconds for all processes to reach the end of a training
_FAILED, _HOSTS = "jaxlm/failed", "jaxlm/hosts"


@dataclass(frozen=True)
class ProcessInfo:
    """One process among several."""

    count: int  # of all processes
    index: int  # of this process
    address: str | None = None  # host:port of process 0; None: JAX finds it
    hosts: tuple[str, ...] = ()  # of all processes, where they are known
    devices: tuple[int, ...] | None = ()  # the local devices that this process uses; (): all; None: JAX finds them


def find_process(environ: Mapping[str, str]) -> ProcessInfo | None:
    """This process as the environment describes it; None where it is the only one.

    Raises:
        UserError: when a variable is missing or out of range.
    """
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    hosts = tuple(filter(None, environ.get("JAXLM_HOSTS", "").split(",")))
    devices = None if environ.get("JAX_LOCAL_DEVICE_IDS") else ()
    workers = [name for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if "JAXLM_PROCESS_COUNT" in environ:
        count, index = _number(environ, "JAXLM_PROCESS_COUNT"), _number(environ, "JAXLM_PROCESS_ID")
        process = ProcessInfo(count, index, address, hosts, devices)
        if process.count > 1 and address is None:
            raise UserError("JAXLM_PROCESS_COUNT is set and JAX_COORDINATOR_ADDRESS is not; set it to host:port")
        if not 0 <= process.index < process.count:
            raise UserError(f"JAXLM_PROCESS_ID={process.index} must be from 0 to {process.count - 1}")
    elif "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        if devices == () and environ.get("SLURM_STEP_NUM_TASKS") != environ.get("SLURM_STEP_NUM_NODES"):
            visible = environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")  # one: SLURM has chosen it for this task
            devices = (_number(environ, "SLURM_LOCALID"),) if len(visible) > 1 else ()
        count, index = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID")
        process = ProcessInfo(count, index, address, hosts, devices)
    elif len(workers) > 1 or _number(environ, "MEGASCALE_NUM_SLICES", "1") > 1:
        slices, at = _number(environ, "MEGASCALE_NUM_SLICES", "1"), _number(environ, "MEGASCALE_SLICE_ID", "0")
        index = at * len(workers) + _number(environ, "TPU_WORKER_ID")
        process = ProcessInfo(slices * len(workers), index, address, hosts, None)
    else:
        return None
    return process if process.count > 1 else None


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    try:
        return int(environ.get(name, default))
    except ValueError:
        raise UserError(f"{name}={environ.get(name, default)!r} must be a whole number; the scripts in launch/ set "
                        "all variables of a process") from None


@contextmanager
def distributed_runtime(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Runs the block as one of several processes where the environment says so; otherwise does nothing.

    Must be entered before anything asks JAX for devices. All processes leave the block together. When one dies or
    fails, each of the others prints one line that names it and exits with status 1.

    Raises:
        UserError: when the environment is incomplete, or a process does not start in time.
    """
    process = find_process(environ)
    if process is None:
        yield
        return
    timeout = _number(environ, "JAXLM_START_TIMEOUT", "300")
    heartbeat = _number(environ, "JAXLM_HEARTBEAT_TIMEOUT", "30")
    if process.address:
        rendezvous(process.address, process.index, process.count, process.hosts, timeout)
    if process.index:
        logging.getLogger("jaxlm").setLevel(logging.ERROR)  # process 0 alone logs what all would
    # Without this JAX aborts all processes as soon as one is gone, before any of them can name it.
    jax.config.update("jax_enable_recoverability", True)
    jax.distributed.initialize(
        process.address, process.count if process.address else None, process.index if process.address else None,
        None if process.devices is None else list(process.devices),
        initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat,
    )
    watchdog = _Watchdog(process, heartbeat)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(heartbeat + 3 * _PAUSE)  # a peer may have died: the watchdog then ends this process
        watchdog.fail(error)
        raise
    except Exception as error:
        watchdog.fail(error)
        raise
    except SystemExit:
        watchdog.end()
        raise
    watchdog.end()


def coordination_client() -> Any:
    """The client of JAX's coordination service: barriers, and a store of keys and values. None in a single process."""
    from jax._src import distributed  # it has no public name; Orbax imports it from here too

    return distributed.global_state.client


def host_names() -> dict[int, str]:
    """The host name of each process; a placeholder for processes started without ``distributed_runtime``."""
    client = coordination_client()
    named = client.key_value_dir_get(_HOSTS) if client else []
    known = {int(key.rpartition("/")[2]): name for key, name in named}
    return {i: known.get(i, f"host of process {i}") for i in range(jax.process_count())}


def batch_shard(mesh: Mesh, process: int) -> tuple[int, int]:
    """(shard, number of shards): which part of the rows of each batch a process loads.

    Processes that need the same rows, because layers are split over them, get the same shard.

    Raises:
        UserError: when the mesh gives processes unequal or overlapping parts.
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
                        "multiple or a divisor of the number of devices of a process")
    return parts.index(tuple(sorted(rows[process]))), len(parts)


def all_gather_object(value: Any) -> list[Any]:
    """The value of each process, in order of processes. Values are JSON-safe; all processes must call this."""
    text_N = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.asarray([len(text_N)])))
    padded_N = np.zeros(sizes.max(), np.uint8)
    padded_N[: len(text_N)] = text_N
    texts_PxN = np.atleast_2d(multihost_utils.process_allgather(padded_N))
    return [json.loads(bytes(text_N[:size])) for text_N, size in zip(texts_PxN, sizes, strict=True)]


class _Watchdog:
    """A thread that ends this process when another one is gone or has failed. No collective operation would notice."""

    def __init__(self, process: ProcessInfo, heartbeat: int):
        self._process, self._heartbeat = process, heartbeat
        self._client = coordination_client()
        self._client.key_value_set(f"{_HOSTS}/{process.index}", socket.gethostname())
        self._client.wait_at_barrier(_HOSTS, 1000 * heartbeat)
        self._names = host_names()
        self._leaving = threading.Event()  # this process has failed or is done
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _name(self, index: int) -> str:
        return f"process {index} on {self._names[index]}"

    def _live(self) -> set[int]:
        """The processes that live. Returns when all of them have called this."""
        return set(self._client.get_live_nodes(list(range(self._process.count))))

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
            if (gone := sorted(set(range(self._process.count)) - live)) and not self._leaving.is_set():
                names = ", ".join(map(self._name, gone))
                self._quit(f"lost {names}: killed, or silent for {self._heartbeat} s; run again to go on from the "
                           "newest checkpoint")

    def _quit(self, line: str) -> NoReturn:
        print(f"jaxlm: {line}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread waits for a collective operation that will not end

    def fail(self, error: Exception) -> None:
        """Tells the other processes why this one ends."""
        self._leaving.set()
        reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("UserError: ").split())
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_FAILED}/{self._process.index}", reason[:1000])
            self._client.wait_at_barrier("jaxlm/end", int(1000 * _FAREWELL))  # returns at once where all fail alike
        self._shut_down()

    def end(self) -> None:
        """Waits for the other processes, and leaves with them."""
        self._leaving.set()  # set before the others can be gone
        with suppress(jax.errors.JaxRuntimeError):  # a process was lost that had nothing left to do
            self._client.wait_at_barrier("jaxlm/end", int(1000 * _END))
        self._shut_down()

    def _shut_down(self) -> None:
        """Process 0 leaves last, since the coordinator ends with it."""
        self._over.set()
        if self._process.index == 0:
            self._thread.join(_FAREWELL)
            deadline = time.monotonic() + _FAREWELL
            with suppress(jax.errors.JaxRuntimeError):
                while len(self._live()) > 1 and time.monotonic() < deadline:
                    time.sleep(0.05)
        jax.distributed.shutdown()
