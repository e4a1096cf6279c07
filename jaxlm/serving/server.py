"""``serve``: serves models at an address until a signal ends it."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.core.errors import UserError
from jaxlm.nn.config import KVCache
from jaxlm.serving.access import API_KEYS_VARIABLE, ApiKeys, is_loopback, parse_origin

if TYPE_CHECKING:
    from jaxlm.model import LM

__all__ = ["serve"]

_log = logging.getLogger("jaxlm.serving")


def serve(
    models: str | Path | Sequence[str] | Mapping[str, LM],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    slots: int = 8,
    queue: int = 64,
    client_places: int = 0,
    context: int = 0,
    default_max_tokens: int | None = None,
    kv_cache: KVCache | None = None,
    draft: str | None = None,
    api_keys: Path | None = None,
    origins: Sequence[str] = (),
    timeout: float = 600.0,
    drain: float = 60.0,
    max_bytes: int = 1 << 20,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves models over HTTP: OpenAI's completions and chat, translation, inspection, and a page at ``/``.

    After SIGTERM or SIGINT, requests in progress have ``drain`` seconds to finish; a second signal stops at once.

    Args:
        models: one or several of ``[NAME=]MODEL[+ADAPTER]``, where MODEL is what ``jaxlm.load`` takes; or loaded models
            by name.
        host: the address to listen on; the default is reachable from this machine only.
        port: 0 takes a free port.
        slots: continuations of a model that are generated at once.
        queue: continuations of a model that may wait; further requests get status 429.
        client_places: continuations of a model that one client (an API key, or an address without keys) may have at
            once; 0 for ``queue`` or, if that is more, ``slots``.
        context: tokens of a prompt and its continuation; 0 for the model's own, at most 2,048.
        default_max_tokens: new tokens for requests that give no ``max_tokens``; None: what the model's
            generation_config.json says, or else 16 for a completion and the rest of the context for a chat.
        kv_cache: the format of keys and values (``jaxlm.nn.attention.kv_cache``); None for that of the saved model.
        draft: a smaller model with the same tokenizer that proposes tokens.
        api_keys: a file with one API key per line, in addition to the environment variable JAXLM_API_KEYS.
        origins: web pages that may use the server from a browser, as ``https://example.org``.
        timeout: seconds after which a request is cancelled.
        drain: seconds that requests in progress have to finish.
        max_bytes: bytes of the body of a request, at most.
        ready: called with the address of the server when it accepts requests.

    Raises:
        UserError: when a model cannot be served, the address cannot be used, or an origin is not one.
    """
    try:
        from jaxlm.serving.app import RequestLimits, make_app
        from jaxlm.serving.draining import DrainingServer
    except ImportError as error:
        raise UserError(f'serving needs {error.name}: pip install "jaxlm[serve]"') from None
    from jaxlm.core.host_memory import share_one_heap
    from jaxlm.serving.models import serve_model

    share_one_heap()
    keys, origins = ApiKeys.load(api_keys), [parse_origin(origin) for origin in origins]
    listener = _listen(host, port)
    try:
        loaded, draft_model = _load(models, kv_cache, draft)
        served = [
            serve_model(
                name, lm, slots=slots, queue=queue, client_places=client_places, context=context,
                default_max_tokens=default_max_tokens, draft=draft_model,
            ) for name, lm in loaded.items()
        ]
        loopback = is_loopback(host)
        app = make_app(
            served, keys=keys, origins=origins, limits=RequestLimits(timeout, max_bytes),
            loopback_only=loopback and not keys,
        )
        if not keys and not loopback:
            _log.warning(
                "everybody who reaches %s may use the server: set %s or --api-keys", host, API_KEYS_VARIABLE
            )
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        server = DrainingServer(app, drain, lambda: ready(address) if ready else None, timeout)
        gc.collect()
        gc.freeze()  # what is there to stay is not looked at again while requests wait
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        gc.unfreeze()
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    """Opens the port before models are loaded, so that a port in use is reported at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        return listener
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port} ({reason}): choose another --host or --port") from None


def _load(
    models: str | Path | Sequence[str] | Mapping[str, LM], kv_cache: KVCache | None, draft: str | None
) -> tuple[dict[str, LM], LM | None]:
    """The models by name, and the draft model."""
    from jaxlm.model import load
    from jaxlm.serving.models import ModelSource

    draft_model = None if draft is None else load(draft, stacked=False)
    if isinstance(models, Mapping):
        loaded = {name: lm if kv_cache is None else lm.configure(kv_cache=kv_cache) for name, lm in models.items()}
    else:
        texts = [models] if isinstance(models, str | Path) else models
        sources = [ModelSource.parse(str(text)) for text in texts]
        names = [source.name for source in sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two models have the name {twice}: give them names, as in a={twice} b=PATH")
        loaded = {
            source.name: load(source.path, adapter=source.adapter, kv_cache=kv_cache, stacked=False)
            for source in sources
        }
    for name, lm in loaded.items():
        for note in lm.info.get("notes", ()):
            _log.warning("%s: %s", name, note)
    return loaded, draft_model
