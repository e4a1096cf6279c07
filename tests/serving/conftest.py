"""A server in this process: two small language models, one of which is for chat, and a translator."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from jaxlm.data.tokenizer import Tokenizer  # noqa: E402
from jaxlm.model import LM  # noqa: E402
from jaxlm.serving.app import make_app  # noqa: E402
from jaxlm.serving.models import serve_model  # noqa: E402
from tests.inference.models import LETTERS, decoder, seq2seq  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m.content }}. {% endfor %}"


def chat_tokenizer() -> Tokenizer:
    """That of the other models, with a template that needs no letters but theirs."""
    plain = Tokenizer.train([LETTERS], kind="char")
    return Tokenizer(plain._engine, plain._config | {"chat_template": TEMPLATE})


def as_lm(handle, tokenizer=None) -> LM:
    return LM(handle.config, handle.graphdef, handle.params, tokenizer or handle.tokenizer)


@pytest.fixture(scope="session")
def lms() -> dict[str, LM]:
    return {
        "tiny": as_lm(decoder(max_positions=96), chat_tokenizer()), "plain": as_lm(decoder(max_positions=96)),
        "words": as_lm(seq2seq()),
    }


@pytest.fixture(scope="session")
def models(lms):
    return [serve_model(name, lm, slots=2, queue=4, warm=False) for name, lm in lms.items()]


@dataclass(frozen=True)
class Running:
    """A server at an address, and its application."""

    url: str
    gate: object


@contextlib.contextmanager
def running(gate) -> Iterator[Running]:
    """Serves an application at a free port, from a thread."""
    server = uvicorn.Server(uvicorn.Config(gate, port=0, log_config=None, access_log=False, lifespan="on"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Running(f"http://127.0.0.1:{port}", gate)
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="session")
def server(models) -> Iterator[Running]:
    with running(make_app(models)) as server:
        yield server
