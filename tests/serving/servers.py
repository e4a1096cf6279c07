"""A server in this process: two small language models, one of which is for chat, and a translator."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import string
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import nn
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.model import LM
from jaxlm.serving.app import make_app
from jaxlm.serving.draining import DrainingServer
from jaxlm.serving.middleware import ServerMiddleware
from jaxlm.serving.models import serve_model
from tests.inference.models import decoder, seq2seq
from tests.models import build

TEMPLATE = "{% for m in messages %}{{ m.content }}. {% endfor %}"


def chatty() -> LM:
    """A model with a chat template that knows all of ASCII, and so writes JSON."""
    plain = Tokenizer.train([string.printable], kind="char")
    tokenizer = Tokenizer(plain.backend, plain.config | {"chat_template": TEMPLATE})
    config = nn.DecoderConfig(
        vocab_size=tokenizer.vocab_size, width=32, heads=4, kv_heads=2, ffn=48, layers=2, max_positions=96
    )
    graphdef, params = build(config)
    return LM(config, graphdef, jax.tree.map(lambda x: jnp.asarray(3 * np.asarray(x)), params), tokenizer)


def as_lm(handle) -> LM:
    return LM(handle.config, handle.graphdef, handle.params, handle.tokenizer)


@pytest.fixture(scope="session")
def lms() -> dict[str, LM]:
    return {
        "tiny": chatty(), "plain": as_lm(decoder(max_positions=96)), "words": as_lm(seq2seq()),
    }


@pytest.fixture(scope="session")
def models(lms):
    return [serve_model(name, lm, slots=2, queue=4, warm_up=False) for name, lm in lms.items()]


@dataclass(frozen=True)
class Running:
    """A server at an address, its application, and its connections."""

    url: str
    app: ServerMiddleware
    connections: set


@contextlib.contextmanager
def running(app: ServerMiddleware, **options) -> Iterator[Running]:
    """Serves an application at a free port, from a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = DrainingServer(app, 5.0, lambda: None, **options)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app, server.server_state.connections)
        server.should_exit = True
        thread.join()


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="session")
def server(models) -> Iterator[Running]:
    with running(make_app(models)) as server:
        yield server
