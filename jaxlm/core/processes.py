"""Modules of jaxlm that run in a process of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["module_command", "module_environment"]


def module_command(module: str) -> list[str]:
    """The command that runs a module: ``python -P -m MODULE``.

    Without ``-P``, Python would import modules from the working directory first, which may hold anybody's files.
    """
    return [sys.executable, "-P", "-m", module]


def module_environment(**variables: str) -> dict[str, str]:
    """The environment of such a process: that of this one with ``variables``, and with its places to import from.

    An empty entry of ``sys.path`` stands for the working directory, and is left out.
    """
    root = str(Path(__file__).parents[2])
    places = [place for place in sys.path if place]
    places = places if root in places else [*places, root]
    return os.environ | variables | {"PYTHONPATH": os.pathsep.join(places)}
