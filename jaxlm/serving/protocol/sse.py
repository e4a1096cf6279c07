"""Responses that are sent in parts, as server-sent events, and what happens when a client disconnects."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from jaxlm.core.errors import UserError
from jaxlm.serving.protocol.errors import ApiError, to_api_error

__all__ = ["EventStreamResponse", "cancel_on_disconnect"]

T = TypeVar("T")
_log = logging.getLogger("jaxlm.serving")


class EventStreamResponse(Response):
    """Sends each item as an event, and ``[DONE]`` at the end. An error on the way is sent as the last event before
    that. The iterator is closed when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, items: AsyncIterator[BaseModel]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._items = items

    async def __call__(self, scope, receive, send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        disconnect = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sending, disconnect), return_when=asyncio.FIRST_COMPLETED)
        finally:
            disconnect.cancel()
            sending.cancel()
            await asyncio.gather(sending, disconnect, return_exceptions=True)
            await self._items.aclose()

    async def _send(self, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for item in self._items:
                await _send_event(send, item.model_dump_json())
        except (ApiError, UserError) as error:
            await _send_event(send, json.dumps(to_api_error(error).body))
        except Exception as error:
            _log.exception("a stream failed")
            await _send_event(send, json.dumps(to_api_error(error).body))
        await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def _disconnected(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client disconnects.

    Raises:
        ClientDisconnect: when the client disconnects first.
    """
    working = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((working, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        disconnect.cancel()
        working.cancel()
        await asyncio.gather(working, disconnect, return_exceptions=True)
