"""What every request goes through before and after its route: who asks, whether the server still takes requests,
counts, and the headers that keep browsers careful."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from jaxlm.serving.access import Keys, host_of, is_loopback
from jaxlm.serving.metrics import Metrics
from jaxlm.serving.models import Served
from jaxlm.serving.protocol.errors import ApiError, draining, unauthorized

__all__ = ["Gate"]

_log = logging.getLogger("jaxlm.serving")
_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/translate", "/v1/inspect", "/v1/models", "/health", "/metrics"
)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
}


class Gate:
    """ASGI middleware around everything.

    ``local``: only names of this machine are taken for the host, so that no web page can reach the server by a name of
    its own that points here (DNS rebinding). ``draining`` is set when the server is to end: requests that are here go
    on, others get 503.
    """

    def __init__(
        self, app, models: Sequence[Served], *, keys: Keys, origins: Sequence[str], metrics: Metrics, local: bool
    ):
        self.models = models
        self._app, self._keys, self._metrics, self._local = app, keys, metrics, local
        self._hosts = {host_of(origin.partition("://")[2]) for origin in origins}
        self.draining = False
        self.open = 0  # requests to /v1 that are being answered

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        label = next((known for known in _PATHS if path.startswith(known)), "/")
        begin, status, first = time.monotonic(), 499, None

        async def answer(message) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            elif first is None:
                first = time.monotonic() - begin
            await send(message)

        counted = path.startswith("/v1/")
        self.open += counted
        self._metrics.open.inc(counted)
        try:
            await self._pass(scope, receive, answer)
        finally:
            self.open -= counted
            self._metrics.open.dec(counted)
            self._metrics.requests.labels(label, str(status)).inc()
            self._metrics.seconds.labels(label).observe(time.monotonic() - begin)
            if first is not None:
                self._metrics.first.labels(label).observe(first)

    async def _pass(self, scope, receive, send) -> None:
        try:
            self._check(scope)
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception:  # of which the client has been told
            _log.exception("%s %s failed", scope["method"], scope["path"])

    def _check(self, scope) -> None:
        """ApiError for who may not ask."""
        headers, path = Headers(scope=scope), scope["path"]
        if self._local:
            host = host_of(headers.get("host", ""))
            if not is_loopback(host) and host not in self._hosts:
                raise ApiError(403, f"the host {host!r} is not this server; ask by 127.0.0.1 or localhost")
        if path.startswith("/v1/") or path == "/metrics":
            if self._keys and scope["method"] != "OPTIONS" and not self._keys.know(headers.get("authorization", "")):
                raise unauthorized()
            if self.draining and path != "/metrics":
                raise draining()
