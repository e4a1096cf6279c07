"""Serves models by HTTP, with OpenAI's interface, and a page to use them at the address that is printed.

    jaxlm serve MODEL
    jaxlm serve dense=MODEL small=DIR poems=MODEL+ADAPTER --port 8000

Each model is called by its directory's name, or as given before "=". API keys are read from a file (--api-keys, one a
line) or from the environment variable JAXLM_API_KEYS. SIGTERM lets the requests that run end.
"""

from __future__ import annotations

from pathlib import Path

from jaxlm.cli.arguments import add_kv_cache
from jaxlm.core.errors import UserError


def add_arguments(parser) -> None:
    parser.add_argument(
        "models", metavar="[NAME=]MODEL[+ADAPTER]", nargs="+",
        help="a model directory, a training run or hf://org/name; with a LoRA adapter of PEFT",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (%(default)s)")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="answers of a model at once (%(default)s)")
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="answers that may wait (%(default)s)")
    parser.add_argument("--context", type=int, default=0, metavar="N",
                        help="tokens of prompt and answer; 0: the model's own, at most 2,048")
    add_kv_cache(parser)
    parser.add_argument("--draft", metavar="MODEL", help="a smaller one with the same tokenizer, to propose tokens")
    parser.add_argument("--api-keys", metavar="FILE", type=Path, help="who has none of these keys may not ask")
    parser.add_argument("--allow-origin", metavar="URL", action="append", default=[],
                        help="of a web page that may ask from a browser; may be repeated")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for an answer (%(default)g)")
    parser.add_argument("--drain", type=float, default=60.0, metavar="SECONDS",
                        help="that requests have to end after SIGTERM (%(default)g)")
    parser.add_argument("--max-bytes", type=int, default=1 << 20, metavar="N", help="of a request (%(default)s)")


def run(args) -> None:
    for name, least in (("slots", 1), ("queue", 0), ("context", 0), ("timeout", 0.001), ("drain", 0), ("max_bytes", 1)):
        if not getattr(args, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give {least} or more")
    from jaxlm.serving.server import serve

    serve(
        args.models, host=args.host, port=args.port, slots=args.slots, queue=args.queue, context=args.context,
        kv_cache=args.kv_cache, draft=args.draft, api_keys=args.api_keys, origins=args.allow_origin,
        timeout=args.timeout, drain=args.drain, max_bytes=args.max_bytes, ready=lambda at: print(at, flush=True),
    )
