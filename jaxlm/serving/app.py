"""The ASGI application: the table of routes, and how each of them reads its request and sends its response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from jaxlm.core.errors import UserError
from jaxlm.serving.access import ApiKeys, parse_origin
from jaxlm.serving.metrics import Metrics
from jaxlm.serving.middleware import ServerMiddleware
from jaxlm.serving.models import ServedModel, find_model
from jaxlm.serving.protocol.errors import (
    ApiError,
    method_not_allowed,
    path_not_found,
    request_timeout,
    to_api_error,
)
from jaxlm.serving.protocol.openapi import openapi_document
from jaxlm.serving.protocol.parsing import BodyReader
from jaxlm.serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    InspectionRequest,
    TranslationRequest,
)
from jaxlm.serving.protocol.responses import Health, ModelList
from jaxlm.serving.protocol.sse import EventStreamResponse, cancel_on_disconnect
from jaxlm.serving.routes.chat import ChatCompletionJob
from jaxlm.serving.routes.completions import CompletionJob
from jaxlm.serving.routes.generation import GenerationJob
from jaxlm.serving.routes.inspection import inspect
from jaxlm.serving.routes.translation import encode_sentences, translate
from jaxlm.serving.worker import Caller

__all__ = ["RequestLimits", "make_app"]

PAGE = Path(__file__).parent / "page"

T = TypeVar("T")


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request: seconds until it is cancelled, and bytes of its body."""

    timeout: float = 600.0
    max_bytes: int = 1 << 20


def make_app(
    models: Sequence[ServedModel], *, keys: ApiKeys | None = None, origins: Sequence[str] = (),
    limits: RequestLimits = RequestLimits(), loopback_only: bool = False,
) -> ServerMiddleware:
    """The ASGI application of a server.

    Args:
        models: from ``serve_model``.
        keys: API keys, one of which every request needs; without any, everybody may use the server.
        origins: web pages that may use the server from a browser, as ``https://example.org``, besides its own page.
        limits: of one request.
        loopback_only: accept only Host headers that name this machine.

    Raises:
        UserError: when one of ``origins`` is not an origin.
    """
    keys, origins = keys or ApiKeys(), [parse_origin(origin) for origin in origins]
    metrics = Metrics(models)
    api = _Api(models, metrics, limits, openapi_document(bool(keys)))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for served in models:
            served.worker.start()
        yield
        for served in models:
            await asyncio.to_thread(served.worker.close)

    cors = Middleware(
        CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type"],
    )
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/translate", api.translate, methods=["POST"]),
            Route("/v1/inspect", api.inspect, methods=["POST"]),
            Route("/v1/models", api.models), Route("/v1/models/{model}", api.model),
            Route("/health", api.health), Route("/metrics", api.metrics), Route("/openapi.json", api.openapi),
            Route("/", _page("index.html")), *(Route(f"/{file.name}", _page(file.name)) for file in PAGE.iterdir()),
        ],
        middleware=[cors] if origins else [],
        exception_handlers={
            ApiError: _refuse, UserError: _refuse, Exception: _refuse, HTTPException: _refuse_route
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # it would redirect to whatever the Host header names
    api.server = ServerMiddleware(
        app, models, keys=keys, origins=origins, metrics=metrics, loopback_only=loopback_only
    )
    return api.server


class _Api:
    """The handlers of the routes."""

    server: ServerMiddleware

    def __init__(
        self, models: Sequence[ServedModel], metrics: Metrics, limits: RequestLimits, description: dict[str, Any]
    ):
        self._models, self._metrics, self._limits = models, metrics, limits
        self._description = json.dumps(description, separators=(",", ":")).encode()
        self._bodies = BodyReader(limits.max_bytes)

    async def chat(self, request: Request) -> Response:
        async with self._bodies.read(request, ChatCompletionRequest) as body:
            served = self._available(request, body.model, translates=False)
            job = await ChatCompletionJob.create(served, body, self._caller(request))
        return await self._generate(request, job)

    async def completions(self, request: Request) -> Response:
        async with self._bodies.read(request, CompletionRequest) as body:
            served = self._available(request, body.model, translates=False)
            job = await CompletionJob.create(served, body, self._caller(request))
        return await self._generate(request, job)

    async def translate(self, request: Request) -> Response:
        async with self._bodies.read(request, TranslationRequest) as body:
            served = self._available(request, body.model, translates=True)
            rows = await encode_sentences(served, body)
        work = translate(served, body, rows, self._caller(request))
        return await _long_json(await cancel_on_disconnect(request, self._within_timeout(work)))

    async def inspect(self, request: Request) -> Response:
        async with self._bodies.read(request, InspectionRequest) as body:
            served = find_model(self._models, body.model)
        work = inspect(served, body, self._caller(request))
        return await _long_json(await cancel_on_disconnect(request, self._within_timeout(work)))

    async def models(self, request: Request) -> Response:
        return _json(ModelList(data=[served.card for served in self._models]))

    async def model(self, request: Request) -> Response:
        return _json(find_model(self._models, request.path_params["model"]).card)

    async def health(self, request: Request) -> Response:
        draining = self.server.draining
        return _json(Health(status="draining" if draining else "ok"), 503 if draining else 200)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return Response(self._description, media_type="application/json")

    def _caller(self, request: Request) -> Caller:
        return Caller(request.state.client, self._limits.timeout)

    def _available(self, request: Request, name: str, *, translates: bool) -> ServedModel:
        """The model of that name and kind, if its queue is not full."""
        served = find_model(self._models, name, translates=translates)
        served.worker.check_capacity(request.state.client)
        return served

    async def _generate(self, request: Request, job: GenerationJob) -> Response:
        events = await cancel_on_disconnect(request, job.submit())
        if job.body.stream:
            return EventStreamResponse(job.stream(events))
        return await _long_json(await cancel_on_disconnect(request, job.complete(events)))

    async def _within_timeout(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(self._limits.timeout):
                return await work
        except TimeoutError:
            raise request_timeout(self._limits.timeout) from None


def _page(name: str) -> Callable[[Request], Response]:
    return lambda request: FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")


async def _long_json(body: BaseModel) -> Response:
    """The response with a body that may have megabytes, which are written in a thread."""
    return await asyncio.to_thread(_json, body)


async def _refuse(request: Request, error: Exception) -> Response:
    refusal = to_api_error(error)
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _refuse_route(request: Request, error: HTTPException) -> Response:
    """What Starlette itself refuses: unknown paths and methods."""
    path = request.url.path
    if error.status_code == 404:
        refusal = path_not_found(path)
    elif error.status_code == 405:
        refusal = method_not_allowed(request.method, path, error.headers)
    else:
        refusal = ApiError(error.status_code, error.detail, headers=error.headers)
    return await _refuse(request, refusal)
