"""Clients that do not go on: their connections end, and make room for others."""

from __future__ import annotations

import contextlib
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from jaxlm.serving.access import client_network
from jaxlm.serving.app import make_app
from jaxlm.serving.connections import ConnectionLimits
from tests.serving.servers import running, wait_for

HALF = b"GET /health HTTP/1.1\r\nHost: a\r\n"
WHOLE = HALF + b"\r\n"
BODY = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"


@pytest.fixture(scope="module")
def server():
    """A server without models, which closes what has waited at its next check."""
    with running(make_app([]), limits=ConnectionLimits(waiting=0.0)) as server:
        yield server


@pytest.fixture(scope="module")
def small():
    """A server with room for few."""
    with running(make_app([]), limits=ConnectionLimits(total=3, of_client=2)) as server:
        yield server


def connect(server, sent: bytes, receive_buffer: int = 0) -> socket.socket:
    at = urlsplit(server.url)
    client = socket.socket()
    client.settimeout(60)
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect((at.hostname, at.port))
    client.sendall(sent)
    return client


def read(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            parts.append(part)
    client.close()
    return b"".join(parts)


@pytest.mark.parametrize("sent", [b"", HALF, WHOLE + HALF, WHOLE + BODY[:40]])
def test_headers_have_a_deadline(server, sent):
    assert read(connect(server, sent)).count(b"200 OK") == sent.count(b"\r\n\r\n")


def test_what_is_sent_must_be_read(server):
    count = 999
    client = connect(server, WHOLE.replace(b"/health", b"/openapi.json") * count, receive_buffer=4096)
    wait_for(lambda: server.connections)
    wait_for(lambda: not server.connections)
    assert read(client).count(b"200 OK") < count


def test_who_waits_longest_makes_room(small):
    hostile = connect(small, HALF), connect(small, BODY)
    with httpx.Client(base_url=small.url) as one, httpx.Client(base_url=small.url) as other:
        for _ in range(2):
            assert one.get("/health").status_code == other.get("/health").status_code == 200
        assert [read(each) for each in hostile] == [b"", b""]


def test_addresses_of_a_network_are_one_client():
    assert client_network("2001:db8::1") == client_network("2001:db8::2:0:0:1") != client_network("2001:db8:0:1::1")
    assert client_network("::ffff:10.0.0.1") == client_network("10.0.0.1") != client_network("10.0.0.2")
    assert client_network("testclient") == "testclient"
