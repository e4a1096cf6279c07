"""GET /openapi.json: the description of the server, made from the schemas of its requests and responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import jaxlm
from jaxlm.serving.protocol import requests, responses
from jaxlm.serving.protocol.errors import STATUS_MEANINGS

__all__ = ["openapi_document"]

_REF = "#/components/schemas/{model}"


@dataclass(frozen=True)
class _Endpoint:
    """What is published of an endpoint; ``event`` is the schema of an event of its stream."""

    summary: str
    request: type[BaseModel] | None = None
    response: type[BaseModel] | None = None
    event: type[BaseModel] | None = None


_ENDPOINTS = {
    ("/v1/chat/completions", "post"): _Endpoint(
        "Answers a conversation", requests.ChatCompletionRequest, responses.ChatCompletion,
        responses.ChatCompletionChunk,
    ),
    ("/v1/completions", "post"): _Endpoint(
        "Continues texts", requests.CompletionRequest, responses.Completion, responses.Completion
    ),
    ("/v1/translate", "post"): _Endpoint(
        "Translates sentences, with alternatives", requests.TranslationRequest, responses.TranslationList
    ),
    ("/v1/inspect", "post"): _Endpoint(
        "Explains a next token: attention, attributions, candidates", requests.InspectionRequest, responses.Inspection
    ),
    ("/v1/models", "get"): _Endpoint("Lists the models", response=responses.ModelList),
    ("/v1/models/{model}", "get"): _Endpoint("Describes a model", response=responses.Model),
    ("/health", "get"): _Endpoint("Tells whether requests are accepted", response=responses.Health),
    ("/metrics", "get"): _Endpoint("Counts and times, for Prometheus"),
}


def openapi_document(api_keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server. ``api_keys`` says whether it asks for API keys."""
    schemas: set[type[BaseModel]] = {responses.ErrorResponse}
    for endpoint in _ENDPOINTS.values():
        schemas |= {each for each in (endpoint.request, endpoint.response, endpoint.event) if each is not None}
    modes = [
        (schema, "validation" if issubclass(schema, requests.RequestModel) else "serialization")
        for schema in sorted(schemas, key=lambda each: each.__name__)
    ]
    _, definitions = models_json_schema(modes, ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for (path, method), endpoint in _ENDPOINTS.items():
        paths.setdefault(path, {})[method] = _operation(path, endpoint, api_keys and path != "/health")
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    if api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0", "info": {"title": "jaxlm", "version": jaxlm.__version__}, "paths": paths,
        "components": components,
    }


def _operation(path: str, endpoint: _Endpoint, api_key: bool) -> dict[str, Any]:
    statuses = {403, 503} | ({400, 404, 408, 413, 415, 429, 500, 504} if endpoint.request is not None else set())
    statuses |= ({404} if "{" in path else set()) | ({401} if api_key else set())
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": endpoint.summary.split(",")[0].replace(" ", "_").lower(),
        "responses": {"200": {"description": "The response", "content": _content(endpoint)}} | {
            str(status): _described(STATUS_MEANINGS[status], responses.ErrorResponse) for status in sorted(statuses)
        },
    }
    if path == "/health":
        operation["responses"]["503"] = _described(STATUS_MEANINGS[503], responses.Health)
    if "{" in path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if endpoint.request is not None:
        operation["requestBody"] = {
            "required": True, "content": {"application/json": {"schema": _ref(endpoint.request)}}
        }
    if api_key:
        operation["security"] = [{"key": []}]
    return operation


def _content(endpoint: _Endpoint) -> dict[str, Any]:
    """The media types of a successful response."""
    if endpoint.response is None:
        return {"text/plain": {"schema": {"type": "string"}}}
    content: dict[str, Any] = {"application/json": {"schema": _ref(endpoint.response)}}
    if (event := endpoint.event) is not None:
        description = f"{event.__name__} or ErrorResponse as JSON; the last event has [DONE]"
        content["text/event-stream"] = {
            "schema": {
                "type": "object", "properties": {"data": {"type": "string", "description": description}},
                "required": ["data"],
            }
        }
    return content


def _described(meaning: str, schema: type[BaseModel]) -> dict[str, Any]:
    return {"description": meaning, "content": {"application/json": {"schema": _ref(schema)}}}


def _ref(schema: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=schema.__name__)}
