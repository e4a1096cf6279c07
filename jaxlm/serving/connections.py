"""Connections whose clients keep the server waiting: half-sent headers, answers that nobody reads, too many of them.

uvicorn has no deadline on headers or on sending, and neither hypercorn nor granian has one on sending. Its protocol
class is extended here by what nginx does: a connection that waits for its client too long is closed, and when there are
too many connections, the one that has waited for its client longest makes room for the new one.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxlm.serving.access import client_network

__all__ = ["Connection", "ConnectionLimits"]

_PROGRESS = 1 << 16  # bytes that a client must read within ``ConnectionLimits.waiting`` seconds
_SEND_BUFFER = 1 << 17  # bytes of the system's buffer; it would grow to megabytes for a client that reads nothing


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the connections of a server.

    Attributes:
        total: connections at once.
        of_client: of them, from one address (IPv6: from one network of 64 bits).
        waiting: seconds that a connection may wait for its client: for the headers of a request, or for the client to
            read 64 KiB.
        request: seconds from the headers of a request until its response is read.
    """

    total: int = 1000
    of_client: int = 250
    waiting: float = 30.0
    request: float = math.inf

    @classmethod
    def for_process(cls, request: float, backlog: int) -> ConnectionLimits:
        """Limits that leave the process enough open files, with ``backlog`` more connections waiting to be looked at.

        Args:
            request: as the attribute.
            backlog: connections that are accepted at once.
        """
        try:
            import resource
        except ImportError:  # Windows, which has no such limit
            return cls(request=request)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = cls.total if files == resource.RLIM_INFINITY else files - backlog - 128
        total = max(16, min(cls.total, spare))
        return cls(total=total, of_client=max(8, total // 4), request=request)


class Connection(H11Protocol):
    """A connection that is closed when its client keeps it waiting.

    Attributes:
        network: where the client is.
        waiting_since: the time of the event loop when it last had news of its client.
    """

    def __init__(self, limits: ConnectionLimits, **options):
        super().__init__(**options)
        self._limits = limits
        self.network = ""
        self.waiting_since = self._request_since = self.loop.time()
        self._unsent = 0  # bytes that were left to send at ``waiting_since``

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.network = client_network(self.client[0] if self.client else "")
        if (accepted := transport.get_extra_info("socket")) is not None:
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        others = [each for each in self.connections if each is not self]
        if not self._make_room([each for each in others if each.network == self.network], self._limits.of_client):
            self._refuse(b"429 Too Many Requests")
        elif not self._make_room(others, self._limits.total):
            self._refuse(b"503 Service Unavailable")

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._news()
            self._request_since = self.loop.time()

    def on_response_complete(self) -> None:
        self._news()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._news()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._news()
        super().resume_writing()

    @property
    def waits(self) -> bool:
        """Whether the client, and not the server, is to go on."""
        cycle = self.cycle
        return self._sends or cycle is None or cycle.response_complete or cycle.more_body

    def check(self) -> None:
        """Closes the connection when it has waited too long. To be called about once a second."""
        answers = self.cycle is not None and not self.cycle.response_complete
        if not self.waits or self.transport.get_write_buffer_size() <= self._unsent - _PROGRESS:
            self._news()
        now = self.loop.time()
        reads_body = answers and not self._sends  # which has a time limit of its own: see ``protocol.parsing``
        late = self.waits and not reads_body and now - self.waiting_since > self._limits.waiting
        if late or (answers or self._sends) and now - self._request_since > self._limits.request:
            self.transport.abort()

    @property
    def _sends(self) -> bool:
        """Whether the client has yet to read what was sent."""
        if self.flow.write_paused or self.transport.is_closing():
            return True
        return (self.cycle is None or self.cycle.response_complete) and self.transport.get_write_buffer_size() > 0

    def _news(self) -> None:
        self.waiting_since, self._unsent = self.loop.time(), self.transport.get_write_buffer_size()

    @staticmethod
    def _make_room(others: Iterable[Connection], most: int) -> bool:
        """Whether there is room for one more connection beside these, perhaps because one that waits is closed."""
        others = list(others)
        if len(others) < most:
            return True
        waiting = [each for each in others if each.waits]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda each: each.waiting_since)
        oldest.connections.discard(oldest)
        oldest.transport.abort()
        return True

    def _refuse(self, status: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 " + status + b"\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        )
        self.transport.close()
