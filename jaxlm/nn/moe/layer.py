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
from jaxlm.nn.layers import ACTIVATIONS, Linear, Mlp, ParamKeys, gated_product, split_key, truncated_normal
from jaxlm.nn.moe.router import Router
from jaxlm.nn.moe.routing import Routing, apply_sorted, dispatch_in_rounds, dispatch_with_capacity, expert_capacity

__all__ = ["ExpertLinear", "Experts", "Moe"]


class ExpertLinear(nnx.Module):
    """A linear map for each expert: ``kernel_ExIxO (+ bias_ExO)``."""

    def __init__(
        self, shape: tuple[int, int, int], axes: tuple[str, str], *, bias: bool, keys: ParamKeys, scale: float = 1.0
    ):
        self.kernel = nnx.Param(truncated_normal(keys, shape, scale * shape[1] ** -0.5), axes=("experts", *axes))
        self.bias = nnx.Param(jnp.zeros((shape[0], shape[2])), axes=("experts", axes[1])) if bias else None

    def __call__(self, x: jax.Array, sizes_E: jax.Array | None) -> jax.Array:
        """Rows ``[M, I]`` sorted by expert, of which expert e has ``sizes_E[e]``; without sizes, rows ``[E, M, I]``."""
        kernel, axis = self.kernel.get_value(), self.kernel.get_metadata("axes")[-2]
        if sizes_E is None:
            y = jax.vmap(partial(ops.dot, parts=num_parts(axis, x.shape[1])))(x, kernel)
        else:
            y = ops.ragged_dot(x, kernel, sizes_E)
        if self.bias is None:
            return y
        bias_ExO = self.bias.get_value().astype(y.dtype)
        if sizes_E is None:
            return y + bias_ExO[:, None]
        return y + jnp.repeat(bias_ExO, sizes_E, axis=0, total_repeat_length=len(y))


class Experts(nnx.Module):
    """The MLPs of all experts; rows as for ``ExpertLinear``."""

    def __init__(self, config: StackConfig, *, keys: ParamKeys, scale: float):
        width, ffn, experts = config.width, config.d_expert, config.experts
        self.act = gated_product(config) if config.gated else ACTIVATIONS[config.activation]
        self.ffn_dropout = config.ffn_dropout
        linear = partial(ExpertLinear, bias=config.expert_bias, keys=keys)
        self.gate = linear((experts, width, ffn), ("embed", "mlp")) if config.gated else None
        self.up = linear((experts, width, ffn), ("embed", "mlp"))
        self.down = linear((experts, ffn, width), ("mlp", "embed"), scale=scale)

    def __call__(self, x: jax.Array, sizes_E: jax.Array | None, key: jax.Array | None) -> jax.Array:
        h = self.up(x, sizes_E)
        h = self.act(h) if self.gate is None else self.act(self.gate(x, sizes_E), h)
        return self.down(ops.dropout(h, self.ffn_dropout, key), sizes_E)


class Moe(nnx.Module):
    """A token's output is the sum of the outputs of its ``experts_per_token`` best experts, weighted by the router, and
    of the output of the shared experts, if there are some.

    On a mesh each device routes its own tokens (``nn.moe.routing``). A choice that ``expert_routing`` "capacity" drops
    adds nothing: the residual stream carries the token on.
    """

    def __init__(self, config: StackConfig, *, keys: ParamKeys, scale: float):
        self.config = config
        self.router = Router(config, keys=keys)
        self.experts = Experts(config, keys=keys, scale=scale)
        shared, gated = config.shared_expert_ffn, config.shared_expert_gate
        self.shared = Mlp(config, keys=keys, scale=scale, ffn=shared) if shared else None
        gate = partial(Linear, config.width, 1, ("embed", "features"), bias=False, keys=keys)
        self.shared_gate = gate() if shared and gated else None

    def __call__(self, x_BxTxD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Routing]:
        """The output ``[B, T, D]``, and what the router did.

        Raises:
            UserError: when the mesh axis ``expert`` does not divide the experts.
        """
        if self.shared is None:
            return self.routed(x_BxTxD, key)
        key, shared_key = split_key(key, 2)
        y_BxTxD, routing = self.routed(x_BxTxD, key)
        shared_BxTxD = self.shared(x_BxTxD, shared_key)
        if self.shared_gate is not None:
            shared_BxTxD *= jax.nn.sigmoid(self.shared_gate(x_BxTxD))
        return y_BxTxD + shared_BxTxD, routing

    def routed(self, x_BxTxD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Routing]:
        """``__call__`` without the shared experts."""
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
            return _apply_on_device(self.router, self.experts, x_BxTxD, key, {})
        graphdef, params = nnx.split((self.router, self.experts))
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
            y_BxTxD, routing = _apply_on_device(*nnx.merge(graphdef, params), x_BxTxD, key, sizes)
            return y_BxTxD, jax.tree.map(lambda leaf: leaf[None], routing)

        y_BxTxD, routing = on_each_device(params, x_BxTxD, key)
        return y_BxTxD, jax.tree.map(lambda leaf: jnp.sum(leaf, 0), routing)


def _apply_on_device(
    router: Router, experts: Experts, x_BxTxD: jax.Array, key: jax.Array | None, sizes: dict[str, int]
) -> tuple[jax.Array, Routing]:
    """``Moe.routed`` for the tokens of one device, on a mesh whose axes have these sizes."""
    config, (B, T, D) = router.config, x_BxTxD.shape
    E, K = config.experts, config.experts_per_token
    weights_MxK, experts_MxK, routing = router.choose(x_BxTxD.reshape(-1, D))
    tokens_BxTxD, choices_BxTxK = x_BxTxD, experts_MxK.reshape(B, T, K)
    if config.scale_expert_inputs:  # each choice is a token of its own, with one choice
        weighted_MxKxD = jnp.einsum("md,mk->mkd", x_BxTxD.reshape(-1, D), weights_MxK.astype(x_BxTxD.dtype))
        tokens_BxTxD, choices_BxTxK = weighted_MxKxD.reshape(B, T * K, D), experts_MxK.reshape(B, T * K, 1)
        weights_MxK = jnp.ones_like(weights_MxK)

    def apply(rows, sizes_E=None):
        return experts(rows, sizes_E, key)

    expert_axis, length_axis = (axis if sizes.get(axis, 1) > 1 else None for axis in ("expert", "sequence"))
    if config.expert_routing == "capacity":
        slots = expert_capacity(config.capacity_factor, T * sizes.get("sequence", 1), K, E)
        y, has_slot = dispatch_with_capacity(
            apply, tokens_BxTxD, choices_BxTxK, E, slots, length_axis=length_axis, expert_axis=expert_axis
        )
        routing = dataclasses.replace(routing, dropped=jnp.sum(~has_slot, dtype=jnp.float32))
    else:
        tokens_MxD, choices_MxK = tokens_BxTxD.reshape(-1, D), choices_BxTxK.reshape(-1, choices_BxTxK.shape[-1])
        if expert_axis is None:
            y = apply_sorted(apply, tokens_MxD, choices_MxK, E)
        else:
            slots = expert_capacity(config.capacity_factor, B * T, K, E)
            y = dispatch_in_rounds(
                apply, tokens_MxD, choices_MxK, E, slots, expert_axis=expert_axis, token_axes=tuple(sizes)
            )
    y_MxD = jnp.einsum("mkd,mk->md", y.reshape(-1, K, D), weights_MxK.astype(y.dtype))
    return y_MxD.reshape(B, T, D), routing


def _mapped_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh in use over which ``Moe`` maps by hand.

    Tensor parallelism is left to XLA. Axes that are mapped outside (a pipeline's "stage") do not count.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)) if not mesh.empty else {}
    return {axis: mesh.shape[axis] for axis in types if axis != "tensor" and types[axis] != AxisType.Manual}


def _param_spec(path: tuple, array: jax.Array) -> P:
    """How an array of a parameter is split among devices: those of experts along their first dimension."""
    return P("expert") if path[0] == 1 else P()  # of (router, experts)
