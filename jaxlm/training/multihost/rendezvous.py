"""Waits for all processes before JAX starts, since JAX's own time-out does not name the process that is missing.

Process 0 listens at the address that JAX's coordinator will have. Every other process connects, sends its number,
and gets an answer: an empty line once all are there, or an error message.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence

from jaxlm.core.errors import UserError

__all__ = ["rendezvous"]

_RETRY = 0.2  # seconds


def rendezvous(address: str, index: int, count: int, hosts: Sequence[str], timeout: float) -> None:
    """Returns when all processes have called this.

    Args:
        address: ``host:port`` of process 0.
        index: number of this process.
        count: number of processes.
        hosts: the host of each process, for the message that names the missing ones; empty where they are not known.
        timeout: seconds from the call on.

    Raises:
        UserError: in each process that has called this, when others have not after ``timeout`` seconds.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    if index == 0:
        _answer(int(port), count, hosts, deadline, timeout)
    else:
        _call(host.strip("[]"), int(port), index, deadline, timeout)


def _answer(port: int, count: int, hosts: Sequence[str], deadline: float, timeout: float) -> None:
    called: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as error:
            raise UserError(f"port {port} of the coordinator is not free ({error.strerror}); choose another") from None
        while len(called) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # something else connected to the port
                caller = stack.enter_context(server.accept()[0])
                caller.settimeout(10)
                called[int(caller.makefile().readline())] = caller
        missing = sorted(set(range(1, count)) - set(called))
        named = ", ".join(f"{hosts[i]} (process {i})" if len(hosts) == count else f"process {i}" for i in missing)
        line = f"no word after {timeout:.0f} s from {named}; start it, or look in its log" if missing else ""
        for caller in called.values():
            with contextlib.suppress(OSError):  # it is gone, which JAX will report
                caller.sendall(f"{line}\n".encode())
    if missing:
        raise UserError(line)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _call(host: str, port: int, index: int, deadline: float, timeout: float) -> None:
    problem: Exception | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as caller:
                caller.sendall(f"{index}\n".encode())
                caller.settimeout(left + 10)  # process 0 may have begun to wait later
                answer = caller.makefile().readline()
        except OSError as error:
            problem = error
        else:
            if answer == "\n":
                return
            if answer:
                raise UserError(answer.strip())
        time.sleep(_RETRY)
    raise UserError(
        f"process 0 did not answer at {host}:{port} within {timeout:.0f} s ({problem}); start it, or look in its log"
    )
