"""A mixture-of-experts MLP: each token goes to a few of many small MLPs (arXiv:1701.06538, arXiv:2401.04088)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core import ops
from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import ACTIVATIONS, Linear, dropout, normal


class ExpertLinear(nnx.Module):
    """A linear map an expert: ``kernel_ExIxO``."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, str], *, rngs: nnx.Rngs, scale: float = 1.0):
        self.kernel = nnx.Param(normal(rngs, shape, scale * shape[1] ** -0.5), axes=("experts", *axes))

    def __call__(self, x_MxI: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """Rows sorted by expert, ``sizes_E`` of them for each."""
        return ops.ragged_dot(x_MxI, self.kernel.get_value(), sizes_E)


class Experts(nnx.Module):
    """The MLPs themselves, on rows sorted by expert."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs, scale: float):
        width, ffn, experts = config.width, config.d_expert, config.experts
        self.act = ACTIVATIONS[config.activation]
        self.ffn_dropout = config.ffn_dropout
        self.gate = ExpertLinear((experts, width, ffn), ("embed", "mlp"), rngs=rngs) if config.gated else None
        self.up = ExpertLinear((experts, width, ffn), ("embed", "mlp"), rngs=rngs)
        self.down = ExpertLinear((experts, ffn, width), ("mlp", "embed"), rngs=rngs, scale=scale)

    def __call__(self, x_MxD: jax.Array, sizes_E: jax.Array, key: jax.Array | None) -> jax.Array:
        h = self.up(x_MxD, sizes_E)
        h = self.act(h) if self.gate is None else self.act(self.gate(x_MxD, sizes_E)) * h
        return self.down(dropout(h, self.ffn_dropout, key), sizes_E)


class Moe(nnx.Module):
    """Each token's output is the sum of its ``experts_per_token`` best experts', weighted by the router.

    No token is dropped: the copies of the tokens are sorted by expert and each expert multiplies its run of them.
    """

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs, scale: float):
        self.config = config
        self.router = Linear(config.width, config.experts, ("embed", "experts"), bias=False, rngs=rngs)
        self.experts = Experts(config, rngs=rngs, scale=scale)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        x_MxD = x.reshape(-1, x.shape[-1])
        weights_MxK, experts_MxK = self.route(x_MxD)
        order = jnp.argsort(experts_MxK.reshape(-1), stable=True)
        sizes_E = jnp.bincount(experts_MxK.reshape(-1), length=self.config.experts).astype(jnp.int32)
        sorted_MKxD = self.experts(x_MxD[order // experts_MxK.shape[1]], sizes_E, key)
        y_MKxD = jnp.zeros_like(sorted_MKxD).at[order].set(sorted_MKxD, unique_indices=True)
        y_MxD = jnp.einsum("mkd,mk->md", y_MKxD.reshape(*weights_MxK.shape, -1), weights_MxK.astype(x.dtype))
        return y_MxD.reshape(x.shape)

    def route(self, x_MxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights (float32) and numbers of each token's experts, ``[M, K]`` each, best first."""
        probabilities_MxE = jax.nn.softmax(self.router(x_MxD).astype(jnp.float32), -1)
        weights_MxK, experts_MxK = jax.lax.top_k(probabilities_MxE, self.config.experts_per_token)
        if self.config.expert_renormalize:
            weights_MxK /= jnp.sum(weights_MxK, -1, keepdims=True)
        return weights_MxK, experts_MxK
