"""The HTTP server: it reports when it is ready, and lets requests in progress finish before it stops."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from jaxlm.core.host_memory import return_freed_memory
from jaxlm.serving.connections import Connection, ConnectionLimits
from jaxlm.serving.middleware import ServerMiddleware

__all__ = ["DrainingServer"]

_log = logging.getLogger("jaxlm.serving")
_BACKLOG = 256  # connections that are accepted at once
_GRACE = 60.0  # seconds until the response is read, after the time that a request may take


class DrainingServer(uvicorn.Server):
    """A server whose first signal starts draining and whose second signal stops it at once.

    Args:
        app: from ``make_app``.
        drain: seconds that requests in progress have to finish after the first signal.
        ready: called when the server accepts requests.
        timeout: seconds that a request may take; a minute later its connection is closed, whoever is slow.
        limits: of connections, by default those that fit the process and ``timeout``.
    """

    def __init__(
        self, app: ServerMiddleware, drain: float, ready: Callable[[], None], timeout: float = 600.0,
        limits: ConnectionLimits | None = None,
    ):
        limits = limits or ConnectionLimits.for_process(timeout + _GRACE, _BACKLOG)
        super().__init__(uvicorn.Config(
            app, http=partial(Connection, limits), ws="none", log_config=None, access_log=False, server_header=False,
            backlog=_BACKLOG, timeout_keep_alive=int(limits.waiting), timeout_graceful_shutdown=5, lifespan="on",
        ))
        self._app, self._drain, self._ready = app, drain, ready
        self._draining: asyncio.Task[None] | None = None
        self._returning: asyncio.Task[None] | None = None
        self._seen_requests = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._app.draining:
            self.force_exit = self.should_exit = True
            return
        self._app.draining = True
        _log.warning(
            "%s: the server stops when its %d requests have finished", signal.Signals(sig).name, self._app.open_requests
        )

    async def on_tick(self, counter: int) -> bool:
        if self._app.draining and self._draining is None:
            self._draining = asyncio.create_task(self._finish_requests())
        if counter % 10 == 0:  # a second
            for connection in list(self.server_state.connections):
                connection.check()
        if counter % 50 == 0 and self._seen_requests != self.server_state.total_requests:
            self._seen_requests = self.server_state.total_requests
            # What large requests took goes back to the system.
            self._returning = asyncio.create_task(asyncio.to_thread(return_freed_memory))
        return await super().on_tick(counter)

    async def _finish_requests(self) -> None:
        try:
            async with asyncio.timeout(self._drain):
                while self._app.open_requests:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            _log.warning("%d requests did not finish within %g s", self._app.open_requests, self._drain)
            self.force_exit = True
        self.should_exit = True
