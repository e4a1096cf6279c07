"""Every way in which the server refuses a request: one function per refusal, with its HTTP status and its message.

The body of a refusal is the error object of OpenAI's API: ``message``, ``type``, ``param`` (the field of the request
that is wrong) and ``code``. To change how the server refuses, change this file; ``STATUS_MEANINGS`` is published in
/openapi.json. What the request says is repeated in part only, however long it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.core.errors import UserError

STATUS_MEANINGS = {
    400: "The request is not valid",
    401: "The API key is missing or unknown",
    403: "The Host header names another server",
    404: "The model does not exist",
    408: "The body arrives too slowly",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The queue is full",
    500: "The server failed",
    503: "The server is shutting down",
    504: "The request took too long",
}


_MAX_MESSAGE = 600  # characters
_MAX_VALUE = 80  # of a value or a name of the request


def shorten(text: str, most: int = _MAX_VALUE) -> str:
    """A text of about ``most`` characters: what is longer loses its middle."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


class ApiError(Exception):
    """A refusal: an HTTP status, headers, and the error object of its body.

    Args:
        status: the HTTP status.
        message: what is wrong, for people; shortened.
        kind: the ``type`` of the error object.
        param: the field of the request that is wrong; shortened.
        code: a short name of the refusal, for programs.
        headers: additional response headers.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: Mapping[str, str] | None = None,
    ):
        message = " ".join(shorten(message, _MAX_MESSAGE).split())
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        param = None if param is None else shorten(param)
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON value of the response body."""
        return {"error": self.error}


def to_api_error(error: Exception) -> ApiError:
    """The refusal that reports an exception: users' mistakes by their message, anything else without details."""
    if isinstance(error, ApiError):
        return error
    return ApiError(400, str(error)) if isinstance(error, UserError) else internal_error()


# Who asks, and where


def invalid_api_key() -> ApiError:
    return ApiError(
        401, "the API key is missing or unknown: send the header Authorization: Bearer KEY",
        kind="authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
    )


def forbidden_host(host: str) -> ApiError:
    return ApiError(
        403, f"the Host header names {shorten(host)!r}, which is not this server: use 127.0.0.1 or localhost"
    )


def path_not_found(path: str) -> ApiError:
    return ApiError(404, f"there is nothing at {shorten(path)}")


def method_not_allowed(method: str, path: str, headers: Mapping[str, str] | None) -> ApiError:
    return ApiError(405, f"{shorten(path)} does not accept {shorten(method)}", headers=headers)


def model_not_found(name: str, names: Sequence[str]) -> ApiError:
    return ApiError(
        404, f"there is no model {shorten(name)!r}; the models are {', '.join(names)}", param="model",
        code="model_not_found",
    )


def wrong_endpoint(name: str, translates: bool) -> ApiError:
    use = "is a translation model: use /v1/translate" if translates else "does not translate: use /v1/completions"
    return ApiError(400, f"{name} {use}", param="model")


# What the body says


def unsupported_media_type(found: str) -> ApiError:
    return ApiError(415, f"the content type is {shorten(found) or 'missing'}: send application/json")


def body_too_slow(seconds: float) -> ApiError:
    return ApiError(408, f"the body did not arrive within {seconds:g} s")


def body_too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body has more than {limit:,} bytes", code="request_too_large")


def invalid_json(reason: object) -> ApiError:
    return ApiError(400, f"the body is not JSON in UTF-8: {reason}", code="invalid_json")


def json_too_deep(limit: int) -> ApiError:
    return ApiError(400, f"the JSON is nested more than {limit} levels deep")


def unknown_field(path: str) -> ApiError:
    return ApiError(400, f"the field {shorten(path)} is not supported: remove it", param=path, code="unknown_field")


def invalid_value(path: str, reason: str) -> ApiError:
    return ApiError(400, f"{shorten(path) or 'the body'}: {reason}", param=path or None, code="invalid_value")


def invalid_field(param: str, message: str) -> ApiError:
    """For a value that has the right type but cannot be served, alone or together with other fields."""
    return ApiError(400, message, param=param)


def context_length_exceeded(
    model: str, context: int, prompt: int, max_tokens: int | None = None, *, param: str | None = None
) -> ApiError:
    """For a prompt of ``prompt`` tokens that does not fit, alone or together with ``max_tokens`` new ones."""
    message = f"{model} has a context of {context} tokens: the prompt has {prompt}"
    if max_tokens:
        message += f" and max_tokens is {max_tokens}"
    return ApiError(400, message, param=param, code="context_length_exceeded")


def too_many_choices(count: int, limit: int) -> ApiError:
    return ApiError(400, f"the request asks for {count} choices, and the most is {limit}: ask for fewer", param="n")


def too_many_logprobs(tokens: int, top: int, limit: int) -> ApiError:
    return ApiError(
        400, f"the response may have {tokens:,} tokens with {top} alternatives each, and at most {limit:,} "
        "log-probabilities fit into one: ask for fewer alternatives, choices, or tokens", param="logprobs",
    )


# What the server cannot do now


def queue_full(seconds: int) -> ApiError:
    return ApiError(
        429, f"the queue is full: try again in {seconds} s", kind="rate_limit_error", code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def grammars_busy(seconds: int) -> ApiError:
    return ApiError(
        429, f"too many new constraints wait to be compiled: try again in {seconds} s", kind="rate_limit_error",
        code="constraints_busy", headers={"Retry-After": str(seconds)},
    )


def client_queue_full(places: int, seconds: int) -> ApiError:
    return ApiError(
        429, f"your requests have all of the {places} places that one client may have: try again in {seconds} s",
        kind="rate_limit_error", code="client_queue_full", headers={"Retry-After": str(seconds)},
    )


def server_draining() -> ApiError:
    return ApiError(
        503, "the server is shutting down and takes no new requests", kind="server_error", code="draining",
        headers={"Retry-After": "5", "Connection": "close"},
    )


def request_timeout(seconds: float, written: int | None = None, most: int | None = None) -> ApiError:
    """For a request that takes too long; ``written`` of at most ``most`` tokens were generated until then."""
    message = f"the request took longer than {seconds:g} s"
    if written is not None and most is not None:
        message += f": {written} of at most {most} tokens were written; ask for fewer max_tokens"
    return ApiError(504, message, kind="server_error", code="timeout")


def internal_error() -> ApiError:
    return ApiError(500, "the server failed; the reason is in its log", kind="server_error")
