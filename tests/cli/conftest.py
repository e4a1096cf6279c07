"""Running commands in this process, without leaving traces in it."""

from __future__ import annotations

import logging
import os

import pytest

from jaxlm.cli import main


@pytest.fixture
def jaxlm_command(capsys, monkeypatch, tmp_path_factory):
    """``jaxlm_command("inspect", "MODEL") -> (exit status, standard output, standard error)``."""
    logger, absl = logging.getLogger("jaxlm"), logging.getLogger("absl")
    before = logger.handlers, logger.propagate, absl.level
    # What the command would set is set here, and so undone. A process that has yet to import jax takes it at its word.
    for name, value in (
        ("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("xla"))),
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"),
        ("TF_CPP_MIN_LOG_LEVEL", "2"),
    ):
        monkeypatch.setenv(name, os.environ.get(name, value))

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        out = capsys.readouterr()
        return caught.value.code, out.out, out.err

    yield run
    logger.handlers, logger.propagate = before[:2]
    absl.setLevel(before[2])
