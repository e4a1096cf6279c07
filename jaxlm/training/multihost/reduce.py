"""An all-reduce of gradients over the data axis in fewer bits, for replicas that are connected by a slow network.

An all-reduce is a reduce-scatter and an all-gather. Each device cuts its gradient into one part per device, sends the
parts in bfloat16, or in int8 with a scale for every 256 numbers, and adds up in float32 what it receives
(arXiv:2306.10209, section 3.3, does so in int4). Where the optimizer is split over the data axis nothing else is
needed, since each device has the part that it updates. Elsewhere the sums are rounded once more and gathered. int8 is
rounded stochastically: the error is noise of mean zero, so none has to be carried to the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = ["Bits", "per_replica", "all_reduce_compressed"]

Bits = Literal["bf16", "int8"]
AXIS = "data"
_BLOCK = 256


def per_replica(fn: Callable[..., Any], replicated: int) -> Callable[..., Any]:
    """``fn(*arguments, batch, key)``, run by each replica of the data axis on its own rows and with its own key. The
    first ``replicated`` arguments are the same for all. Results have a new first dimension, one entry per replica."""

    def one(*args):
        *shared, batch, key, part = args
        return jax.tree.map(lambda x: x[None], fn(*shared, batch, jax.random.fold_in(key, part[0])))

    def each(*args):
        parts = jax.sharding.get_abstract_mesh().shape[AXIS]
        run = jax.shard_map(
            one, in_specs=(*[P()] * replicated, P(AXIS), P(), P(AXIS)), out_specs=P(AXIS), axis_names={AXIS},
            check_vma=False,  # otherwise JAX would sum the gradients itself
        )
        return run(*args, jnp.arange(parts))

    return each


def all_reduce_compressed(
    gradients: dict[str, Array], params: dict[str, NamedSharding], sums: dict[str, NamedSharding], bits: Bits,
    key: Array,
) -> dict[str, Array]:
    """The sums of gradients ``[replicas, ...]`` over their first dimension, which is split over the data axis.

    Args:
        gradients: by path.
        params: the shardings of the parameters.
        sums: the shardings of the results: those of the parameters, or split over the data axis in one dimension more.
        bits: the format that is sent.
        key: for the rounding to int8.
    """
    return {
        path: _sum(gradient, params[path], sums[path], bits, jax.random.fold_in(key, index))
        for index, (path, gradient) in enumerate(gradients.items())
    }


def _sum(gradient: Array, whole: NamedSharding, wanted: NamedSharding, bits: Bits, key: Array) -> Array:
    mesh, parts = whole.mesh, whole.mesh.shape[AXIS]
    split = next((i for i, names in enumerate(wanted.spec) if names and AXIS in (names, *names)), None)
    devices = jnp.arange(mesh.size).reshape(mesh.devices.shape)

    def local(gradient, key, device):
        gradient, key = gradient[0], jax.random.fold_in(key, device.reshape(()))
        if split is None:  # any equal parts will do
            flat = gradient.reshape(-1)
            cut = jnp.pad(flat, (0, -flat.size % parts)).reshape(parts, -1)
        else:
            cut = jnp.stack(jnp.split(gradient, parts, split))
        shape = cut.shape[1:]
        exchange = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0)
        coded = jax.tree.map(exchange, _encode(cut.reshape(parts, -1), bits, key))
        total = jnp.sum(_decode(coded, cut[0].size), 0)
        if split is not None:
            return total.reshape(shape)
        coded = jax.tree.map(partial(jax.lax.all_gather, axis_name=AXIS, tiled=True),
                             _encode(total[None], bits, jax.random.fold_in(key, 1)))
        return _decode(coded, total.size).reshape(-1)[:gradient.size].reshape(gradient.shape)

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(AXIS, *whole.spec), P(), P(*mesh.axis_names)), out_specs=wanted.spec,
        check_vma=False,
    )
    return run(gradient, key, devices)


def _encode(x_PxN: Array, bits: Bits, key: Array) -> tuple[Array, ...]:
    if bits == "bf16":
        return (x_PxN.astype(jnp.bfloat16),)
    blocks = jnp.pad(x_PxN, ((0, 0), (0, -x_PxN.shape[1] % _BLOCK))).reshape(len(x_PxN), -1, _BLOCK)
    scale = jnp.max(jnp.abs(blocks), -1, keepdims=True) / 127
    scaled = blocks * jnp.where(scale > 0, 1 / scale, 0)
    rounded = jnp.floor(scaled + jax.random.uniform(key, scaled.shape))
    return jnp.minimum(rounded, 127).astype(jnp.int8), scale  # 127 plus almost 1 is 128 in float32


def _decode(coded: tuple[Array, ...], size: int) -> Array:
    """float32 ``[parts, size]``."""
    if len(coded) == 1:
        return coded[0].astype(jnp.float32)
    codes, scale = coded
    return (codes.astype(jnp.float32) * scale).reshape(len(codes), -1)[:, :size]
