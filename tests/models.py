"""Models to test with. Their weights come from NumPy: compiling initializers would take most of the time of tests."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm import nn
from jaxlm.core.tree import Params, map_params
from jaxlm.nn.config import ModelConfig


def build(config: ModelConfig, seed: int = 0) -> tuple[nnx.GraphDef, Params]:
    """What ``nn.build`` gives, with other random numbers: kernels ``[..., in, out]`` of deviation 1 / sqrt(in), where
    they write a residual stream 1 / sqrt(2 in layers); tables of deviation 0.02, scales of norms 1, the rest 0."""
    graphdef, shapes = nn.abstract(config)
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        if path.endswith(("/kernel", "/table")):
            std = 0.02 if path.endswith("/table") else shape.shape[-2] ** -0.5
            if path.endswith(("/o/kernel", "/down/kernel")):
                side = path.partition("/")[0]
                std *= (2 * (config.layers if config.kind == "decoder" else getattr(config, f"{side}_layers"))) ** -0.5
            return jnp.asarray(std * np.clip(rng.standard_normal(shape.shape), -3, 3), shape.dtype)
        return jnp.full(shape.shape, float(path.endswith("/scale")), shape.dtype)

    return graphdef, map_params(leaf, shapes)
