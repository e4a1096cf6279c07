"""``serve``: models behind an address, until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.nn.config import KVCache
from jaxlm.serving.access import KEYS, Keys, is_loopback

__all__ = ["serve"]

_log = logging.getLogger("jaxlm.serving")
_CONNECTIONS = 1000  # beyond which connections are refused with 503


def serve(
    models: str | Path | Sequence[str] | Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    slots: int = 8,
    queue: int = 64,
    context: int = 0,
    kv_cache: KVCache | None = None,
    draft: str | None = None,
    api_keys: Path | None = None,
    origins: Sequence[str] = (),
    timeout: float = 600.0,
    drain: float = 60.0,
    max_bytes: int = 1 << 20,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves models by HTTP: OpenAI's completions and chat, translation, insight, and a page at ``/``.

    SIGTERM and SIGINT let the requests that are here end, for at most ``drain`` seconds; a second one does not wait.

    Args:
        models: what ``jaxlm.load`` takes, or several, each ``[NAME=]MODEL[+ADAPTER]``; or loaded ones by name.
        host: the address to listen at; the default is reached from this machine only.
        port: 0 takes a free one.
        slots: answers of a model that are written at once.
        queue: answers of a model that may wait; beyond that clients get 429.
        context: tokens of a prompt and its answer (0: the model's own, at most 2,048).
        kv_cache: how keys and values are kept (``jaxlm.nn.attention.kv_cache``); None is as the model was saved.
        draft: a smaller model with the same tokenizer that proposes tokens.
        api_keys: a file with a key a line. Keys in the environment variable JAXLM_API_KEYS count too.
        origins: of web pages that may ask from a browser, as ``https://example.org``.
        timeout: seconds after which a request is given up.
        drain: seconds that running requests have to end.
        max_bytes: of the body of a request.
        ready: called with the address when requests are taken.

    UserError for models that cannot be served, and an address that cannot be had.
    """
    try:
        import uvicorn

        from jaxlm.serving.app import Limits, make_app
    except ImportError as error:
        raise UserError(f'serving needs {error.name}: pip install "jaxlm[serve]"') from None
    keys = Keys.read(api_keys)
    listener = _listen(host, port)
    try:
        served = _load(models, slots=slots, queue=queue, context=context, kv_cache=kv_cache, draft=draft)
        local = is_loopback(host)
        app = make_app(
            served, keys=keys, origins=origins, limits=Limits(timeout, max_bytes), local=local and not keys
        )
        if not keys and not local:
            _log.warning("anybody who reaches %s may ask: set %s or --api-keys", host, KEYS)
        address = f"http://{_shown(host)}:{listener.getsockname()[1]}"
        server = _server(uvicorn, app, drain, lambda: ready(address) if ready else None)
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        listener.close()


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    """Before models are loaded, so that a port that is taken is told at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        return listener
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host}:{port} ({reason}); choose another --host or --port") from None


def _load(models, *, kv_cache: KVCache | None, draft: str | None, **options: Any) -> list[Any]:
    from jaxlm.model import load
    from jaxlm.serving.models import Source, serve_model

    helper = None if draft is None else load(draft)
    if isinstance(models, Mapping):
        loaded = {name: lm if kv_cache is None else lm.configure(kv_cache=kv_cache) for name, lm in models.items()}
    else:
        sources = [Source.parse(str(each)) for each in ([models] if isinstance(models, str | Path) else models)]
        names = [source.name for source in sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two models are called {twice}: name them, as in a={twice} b=PATH")
        loaded = {
            source.name: load(source.path, adapter=source.adapter, kv_cache=kv_cache) for source in sources
        }
    for name, lm in loaded.items():
        for note in lm.info.get("notes", ()):
            _log.warning("%s: %s", name, note)
    return [serve_model(name, lm, draft=helper, **options) for name, lm in loaded.items()]


def _server(uvicorn, gate, drain: float, ready: Callable[[], None]):
    """A server that tells when it is ready, whose first signal begins the end, and whose second one is the end."""

    class Server(uvicorn.Server):
        ending: asyncio.Task | None = None

        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            ready()

        def handle_exit(self, number: int, frame) -> None:
            if gate.draining:
                self.force_exit = self.should_exit = True
                return
            gate.draining = True
            _log.warning("%s: %d requests are let end", signal.Signals(number).name, gate.open)

        async def on_tick(self, counter: int) -> bool:
            if gate.draining and self.ending is None:
                self.ending = asyncio.create_task(self._end())
            return await super().on_tick(counter)

        async def _end(self) -> None:
            try:
                async with asyncio.timeout(drain):
                    while gate.open:
                        await asyncio.sleep(0.02)
            except TimeoutError:
                _log.warning("%d requests did not end within %g s", gate.open, drain)
                self.force_exit = True
            self.should_exit = True

    config = uvicorn.Config(
        gate, log_config=None, access_log=False, server_header=False, limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=30, timeout_graceful_shutdown=5, lifespan="on",
    )
    return Server(config)
