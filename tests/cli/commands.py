"""Runs commands in the process of the test, without leaving traces in it; and small models to run them on."""

from __future__ import annotations

import io
import logging
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import nn
from jaxlm.cli import main
from jaxlm.core.tree import map_params
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.directory import write_model


def run_command(*words: object) -> tuple[int, str, str]:
    """``run_command("inspect", "MODEL") -> (exit status, standard output, standard error)``."""
    logger, absl = logging.getLogger("jaxlm"), logging.getLogger("absl")
    handlers, propagate, level = logger.handlers, logger.propagate, absl.level
    out, err = io.StringIO(), io.StringIO()
    try:
        with mock.patch.dict(os.environ), redirect_stdout(out), redirect_stderr(err):
            with pytest.raises(SystemExit) as caught:
                main([str(word) for word in words])
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        absl.setLevel(level)
    return caught.value.code, out.getvalue(), err.getvalue()


def save_model(path: Path, make: type, **options: object) -> Path:
    """An untrained model in a directory, with a tokenizer of the characters "abcdefgh "."""
    tokenizer = Tokenizer.train(["abcdefgh "], "char")
    config = make(vocab_size=tokenizer.vocab_size, width=16, heads=2, **options)
    rng = np.random.default_rng(0)
    like = nn.abstract(config)[1]
    params = map_params(lambda _, leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), like)
    return write_model(path, config, params, tokenizer)
