"""The fixture that runs commands."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cli.commands import run_command


@pytest.fixture(scope="session")
def jaxlm_command() -> Callable[..., tuple[int, str, str]]:
    """``jaxlm_command("inspect", "MODEL") -> (exit status, standard output, standard error)``."""
    return run_command
