"""What clients are told when something is wrong: an HTTP status and a body such as OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """An answer that is an error; ``param`` names the field of the request that is at fault."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.error = {"message": " ".join(message.split()), "type": kind, "param": param, "code": code}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}


def unauthorized() -> ApiError:
    return ApiError(
        401, "give a key that this server knows, as Authorization: Bearer KEY", kind="authentication_error",
        code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
    )


def no_such_model(name: str, names: list[str]) -> ApiError:
    return ApiError(
        404, f"there is no model {name!r} here; there are {', '.join(names)}", param="model", code="model_not_found"
    )


def busy(seconds: int) -> ApiError:
    return ApiError(
        429, f"the queue is full; try again in {seconds} s", kind="rate_limit_error", code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def draining() -> ApiError:
    return ApiError(
        503, "the server is about to stop and takes no new requests", kind="server_error", code="draining",
        headers={"Retry-After": "5", "Connection": "close"},
    )


def too_slow(seconds: float) -> ApiError:
    return ApiError(504, f"this took longer than {seconds:g} s and was given up", kind="server_error", code="timeout")


def internal() -> ApiError:
    return ApiError(500, "the server failed at this request; its log says why", kind="server_error")
