"""``jaxlm COMMAND ...``: finds the command, and turns what users can mend into one line and exit status 2.

A command is a module with ``add_arguments(parser)`` and ``run(args)``. It imports JAX inside ``run``, so that help is
there at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jaxlm.core.errors import UserError

COMMANDS = {
    "quickstart": "train, compress, evaluate and translate on built-in data, in minutes on a CPU",
    "train": "train the experiment of a Python file, or go on where it stopped",
    "evaluate": "perplexity of a model on some data; BLEU and chrF where it translates",
    "compress": "make a model smaller by a recipe",
    "recipes": "list what compress can do, by name",
    "presets": "list the shapes of models and meshes that have names",
    "generate": "continue a text",
    "translate": "translate lines",
    "export": "write a model for transformers",
    "serve": "models by HTTP, with OpenAI's interface and a page to use them",
    "inspect": "what is in a model: configuration, sizes, tensors",
    "plan": "forecast a training or a server on devices that are not there",
}


class Parser(argparse.ArgumentParser):
    """Mistakes are UserErrors of one line; options are written out, for train takes more of them than it names."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command line (``sys.argv`` by default) and exits: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        status = 0
    except UserError as error:
        status = _complain(str(error))
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        if error.filename is None:
            raise
        status = _complain(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("jaxlm: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _complain(message: str) -> int:
    print(f"jaxlm: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return
    if argv[0] == "--version":
        from jaxlm import __version__

        print(f"jaxlm {__version__}")
        return
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.0)[0]
        raise UserError(f"unknown command {name!r}; the nearest is {near!r}, see jaxlm --help")
    command = importlib.import_module(f"jaxlm.cli.{name}")
    parser = Parser(prog=f"jaxlm {name}", description=command.__doc__)
    command.add_arguments(parser)
    args, others = parser.parse_known_args(argv[1:])
    taken = getattr(args, "overrides", None)  # what begins the names of settings, "--a.b", where it takes any
    for i, word in enumerate(others):
        named = word.startswith("--")
        if taken is None or (named and not word[2:].startswith(taken)) or (taken and not named and i == 0):
            parser.error(f"unknown argument {word!r}")
    args.overrides = others
    _prepare()
    command.run(args)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join([
        "jaxlm trains language and translation models, makes them smaller and faster, and measures both.", "",
        "usage: jaxlm COMMAND ...        (jaxlm COMMAND --help tells more)", "", *lines,
    ])


def _prepare() -> None:
    """What the environment leaves open: compiled programs are kept for the next start, and libraries keep quiet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of XLA and JAX's runtime: errors
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("jaxlm: %(message)s"))
    logger = logging.getLogger("jaxlm")
    logger.handlers, logger.propagate = [handler], False
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it also raises

