"""``jaxlm COMMAND ...``: the table of commands, and ``main``, which runs one.

A command is a module of this package with ``add_arguments(parser)`` and ``run(args)``. It imports JAX inside ``run``,
so that ``--help`` is fast. A mistake of the user ends in one line on standard error and exit status 2.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from pathlib import Path

from jaxlm.core.errors import UserError

TYPE_CHECKING = False  # typing is left out of what every start of the command line imports
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

COMMANDS = {
    "quickstart": "train, compress, evaluate and translate with built-in data, in minutes on a CPU",
    "train": "train the experiment of a Python file, or resume it",
    "evaluate": "measure perplexity on data, and BLEU and chrF of a translation model",
    "compress": "make a model smaller with a recipe or to a budget",
    "recipes": "list the recipes of compress",
    "presets": "list the named shapes of models and meshes",
    "generate": "continue texts or answer messages",
    "translate": "translate the lines of a file",
    "export": "write a model for transformers, vLLM or llama.cpp",
    "serve": "serve models over HTTP, with OpenAI's API and a page in the browser",
    "inspect": "show the configuration, sizes and tensors of a model",
    "plan": "forecast a training or a server for devices that need not exist",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors. Options cannot be abbreviated, because some commands accept more
    options than they declare (``--a.b VALUE``)."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command line (``sys.argv`` by default) and exits: 0, 2 for a mistake of the user, 130 for Ctrl-C."""
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        status = 0
    except UserError as error:
        status = _report(str(error))
    except BrokenPipeError:  # the reader of standard output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        if error.filename is None:
            raise
        status = _report(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("jaxlm: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _report(message: str) -> int:
    """Prints a user's mistake as one line; the exit status."""
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
    args, rest = parser.parse_known_args(argv[1:])
    _check_rest(parser, rest, getattr(args, "overrides", None))
    args.overrides = rest
    _prepare()
    command.run(args)


def _check_rest(parser: Parser, rest: list[str], prefix: str | None) -> None:
    """Checks the arguments that the parser does not know: settings ``--a.b VALUE`` whose names begin with ``prefix``;
    none at all if that is None."""
    for i, word in enumerate(rest):
        is_option = word.startswith("--")
        wrong_option = is_option and not word[2:].startswith(prefix or "")
        if prefix is None or wrong_option or (prefix and not is_option and i == 0):
            parser.error(f"unknown argument {word!r}")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join([
        "jaxlm trains language and translation models, makes them smaller and faster, and measures both.", "",
        "usage: jaxlm COMMAND ...        (jaxlm COMMAND --help describes it)", "", *lines,
    ])


def _prepare() -> None:
    """Keeps compiled programs for the next start, and libraries quiet, unless the environment says otherwise."""
    import logging  # half the time of this module's import

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA logs errors only
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("jaxlm: %(message)s"))
    logger = logging.getLogger("jaxlm")
    logger.handlers, logger.propagate = [handler], False
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it also raises
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _unraisable(unraisable: Any) -> None:
    """Prints an exception that nobody can catch. Where a disk is full, Orbax closes an event loop to which TensorStore
    still tells of other writes; that is no news beside the error that follows."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)

