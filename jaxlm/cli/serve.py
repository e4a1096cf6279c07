"""Serves models over HTTP, with OpenAI's API and a page in the browser, at the address that is printed.

    jaxlm serve MODEL
    jaxlm serve dense=MODEL small=DIR poems=MODEL+ADAPTER --port 8000

The name of a model is that of its directory, or the one before "=". API keys come from a file (--api-keys, one per
line) and from the environment variable JAXLM_API_KEYS. After SIGTERM, requests in progress finish before the server
stops.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxlm.cli.arguments import add_kv_cache
from jaxlm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", metavar="[NAME=]MODEL[+ADAPTER]", nargs="+",
        help="a model directory, a training run or hf://org/name; and a LoRA adapter in PEFT's format",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                        help="the address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free port (%(default)s)")
    parser.add_argument("--slots", type=int, default=8, metavar="N",
                        help="continuations of a model that are generated at once (%(default)s)")
    parser.add_argument("--queue", type=int, default=64, metavar="N",
                        help="continuations of a model that may wait (%(default)s)")
    parser.add_argument("--client-places", type=int, default=0, metavar="N",
                        help="continuations of a model that one client (an API key, or an address without keys) may "
                             "have; 0: as many as --queue or, if that is more, --slots (0)")
    parser.add_argument("--context", type=int, default=0, metavar="N",
                        help="tokens of prompt and continuation; 0: the model's own, at most 2,048 (0)")
    parser.add_argument("--default-max-tokens", type=int, metavar="N",
                        help="new tokens for requests without max_tokens (generation_config.json's, or else 16 and, "
                             "for a chat, the rest of the context)")
    add_kv_cache(parser)
    parser.add_argument("--draft", metavar="MODEL",
                        help="a smaller model with the same tokenizer, for speculative decoding")
    parser.add_argument("--api-keys", metavar="FILE", type=Path,
                        help="API keys, one per line; requests to /v1 and /metrics need one")
    parser.add_argument("--allow-origin", metavar="URL", action="append", default=[],
                        help="the origin of a web page that may use the server; may be repeated")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS",
                        help="after which a request is cancelled (%(default)g)")
    parser.add_argument("--drain", type=float, default=60.0, metavar="SECONDS",
                        help="that requests in progress have to finish after SIGTERM (%(default)g)")
    parser.add_argument("--max-bytes", type=int, default=1 << 20, metavar="N", help="bytes of a request, at most "
                        "(%(default)s)")


def run(args: argparse.Namespace) -> None:
    for name, least in (
        ("slots", 1), ("queue", 0), ("client_places", 0), ("context", 0), ("default_max_tokens", 1), ("timeout", 0.001),
        ("drain", 0), ("max_bytes", 1),
    ):
        if (given := getattr(args, name)) is not None and not given >= least:
            raise UserError(f"--{name.replace('_', '-')} is {given}: give {least} or more")
    from jaxlm.serving.server import serve

    serve(
        args.models, host=args.host, port=args.port, slots=args.slots, queue=args.queue,
        client_places=args.client_places, context=args.context, default_max_tokens=args.default_max_tokens,
        kv_cache=args.kv_cache, draft=args.draft, api_keys=args.api_keys, origins=args.allow_origin,
        timeout=args.timeout, drain=args.drain, max_bytes=args.max_bytes, ready=lambda at: print(at, flush=True),
    )
