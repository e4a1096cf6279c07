"""Answers that come in parts, as server-sent events, and clients that leave before they have them."""

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
from jaxlm.serving.protocol.errors import ApiError, internal

__all__ = ["EventStream", "unless_gone"]

T = TypeVar("T")
_log = logging.getLogger("jaxlm.serving")


class EventStream(Response):
    """Sends each item as an event and ``[DONE]`` at the end; an error in between as a last event. Where the client
    leaves, the items are closed."""

    media_type = "text/event-stream"

    def __init__(self, items: AsyncIterator[BaseModel]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._items = items

    async def __call__(self, scope, receive, send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._items.aclose()

    async def _send(self, send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for item in self._items:
                await _event(send, item.model_dump_json())
        except ApiError as error:
            await _event(send, json.dumps(error.body))
        except UserError as error:
            await _event(send, json.dumps(ApiError(400, str(error)).body))
        except Exception:
            _log.exception("a stream failed")
            await _event(send, json.dumps(internal().body))
        await _event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})




async def _event(send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def _gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives, which is cancelled when the client leaves; then ClientDisconnect."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
