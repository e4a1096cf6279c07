"""From the bytes of a request to what it says. Sizes, depth and time are bounded before anything is parsed."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from jaxlm.serving.protocol.errors import ApiError

_DEPTH = 64  # of brackets in JSON
_SECONDS = 30.0  # for a body to come

T = TypeVar("T", bound=BaseModel)


async def read(request: Request, kind: type[T], limit: int) -> T:
    """The body as a ``kind``. ApiError where it is larger than ``limit`` bytes, comes too slowly, is no JSON, or says
    what is not in the schema."""
    said = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if said != "application/json":
        raise ApiError(415, f"the content type is {said or 'missing'}: send application/json")
    try:
        async with asyncio.timeout(_SECONDS):
            data = await _bytes(request, limit)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_SECONDS:g} s") from None
    try:
        return kind.model_validate(parse(data))
    except ValidationError as error:
        raise _explained(error) from None


async def _bytes(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise ApiError(413, f"the body has more than {limit:,} bytes", code="request_too_large")
        parts.append(part)
    return b"".join(parts)


def parse(data: bytes) -> Any:
    """The value that JSON text has. ApiError for what is none, is nested too deeply, or has half of a character."""
    if depth(data) > _DEPTH:
        raise ApiError(400, f"the JSON is nested more than {_DEPTH} deep")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse)
        if b"\\ud" in data.lower():  # the escapes of surrogates, which are text only in pairs
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def depth(data: bytes) -> int:
    """How deep the brackets of JSON text are nested, those within strings left out."""
    deepest = level = 0
    for part in _outside_strings(data):
        for char in part:
            if char in b"[{":
                level += 1
                deepest = max(deepest, level)
            elif char in b"]}":
                level -= 1
    return deepest


def _outside_strings(data: bytes):
    """Only the brackets between strings: strings themselves are skipped from quote to quote."""
    at = 0
    while True:
        begin = data.find(b'"', at)
        yield _brackets(data[at:] if begin < 0 else data[at:begin])
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
            if (end - 1 - back) % 2 == 0:
                break
        at = end


_OTHERS = bytes(set(range(256)) - set(b"[]{}"))


def _brackets(data: bytes) -> bytes:
    return data.translate(None, _OTHERS)


def _explained(error: ValidationError) -> ApiError:
    """The first mistake, by the name of its field."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{path} is not supported here: leave it out", param=path, code="unknown_field")
    return ApiError(400, f"{path or 'the body'}: {first['msg']}", param=path or None, code="invalid_value")
