"""GET /openapi.json: the server's own description, made of the schemas that requests and answers have."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import jaxlm
from jaxlm.serving.protocol import requests, responses

_REF = "#/components/schemas/{model}"

# path, method: (what it does, body, answer, what an event of a stream holds)
_PATHS: dict[tuple[str, str], tuple[str, type[BaseModel] | None, type[BaseModel] | None, type[BaseModel] | None]] = {
    ("/v1/chat/completions", "post"): ("Answers a conversation", requests.ChatRequest, responses.Chat, responses.ChatChunk),
    ("/v1/completions", "post"): (
        "Continues texts", requests.CompletionRequest, responses.Completion, responses.Completion
    ),
    ("/v1/translate", "post"): (
        "Translates sentences, with alternatives", requests.TranslationRequest, responses.Translations, None
    ),
    ("/v1/inspect", "post"): (
        "Explains a next token: attention, attributions, candidates", requests.InspectRequest, responses.Inspection, None
    ),
    ("/v1/models", "get"): ("Lists the models", None, responses.Models, None),
    ("/v1/models/{model}", "get"): ("Tells of a model", None, responses.Model, None),
    ("/health", "get"): ("Whether requests are taken", None, responses.Health, None),
    ("/metrics", "get"): ("Counts and times, for Prometheus", None, None, None),
}
_POST_ERRORS = {
    "400": "The request says what cannot be", "404": "There is no such model", "408": "The body comes too slowly",
    "413": "The body is too large", "415": "The body is not JSON", "429": "The queue is full",
    "500": "The server failed", "503": "The server is about to stop", "504": "It took too long",
}


def document(keys: bool) -> dict[str, Any]:
    """OpenAPI 3.1; ``keys``: whether API keys are asked for."""
    kinds = {kind for _, *kinds in _PATHS.values() for kind in kinds if kind is not None} | {responses.Error}
    modes = [(kind, "validation" if issubclass(kind, requests.Body) else "serialization") for kind in kinds]
    _, definitions = models_json_schema(sorted(modes, key=lambda each: each[0].__name__), ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for (path, method), about in _PATHS.items():
        paths.setdefault(path, {})[method] = _operation(path, *about, keys=keys and path != "/health")
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0", "info": {"title": "jaxlm", "version": jaxlm.__version__}, "paths": paths,
        "components": components,
    }


def _operation(path: str, summary: str, body, answer, event, *, keys: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if answer is not None:
        content = {"application/json": {"schema": _ref(answer)}}
    if event is not None:
        data = {"type": "string", "description": f"{event.__name__} as JSON, or an Error; [DONE] in the last event"}
        content["text/event-stream"] = {
            "schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}
        }
    errors = dict(_POST_ERRORS) if body is not None else {}
    if "{" in path:
        errors["404"] = "There is no such model"
    errors["503"] = "The server is about to stop"
    errors["403"] = "The name of the host, or the origin, is not one of this server's"
    if keys:
        errors["401"] = "There is no key, or one that the server does not know"
    operation: dict[str, Any] = {
        "summary": summary, "operationId": summary.split(",")[0].replace(" ", "_").lower(),
        "responses": {"200": {"description": "The answer", "content": content}} | {
            status: _error(meaning) for status, meaning in sorted(errors.items())
        },
    }
    if path == "/health":
        operation["responses"]["503"] = {
            "description": "The server is about to stop", "content": {"application/json": {"schema": _ref(answer)}}
        }
    if "{" in path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    if keys:
        operation["security"] = [{"key": []}]
    return operation


def _error(meaning: str) -> dict[str, Any]:
    return {"description": meaning, "content": {"application/json": {"schema": _ref(responses.Error)}}}


def _ref(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=kind.__name__)}
