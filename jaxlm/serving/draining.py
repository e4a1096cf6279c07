"""The HTTP server: it reports when it is ready, and lets requests in progress finish before it stops."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from jaxlm.serving.middleware import ServerMiddleware

__all__ = ["DrainingServer"]

_log = logging.getLogger("jaxlm.serving")
_MAX_CONNECTIONS = 1000  # further ones are refused with status 503


class DrainingServer(uvicorn.Server):
    """A server whose first signal starts draining and whose second signal stops it at once.

    Args:
        app: from ``make_app``.
        drain: seconds that requests in progress have to finish after the first signal.
        ready: called when the server accepts requests.
    """

    def __init__(self, app: ServerMiddleware, drain: float, ready: Callable[[], None]):
        super().__init__(uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=30, timeout_graceful_shutdown=5, lifespan="on",
        ))
        self._app, self._drain, self._ready = app, drain, ready
        self._draining: asyncio.Task[None] | None = None

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
