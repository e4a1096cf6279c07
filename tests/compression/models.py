"""Small models of every kind, all of whose parameters are random, and their logits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.core.tree import map_params
from tests.nn import test_decoder, test_seq2seq

VARIANTS = {name: dataclasses.replace(test_decoder.SMALL, **each) for name, each in test_decoder.VARIANTS.items()}
VARIANTS |= {
    f"seq2seq-{name}": dataclasses.replace(test_seq2seq.SMALL, **each) for name, each in test_seq2seq.VARIANTS.items()
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 23, (2, 9)))


def some(*names: str, slow: str = "") -> list:
    """Variants to test, and those, separated by spaces, that prove the same for another kind of model."""
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow.split())]


def make(name: str, **changes):
    """The configuration and parameters of a variant of the models' own tests, with fields replaced."""
    config = dataclasses.replace(VARIANTS[name], **changes)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        std = leaf.shape[-2] ** -0.5 if path.endswith("/kernel") else 0.3
        return jnp.asarray(rng.normal(path.endswith("/scale"), std, leaf.shape), jnp.float32)

    return config, map_params(draw, nn.abstract(config)[1])


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params) -> jax.Array:
    """Of the same tokens always."""
    model = nnx.merge(nn.abstract(config)[0], params)
    return model(TOKENS, TOKENS[:, ::-1]) if config.kind == "seq2seq" else model(TOKENS)


def assert_whole(config, params) -> None:
    """That the parameters, their shapes and their logical axes are those of such a model."""
    want = nn.abstract(config)[1]
    assert jax.tree.structure(params) == jax.tree.structure(want)
    for (path, mine), (_, theirs) in zip(nnx.to_flat_state(params), nnx.to_flat_state(want), strict=True):
        assert mine.get_metadata("axes") == theirs.get_metadata("axes"), path
        assert (mine.get_value().shape, mine.get_value().dtype) == (theirs.get_value().shape, jnp.float32), path
