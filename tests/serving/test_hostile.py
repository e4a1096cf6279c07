"""Requests that are meant to hurt others: each is refused early, briefly, and without holding up the server."""

from __future__ import annotations

import json
import threading

import httpx
import pytest
from pydantic import ValidationError

from jaxlm.core.errors import UserError
from jaxlm.serving.access import parse_origin
from jaxlm.serving.protocol import parsing
from jaxlm.serving.protocol.errors import ApiError
from jaxlm.serving.protocol.openapi import openapi_document
from jaxlm.serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    InspectionRequest,
    TranslationRequest,
)

LONG = "a" * 100_000
BODY = {"model": "tiny", "prompt": "the cat", "max_tokens": 1, "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


def post(server, body, path="/v1/completions"):
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


@pytest.mark.parametrize(("schema", "field", "value"), [
    (CompletionRequest, "prompt", [{}] * 9999), (CompletionRequest, "prompt", [[0.5] * 9] * 9999),
    (CompletionRequest, "prompt", ["a", *[1] * 9999]), (CompletionRequest, "prompt", ["a"] * 9999),
    (CompletionRequest, "stop", [1] * 9999), (CompletionRequest, "stop_token_ids", [-1] * 9999),
    (ChatCompletionRequest, "messages", [{}] * 9999),
    (ChatCompletionRequest, "messages", [{"role": "user", "content": [{}] * 9999}] * 9),
    (TranslationRequest, "text", [1] * 9999),
])
def test_a_wrong_list_ends_at_its_first_mistake(schema, field, value):
    with pytest.raises(ValidationError) as caught:
        schema.model_validate({"model": "tiny", field: value})
    assert sum(each["loc"][0] == field for each in caught.value.errors()) <= 2
    with pytest.raises(ApiError) as refused:
        parsing.validate(schema, json.dumps({"model": "tiny", field: value}).encode())
    assert refused.value.error["param"].split(".")[0] == field and "|" not in str(refused.value)


def test_every_list_of_a_request_has_a_limit():
    schemas = openapi_document(api_keys=False)["components"]["schemas"]
    seen, found = set(), []

    def walk(node):
        if isinstance(node, dict):
            if "$ref" in node and (name := node["$ref"].rpartition("/")[2]) not in seen:
                seen.add(name)
                walk(schemas[name])
            if node.get("type") == "array":
                found.append(node)
            for each in node.values():
                walk(each)
        elif isinstance(node, list):
            for each in node:
                walk(each)

    for schema in (ChatCompletionRequest, CompletionRequest, InspectionRequest, TranslationRequest):
        walk(schemas[schema.__name__])
    assert len(found) >= 9 and all("maxItems" in each for each in found)


@pytest.mark.parametrize(("text", "named"), [
    (b'{"model": "a", "model": "b"}', "model"), (b'{"a": [{"b": 1, "b": 1}]}', "b"), (b'{"a": 1e999}', "1e999"),
    (b'{"a": -Infinity}', "-Infinity"), (json.dumps({str(i): 0 for i in range(5001)}).encode(), "5001"),
    (b'{"a": ' + b"9" * 5000 + b"}", "5000"),
])
def test_json_that_others_may_read_otherwise_is_refused(text, named):
    with pytest.raises(ApiError, match=named) as caught:
        parsing.parse_json(text)
    assert caught.value.status == 400


def test_a_large_body_is_checked_outside_of_the_event_loop_and_in_turn(server, monkeypatch):
    threads, at_once, most, check = [], 0, 0, parsing.validate

    def noted(schema, data):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        threads.append(threading.current_thread())
        try:
            return check(schema, data)
        finally:
            at_once -= 1

    monkeypatch.setattr(parsing, "validate", noted)
    post(server, BODY)
    loop_thread, = threads
    threads.clear()
    answers = []
    clients = [
        threading.Thread(target=lambda: answers.append(post(server, BODY | {"prompt": [LONG, 1]}))) for _ in range(4)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert [answer.json()["error"]["param"] for answer in answers] == ["prompt.1"] * 4
    assert len(threads) == 4 and loop_thread not in threads and most == 1


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/completions", BODY | {"model": LONG}), ("/v1/completions", BODY | {LONG: 1}),
    ("/v1/completions", BODY | {"logit_bias": {LONG: 1}}), ("/v1/completions", BODY | {"prompt": "É" * 9999}),
    ("/v1/completions", BODY | {"prompt": "".join(map(chr, range(0x4E00, 0x8000)))}),
    ("/v1/completions", BODY | {"response_format": {"type": LONG}}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": LONG, "content": "a"}]}),
    ("/v1/translate", {"model": "words", "text": "a", "source_language": LONG}),
    ("/v1/translate", {"model": "words", "text": "a", "target_language": LONG}),
    ("/v1/inspect", {"model": "tiny", "text": LONG}), ("/v1/inspect", {"model": "tiny", "text": "a", "method": LONG}),
    ("/v1/" + LONG[:9999], {}),
])
def test_errors_repeat_little_of_what_was_sent(server, path, body):
    answer = post(server, body, path)
    assert answer.status_code in (400, 404) and len(answer.content) < 1500


def test_nobody_is_sent_to_where_the_host_header_says(server):
    for path in ("/v1/models/", "/health/", "/v1/completions/"):
        answer = httpx.get(f"{server.url}{path}", headers={"Host": "evil.example"})
        assert answer.status_code == 404 and "location" not in answer.headers


def test_origins_are_those_that_browsers_send():
    for text, origin in (
        ("https://example.org", "https://example.org"), ("HTTPS://Example.org:443/", "https://example.org"),
        ("http://[::1]:8080", "http://[::1]:8080"), ("*", "*"),
    ):
        assert parse_origin(text) == origin
    for text in ("example.org", "localhost:3000", "https://", "https://a.org/page", "ftp://a.org", "null", "http://a:b",
                 "https://me@a.org", ""):
        with pytest.raises(UserError, match="https://example.org"):
            parse_origin(text)
