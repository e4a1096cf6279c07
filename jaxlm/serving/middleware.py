"""What every request passes before and after its endpoint: access checks, counters, and security headers."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxlm.serving.access import ApiKeys, client_network, host_name, is_loopback
from jaxlm.serving.metrics import Metrics
from jaxlm.serving.models import ServedModel
from jaxlm.serving.protocol.errors import ApiError, forbidden_host, invalid_api_key, server_draining

__all__ = ["ServerMiddleware"]

_log = logging.getLogger("jaxlm.serving")
_METRIC_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/translate", "/v1/inspect", "/v1/models", "/health", "/metrics"
)
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_DISCONNECTED = 499  # the status that is counted when a client leaves before the response starts


class ServerMiddleware:
    """The outermost ASGI application.

    Attributes:
        models: the served models.
        draining: set it when the server is to stop: requests in progress finish, new ones get status 503.
        open_requests: requests to /v1 in progress.

    Args:
        app: the application inside.
        models: the served models.
        keys: API keys; without any, everybody may use the server.
        origins: web pages that may use the server from a browser.
        metrics: counts requests.
        loopback_only: accept only Host headers that name this machine, so that no web page can reach the server by a
            host name that its owner points here (DNS rebinding).
    """

    def __init__(
        self, app: ASGIApp, models: Sequence[ServedModel], *, keys: ApiKeys, origins: Sequence[str], metrics: Metrics,
        loopback_only: bool,
    ):
        self.models = models
        self.draining = False
        self.open_requests = 0
        self._app, self._keys, self._metrics, self._loopback_only = app, keys, metrics, loopback_only
        self._origin_hosts = {host_name(origin.partition("://")[2]) for origin in origins} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        response = _Response(send)
        counted = path.startswith("/v1/")
        self.open_requests += counted
        self._metrics.open.inc(counted)
        try:
            await self._respond(scope, receive, response)
        finally:
            self.open_requests -= counted
            self._metrics.open.dec(counted)
            label = next((known for known in _METRIC_PATHS if path.startswith(known)), "/")
            self._metrics.requests.labels(label, str(response.status)).inc()
            self._metrics.seconds.labels(label).observe(time.monotonic() - response.begin)
            if response.first_byte is not None:
                self._metrics.first_byte.labels(label).observe(response.first_byte)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_access(scope)
            scope.setdefault("state", {})["client"] = self._client(scope)
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception:  # the client has its response already
            _log.exception("%s %s failed", scope["method"], scope["path"])

    def _client(self, scope: Scope) -> str:
        """Who sends a request, for limits of a client: an API key, or an address where there are no keys."""
        if self._keys:
            return self._keys.client(Headers(scope=scope).get("authorization", ""))
        return client_network(scope["client"][0] if scope.get("client") else "")

    def _check_access(self, scope: Scope) -> None:
        """Raises an ApiError for a request that is refused before it reaches an endpoint."""
        headers, path = Headers(scope=scope), scope["path"]
        if self._loopback_only:
            host = host_name(headers.get("host", ""))
            if not is_loopback(host) and host not in self._origin_hosts:
                raise forbidden_host(host)
        if path.startswith("/v1/") or path == "/metrics":
            if self._keys and scope["method"] != "OPTIONS" and not self._keys.accept(headers.get("authorization", "")):
                raise invalid_api_key()
            if self.draining and path != "/metrics":
                raise server_draining()


class _Response:
    """Sends a response with the security headers, and notes its status and its seconds until the first byte."""

    def __init__(self, send: Send):
        self._send = send
        self.begin = time.monotonic()
        self.status = _DISCONNECTED
        self.first_byte: float | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        elif self.first_byte is None:
            self.first_byte = time.monotonic() - self.begin
        await self._send(message)
