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
from jaxlm.core.sharding import RULES, num_parts
from jaxlm.nn.config import StackConfig
from jaxlm.nn.layers import ACTIVATIONS, Linear, ParamKeys, truncated_normal
from jaxlm.nn.moe.routing import Routing, apply_sorted, dispatch_in_rounds, dispatch_with_capacity, expert_capacity

__all__ = ["ExpertLinear", "Experts", "Moe"]


class ExpertLinear(nnx.Module):
    """A linear map for each expert: ``kernel_ExIxO``."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, str], *, keys: ParamKeys, scale: float = 1.0):
        self.kernel = nnx.Param(truncated_normal(keys, shape, scale * shape[1] ** -0.5), axes=("experts", *axes))

    def __call__(self, x: jax.Array, sizes_E: jax.Array | None) -> jax.Array:
        """Rows ``[M, I]`` sorted by expert, of which expert e has ``sizes_E[e]``; without sizes, rows ``[E, M, I]``."""
        kernel, axis = self.kernel.get_value(), self.kernel.get_metadata("axes")[-2]
        if sizes_E is None:
            return jax.vmap(partial(ops.dot, parts=num_parts(axis, x.shape[1])))(x, kernel)
        return ops.ragged_dot(x, kernel, sizes_E)


class Experts(nnx.Module):
    """The MLPs of all experts; rows as for ``ExpertLinear``."""

    def __init__(self, config: StackConfig, *, keys: ParamKeys, scale: float):
        width, ffn, experts = config.width, config.d_expert, config.experts
        self.act = ACTIVATIONS[config.activation]
        self.ffn_dropout = config.ffn_dropout
        self.gate = ExpertLinear((experts, width, ffn), ("embed", "mlp"), keys=keys) if config.gated else None
        self.up = ExpertLinear((experts, width, ffn), ("embed", "mlp"), keys=keys)
        self.down = ExpertLinear((experts, ffn, width), ("mlp", "embed"), keys=keys, scale=scale)

    def __call__(self, x: jax.Array, sizes_E: jax.Array | None, key: jax.Array | None) -> jax.Array:
        h = self.up(x, sizes_E)
        h = self.act(h) if self.gate is None else self.act(self.gate(x, sizes_E)) * h
        return self.down(ops.dropout(h, self.ffn_dropout, key), sizes_E)


class Moe(nnx.Module):
    """A token's output is the sum of the outputs of its ``experts_per_token`` best experts, weighted by the router.

    On a mesh each device routes its own tokens (``nn.moe.routing``). A choice that ``expert_routing`` "capacity" drops
    adds nothing: the residual stream carries the token on.
    """

    def __init__(self, config: StackConfig, *, keys: ParamKeys, scale: float):
        self.config = config
        self.router = Linear(config.width, config.experts, ("embed", "experts"), bias=False, keys=keys)
        self.experts = Experts(config, keys=keys, scale=scale)

    def __call__(self, x_BxTxD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Routing]:
        """The output ``[B, T, D]``, and what the router did.

        Raises:
            UserError: when the mesh axis ``expert`` does not divide the experts.
        """
        sizes = _mapped_axes()
        token_axes = tuple(axis for axis in (*RULES["batch"], "sequence") if axis in sizes)
        token_shards, length_shards = math.prod(sizes[axis] for axis in token_axes), sizes.get("sequence", 1)
        experts, expert_shards = self.config.experts, sizes.get("expert", 1)
        if experts % expert_shards:
            raise UserError(
                f"{experts} experts do not divide among {expert_shards} devices; choose another mesh.expert"
            )
        row_shards = token_shards // length_shards
        if token_shards == 1 or x_BxTxD.shape[0] % row_shards or x_BxTxD.shape[1] % length_shards:
            return self._on_device(x_BxTxD, key, {})
        graphdef, params = nnx.split(self)
        row_axes = tuple(axis for axis in token_axes if axis != "sequence")
        tokens = P(row_axes or None, "sequence" if length_shards > 1 else None)
        by_expert = nnx.from_flat_state(
            (path, variable.replace(jax.tree.map(partial(_param_spec, path), variable.get_value())))
            for path, variable in nnx.to_flat_state(params)
        )

        @partial(
            jax.shard_map, in_specs=(by_expert, tokens, P()), out_specs=(tokens, P(token_axes)), axis_names=set(sizes),
            check_vma=False,
        )
        def on_each_device(params, x_BxTxD, key):
            if key is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(token_axes))
            y_BxTxD, routing = nnx.merge(graphdef, params)._on_device(x_BxTxD, key, sizes)
            return y_BxTxD, jax.tree.map(lambda leaf: leaf[None], routing)

        y_BxTxD, routing = on_each_device(params, x_BxTxD, key)
        return y_BxTxD, jax.tree.map(lambda leaf: jnp.sum(leaf, 0), routing)

    def _on_device(
        self, x_BxTxD: jax.Array, key: jax.Array | None, sizes: dict[str, int]
    ) -> tuple[jax.Array, Routing]:
        """``__call__`` for the tokens of one device, on a mesh whose axes have these sizes."""
        config, (B, T, D) = self.config, x_BxTxD.shape
        K = config.experts_per_token
        weights_MxK, experts_MxK, routing = self.route(x_BxTxD.reshape(-1, D))

        def apply(rows, sizes_E=None):
            return self.experts(rows, sizes_E, key)

        expert_axis, length_axis = (axis if sizes.get(axis, 1) > 1 else None for axis in ("expert", "sequence"))
        if config.expert_routing == "capacity":
            slots = expert_capacity(config.capacity_factor, T * sizes.get("sequence", 1), K, config.experts)
            y, has_slot = dispatch_with_capacity(
                apply, x_BxTxD, experts_MxK.reshape(B, T, K), config.experts, slots, length_axis=length_axis,
                expert_axis=expert_axis,
            )
            routing = dataclasses.replace(routing, dropped=jnp.sum(~has_slot, dtype=jnp.float32))
        elif expert_axis is None:
            y = apply_sorted(apply, x_BxTxD.reshape(-1, D), experts_MxK, config.experts)
        else:
            slots = expert_capacity(config.capacity_factor, B * T, K, config.experts)
            y = dispatch_in_rounds(
                apply, x_BxTxD.reshape(-1, D), experts_MxK, config.experts, slots, expert_axis=expert_axis,
                token_axes=tuple(sizes),
            )
        y_MxD = jnp.einsum("mkd,mk->md", y.reshape(-1, K, D), weights_MxK.astype(y.dtype))
        return y_MxD.reshape(B, T, D), routing

    def route(self, x_MxD: jax.Array) -> tuple[jax.Array, jax.Array, Routing]:
        """Weights (float32) and numbers of each token's experts, ``[M, K]`` each, the best first; and statistics."""
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


def _mapped_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh in use over which ``Moe`` maps by hand.

    Tensor parallelism is left to XLA. Axes that are mapped outside (a pipeline's "stage") do not count.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)) if not mesh.empty else {}
    return {axis: mesh.shape[axis] for axis in types if axis != "tensor" and types[axis] != AxisType.Manual}


def _param_spec(path: tuple, array: jax.Array) -> P:
    """How an array of a parameter is split among devices: those of experts along their first dimension."""
    return P("expert") if path[0] == "experts" else P()
