"""From the bytes of a request to a checked value. Size, depth and time are limited before anything is parsed."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
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
from jaxlm.serving.protocol.requests import TAG_MARK
from jaxlm.serving.protocol.sse import cancel_on_disconnect

__all__ = ["BodyReader", "json_depth", "parse_json", "validate"]

_MAX_DEPTH = 64  # nested brackets of JSON
_MAX_NAMES = 5000  # in an object of JSON
_MAX_SECONDS = 30.0  # until the whole body has arrived
_SMALL = 1 << 14  # bytes of a body that is parsed at once, in about a millisecond
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)

T = TypeVar("T", bound=BaseModel)


class BodyReader:
    """Reads bodies. Large ones are parsed in a thread, one after the other, and each client has one of them at work.

    Args:
        max_bytes: of a body.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._parsing = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by client

    @asynccontextmanager
    async def read(self, request: Request, schema: type[T]) -> AsyncIterator[T]:
        """The body of a request as a ``schema``. What is to be prepared from it, as by tokenizing, belongs into the
        block: the next large body of the client waits until the block has ended.

        Raises:
            ApiError: when the body has more than ``max_bytes`` bytes, arrives too slowly, is not JSON, or does not
                match the schema.
            ClientDisconnect: when the client disconnects while it waits for its turn.
        """
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise unsupported_media_type(content_type)
        try:
            async with asyncio.timeout(_MAX_SECONDS):
                data = await _read_bytes(request, self._max_bytes)
        except TimeoutError:
            raise body_too_slow(_MAX_SECONDS) from None
        if len(data) <= _SMALL:
            yield validate(schema, data)
            return
        turn = self._turns.setdefault(request.state.client, asyncio.Lock())
        await cancel_on_disconnect(request, turn.acquire())
        try:
            async with self._parsing:
                body = await asyncio.to_thread(validate, schema, data)
            yield body
        finally:
            turn.release()


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise body_too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


def validate(schema: type[T], data: bytes) -> T:
    """JSON text as a ``schema``.

    Raises:
        ApiError: as ``parse_json``, or when the value does not match.
    """
    try:
        return schema.model_validate(parse_json(data))
    except ValidationError as error:
        raise _first_mistake(error) from None


def parse_json(data: bytes) -> Any:
    """The value of JSON text.

    Raises:
        ApiError: when the text is not JSON in UTF-8, is nested too deeply, names a field twice or too many of them, has
            a number that is not finite, or half of a surrogate pair.
    """
    if json_depth(data) > _MAX_DEPTH:
        raise json_too_deep(_MAX_DEPTH)
    try:
        value = json.loads(
            data.decode("utf-8"), parse_constant=_finite, parse_float=_finite, object_pairs_hook=_object
        )
        if b"\\ud" in data.lower():  # escaped surrogates, which are text only in pairs
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise invalid_json(error) from None
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise invalid_value("", f"{text} is not a finite number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_NAMES:
        raise invalid_value("", f"an object has {len(pairs)} names, and the most is {_MAX_NAMES}")
    value: dict[str, Any] = {}
    for name, each in pairs:
        if name in value:
            raise invalid_value(name, "the name is there twice: which of the two counts?")
        value[name] = each
    return value


def json_depth(data: bytes) -> int:
    """How deep the brackets of JSON text are nested, without those in strings."""
    chars = np.frombuffer(_STRING.sub(b"", data), np.uint8)
    opened, closed = np.isin(chars, list(b"[{")), np.isin(chars, list(b"]}"))
    return int(np.cumsum(opened.astype(np.int32) - closed).max(initial=0))


def _first_mistake(error: ValidationError) -> ApiError:
    """The refusal for the first mistake, which names its field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(str(part) for part in first["loc"] if not str(part).startswith(TAG_MARK))
    return unknown_field(path) if first["type"] == "extra_forbidden" else invalid_value(path, first["msg"])
