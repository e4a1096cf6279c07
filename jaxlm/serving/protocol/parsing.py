"""From the bytes of a request to a checked value. Size, depth and time are limited before anything is parsed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from jaxlm.serving.protocol.errors import (
    ApiError,
    body_too_large,
    body_too_slow,
    invalid_json,
    invalid_value,
    json_too_deep,
    unknown_field,
    unsupported_media_type,
)

__all__ = ["json_depth", "parse_json", "read_body"]

_MAX_DEPTH = 64  # nested brackets of JSON
_MAX_SECONDS = 30.0  # until the whole body has arrived

T = TypeVar("T", bound=BaseModel)


async def read_body(request: Request, schema: type[T], max_bytes: int) -> T:
    """The body of a request as a ``schema``.

    Raises:
        ApiError: when the body has more than ``max_bytes`` bytes, arrives too slowly, is not JSON, or does not match
            the schema.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise unsupported_media_type(content_type)
    try:
        async with asyncio.timeout(_MAX_SECONDS):
            data = await _read_bytes(request, max_bytes)
    except TimeoutError:
        raise body_too_slow(_MAX_SECONDS) from None
    try:
        return schema.model_validate(parse_json(data))
    except ValidationError as error:
        raise _first_mistake(error) from None


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise body_too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


def parse_json(data: bytes) -> Any:
    """The value of JSON text.

    Raises:
        ApiError: when the text is not JSON in UTF-8, is nested too deeply, or has half of a surrogate pair.
    """
    if json_depth(data) > _MAX_DEPTH:
        raise json_too_deep(_MAX_DEPTH)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\ud" in data.lower():  # escaped surrogates, which are text only in pairs
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise invalid_json(error) from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def json_depth(data: bytes) -> int:
    """How deep the brackets of JSON text are nested, without those in strings."""
    deepest = level = 0
    for part in _outside_strings(data):
        for char in part:
            if char in b"[{":
                level += 1
                deepest = max(deepest, level)
            elif char in b"]}":
                level -= 1
    return deepest


def _outside_strings(data: bytes) -> Iterator[bytes]:
    """The brackets between strings. Strings are skipped from quote to quote."""
    at = 0
    while True:
        begin = data.find(b'"', at)
        yield _only_brackets(data[at:] if begin < 0 else data[at:begin])
        if begin < 0:
            return
        end = begin + 1
        while True:
            end = data.find(b'"', end)
            if end < 0:
                return
            back = end
            while data[back - 1] == ord("\\"):
                back -= 1
            end += 1
            if (end - 1 - back) % 2 == 0:  # the quote is not escaped
                break
        at = end


_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _only_brackets(data: bytes) -> bytes:
    return data.translate(None, _NOT_BRACKETS)


def _first_mistake(error: ValidationError) -> ApiError:
    """The refusal for the first mistake, which names its field."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    return unknown_field(path) if first["type"] == "extra_forbidden" else invalid_value(path, first["msg"])
