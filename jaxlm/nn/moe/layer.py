"""A mixture-of-experts MLP: each token goes to a few of many small MLPs (arXiv:1701.06538, arXiv:2401.04088)."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlm.core import ops
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import RULES
from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import ACTIVATIONS, Linear, normal
from jaxlm.nn.moe.routing import Routing, capacity, in_rounds, limited, sorted_by_expert


class ExpertLinear(nnx.Module):
    """A linear map an expert: ``kernel_ExIxO``."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, str], *, rngs: nnx.Rngs, scale: float = 1.0):
        self.kernel = nnx.Param(normal(rngs, shape, scale * shape[1] ** -0.5), axes=("experts", *axes))

    def __call__(self, x: jax.Array, sizes_E: jax.Array | None) -> jax.Array:
        """Rows ``[M, I]`` sorted by expert, ``sizes_E`` of them for each; without sizes, rows ``[E, M, I]``."""
        kernel = self.kernel.get_value()
        return jax.vmap(ops.dot)(x, kernel) if sizes_E is None else ops.ragged_dot(x, kernel, sizes_E)


class Experts(nnx.Module):
    """The MLPs themselves, on rows sorted by expert, or as many rows for each."""

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs, scale: float):
        width, ffn, experts = config.width, config.d_expert, config.experts
        self.act = ACTIVATIONS[config.activation]
        self.ffn_dropout = config.ffn_dropout
        self.gate = ExpertLinear((experts, width, ffn), ("embed", "mlp"), rngs=rngs) if config.gated else None
        self.up = ExpertLinear((experts, width, ffn), ("embed", "mlp"), rngs=rngs)
        self.down = ExpertLinear((experts, ffn, width), ("mlp", "embed"), rngs=rngs, scale=scale)

    def __call__(self, x: jax.Array, sizes_E: jax.Array | None, key: jax.Array | None) -> jax.Array:
        h = self.up(x, sizes_E)
        h = self.act(h) if self.gate is None else self.act(self.gate(x, sizes_E)) * h
        return self.down(ops.dropout(h, self.ffn_dropout, key), sizes_E)


class Moe(nnx.Module):
    """Each token's output is the sum of its ``experts_per_token`` best experts', weighted by the router.

    On a mesh each device routes its own tokens (``nn.moe.routing``). A choice that ``expert_routing`` "capacity" drops adds
    nothing: the token goes on by the residual stream.
    """

    def __init__(self, config: StackConfig, *, rngs: nnx.Rngs, scale: float):
        self.config = config
        self.router = Linear(config.width, config.experts, ("embed", "experts"), bias=False, rngs=rngs)
        self.experts = Experts(config, rngs=rngs, scale=scale)

    def __call__(self, x_BxTxD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Routing]:
        """The output, and sums over the tokens of what the router did."""
        sizes = _sizes()
        holding = tuple(axis for axis in (*RULES["batch"], "sequence") if axis in sizes)  # tokens
        ways, parts = math.prod(sizes[axis] for axis in holding), sizes.get("sequence", 1)
        experts, devices = self.config.experts, sizes.get("expert", 1)
        if experts % devices:
            raise UserError(f"{experts} experts do not divide among {devices} devices; choose another mesh.expert")
        if ways == 1 or x_BxTxD.shape[0] % (ways // parts) or x_BxTxD.shape[1] % parts:
            return self._here(x_BxTxD, key, {})
        graphdef, params = nnx.split(self)
        rows = P(tuple(axis for axis in holding if axis != "sequence") or None, "sequence" if parts > 1 else None)
        by_expert = nnx.from_flat_state(
            (path, variable.replace(jax.tree.map(partial(_split, path), variable.get_value())))
            for path, variable in nnx.to_flat_state(params)
        )

        @partial(
            jax.shard_map, in_specs=(by_expert, rows, P()), out_specs=(rows, P(holding)), axis_names=set(sizes),
            check_vma=False,
        )
        def everywhere(params, x_BxTxD, key):
            if key is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(holding))
            y_BxTxD, routing = nnx.merge(graphdef, params)._here(x_BxTxD, key, sizes)
            return y_BxTxD, jax.tree.map(lambda leaf: leaf[None], routing)

        y_BxTxD, routing = everywhere(params, x_BxTxD, key)
        return y_BxTxD, jax.tree.map(lambda leaf: jnp.sum(leaf, 0), routing)

    def _here(self, x_BxTxD: jax.Array, key: jax.Array | None, sizes: dict[str, int]) -> tuple[jax.Array, Routing]:
        """The tokens of this device, on a mesh whose axes have these sizes."""
        config, (B, T, D) = self.config, x_BxTxD.shape
        weights_MxK, experts_MxK, routing = self.route(x_BxTxD.reshape(-1, D))

        def apply(rows, sizes_E=None):
            return self.experts(rows, sizes_E, key)

        spread, parts = (axis if sizes.get(axis, 1) > 1 else None for axis in ("expert", "sequence"))
        K = config.experts_per_token
        if config.expert_routing == "capacity":
            slots = capacity(config.capacity_factor, T * sizes.get("sequence", 1), K, config.experts)
            y, kept = limited(
                apply, x_BxTxD, experts_MxK.reshape(B, T, K), config.experts, slots, parts=parts, spread=spread
            )
            routing = dataclasses.replace(routing, dropped=jnp.sum(~kept, dtype=jnp.float32))
        elif spread is None:
            y = sorted_by_expert(apply, x_BxTxD.reshape(-1, D), experts_MxK, config.experts)
        else:
            slots = capacity(config.capacity_factor, B * T, K, config.experts)
            y = in_rounds(
                apply, x_BxTxD.reshape(-1, D), experts_MxK, config.experts, slots, spread=spread,
                everywhere=tuple(sizes),
            )
        y_MxD = jnp.einsum("mkd,mk->md", y.reshape(-1, K, D), weights_MxK.astype(y.dtype))
        return y_MxD.reshape(B, T, D), routing

    def route(self, x_MxD: jax.Array) -> tuple[jax.Array, jax.Array, Routing]:
        """Weights (float32) and numbers of each token's experts, ``[M, K]`` each, best first, and their sums."""
        logits_MxE = self.router(x_MxD).astype(jnp.float32)
        probabilities_MxE = jax.nn.softmax(logits_MxE, -1)
        weights_MxK, experts_MxK = jax.lax.top_k(probabilities_MxE, self.config.experts_per_token)
        if self.config.expert_renormalize:
            weights_MxK /= jnp.sum(weights_MxK, -1, keepdims=True)
        routing = Routing(
            tokens=jnp.asarray(len(x_MxD), jnp.float32),
            chosen_E=jnp.zeros(self.config.experts).at[experts_MxK.reshape(-1)].add(1.0),
            probability_E=jnp.sum(probabilities_MxE, 0),
            square=jnp.sum(jnp.square(jax.nn.logsumexp(logits_MxE, -1))),
            dropped=jnp.zeros(()),
        )
        return weights_MxK, experts_MxK, routing


def _sizes() -> dict[str, int]:
    """Of the axes of the mesh in use over which ``Moe`` maps by hand. Tensor parallelism stays XLA's; "stage" has no
    part in it, but a pipeline maps over it from outside."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)) if not mesh.empty else {}
    return {axis: mesh.shape[axis] for axis in types if axis != "tensor" and types[axis] != AxisType.Manual}


def _split(path: tuple, part: jax.Array) -> P:
    """How an array of a parameter is split among devices: those of experts by their first dimension."""
    return P("expert") if path[0] == "experts" else P()
