"""The ASGI application: routes, and what they have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from jaxlm.core.errors import UserError
from jaxlm.serving.access import Keys
from jaxlm.serving.metrics import Metrics
from jaxlm.serving.middleware import Gate
from jaxlm.serving.models import Served, by_name
from jaxlm.serving.protocol.errors import ApiError, internal, too_slow
from jaxlm.serving.protocol.openapi import document
from jaxlm.serving.protocol.parsing import read
from jaxlm.serving.protocol.requests import ChatRequest, CompletionRequest, InspectRequest, TranslationRequest
from jaxlm.serving.protocol.responses import Health, Models, Translated, Translation, Translations, Usage
from jaxlm.serving.protocol.sse import EventStream, unless_gone
from jaxlm.serving.routes.chat import Answer
from jaxlm.serving.routes.completions import Completions
from jaxlm.serving.routes.inspection import inspect
from jaxlm.serving.routes.translation import Sentences, sources

__all__ = ["Limits", "make_app"]

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Limits:
    """Of one request: seconds until it is given up, and bytes of its body."""

    seconds: float = 600.0
    bytes: int = 1 << 20


def make_app(
    models: Sequence[Served], *, keys: Keys | None = None, origins: Sequence[str] = (), limits: Limits = Limits(),
    local: bool = False,
) -> Gate:
    """The application; once its ``draining`` is set it takes no new requests.

    Args:
        keys: who has none of them may not ask; without, everybody may.
        origins: of web pages that may ask from a browser; by default those of this server only.
        local: take only names of this machine for the host.
    """
    keys = keys or Keys()
    metrics = Metrics(models)
    api = _Api(models, metrics, limits, document(bool(keys)))

    @asynccontextmanager
    async def lifespan(app: Starlette):
        for served in models:
            served.worker.start()
        yield
        for served in models:
            await asyncio.to_thread(served.worker.close)

    cors = Middleware(
        CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"],
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
        exception_handlers={ApiError: _told, UserError: _mistaken, HTTPException: _refused, Exception: _failed},
        lifespan=lifespan,
    )
    api.gate = Gate(app, models, keys=keys, origins=origins, metrics=metrics, local=local)
    return api.gate


class _Api:
    """The routes."""

    gate: Gate

    def __init__(self, models: Sequence[Served], metrics: Metrics, limits: Limits, description: dict):
        self._models, self._metrics, self._limits, self._description = models, metrics, limits, description

    async def completions(self, request: Request) -> Response:
        body = await read(request, CompletionRequest, self._limits.bytes)
        served = by_name(self._models, body.model, translates=False)
        served.worker.check()
        return await self._generated(request, await Completions.of(served, body, self._limits.seconds))

    async def chat(self, request: Request) -> Response:
        body = await read(request, ChatRequest, self._limits.bytes)
        served = by_name(self._models, body.model, translates=False)
        served.worker.check()
        return await self._generated(request, await Answer.of(served, body, self._limits.seconds))

    async def _generated(self, request: Request, work: Completions | Answer) -> Response:
        stream = await unless_gone(request, work.open())
        if work.body.stream:
            return EventStream(work.parts(stream))
        return _json(await unless_gone(request, work.whole(stream)))

    async def translate(self, request: Request) -> Response:
        body = await read(request, TranslationRequest, self._limits.bytes)
        served = by_name(self._models, body.model, translates=True)
        served.worker.check()
        return _json(await unless_gone(request, self._timed(_translate(served, body))))

    async def inspect(self, request: Request) -> Response:
        body = await read(request, InspectRequest, self._limits.bytes)
        return _json(await unless_gone(request, self._timed(inspect(by_name(self._models, body.model), body))))

    async def _timed(self, work):
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await work
        except TimeoutError:
            raise too_slow(self._limits.seconds) from None

    async def models(self, request: Request) -> Response:
        return _json(Models(data=[served.card for served in self._models]))

    async def model(self, request: Request) -> Response:
        return _json(by_name(self._models, request.path_params["model"]).card)

    async def health(self, request: Request) -> Response:
        draining = self.gate.draining
        return _json(Health(status="draining" if draining else "ok"), 503 if draining else 200)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._description)


async def _translate(served: Served, body: TranslationRequest) -> Translations:
    lm, texts = served.lm, [body.text] if isinstance(body.text, str) else body.text
    told = [i for i, text in enumerate(texts) if text.strip()]
    rows = await asyncio.to_thread(sources, lm, [texts[i] for i in told], body.source_language, served.context)
    beam = body.beam
    if body.alternatives:
        beam = max(beam or lm.generation.num_beams or 5, body.alternatives + 1)
    sentences = Sentences(rows, body.target_language, beam, body.length_penalty, body.max_length)
    found = await served.worker.translate(sentences) if rows else []
    out, written = [Translation(text="", score=None, alternatives=[]) for _ in texts], 0
    for i, hypotheses in zip(told, found, strict=True):
        best, *others = (Translated(text=lm.tokenizer.decode(each.tokens), score=each.score) for each in hypotheses)
        out[i] = Translation(text=best.text, score=best.score, alternatives=_others(best, others)[: body.alternatives])
        written += len(hypotheses[0].tokens) + 1  # with the end token
    return Translations(
        model=served.name, translations=out, usage=Usage.of(sum(map(len, rows)), written)
    )


def _others(best: Translated, others: Sequence[Translated]) -> list[Translated]:
    """Those that read differently: other tokens may spell the same text."""
    seen, out = {best.text}, []
    for each in others:
        if each.text not in seen:
            out.append(each)
        seen.add(each.text)
    return out


def _page(name: str) -> Callable[[Request], Response]:
    return lambda request: FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")


async def _told(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _mistaken(request: Request, error: UserError) -> Response:
    return await _told(request, ApiError(400, str(error)))


async def _failed(request: Request, error: Exception) -> Response:
    return await _told(request, internal())


async def _refused(request: Request, error: HTTPException) -> Response:
    said = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    told = ApiError(error.status_code, said.get(error.status_code, error.detail), headers=error.headers)
    return await _told(request, told)
