"""The training step: one pure function from (state, batch) to (state, metrics), compiled once per batch shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.core.sharding import HOST_MEMORY, on_device, require_host_memory, shardings, spread
from jaxlm.core.tree import Params, Transform, flatten, unflatten
from jaxlm.training.loss import Batch, Loss, Sums
from jaxlm.training.reduce import each_replica, sum_replicas

__all__ = ["TrainState", "abstract_state", "init_state", "make_eval", "make_step", "state_shardings"]

_SPIKE_WARMUP = 20  # steps before a gradient norm can count as a spike
_SPIKE_HORIZON = 100  # steps that the running mean of the gradient norm remembers
_KEY_IMPL = "threefry2x32"  # the same numbers on every platform and under every sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a training carries from step to step: what it resumes from, bit by bit.

    Plain dicts by parameter path (``core.tree.flatten``) rather than ``nnx.State``: they dispatch three times faster
    and make a readable checkpoint. ``core.tree.unflatten`` turns ``params`` back into Params.
    """

    step: Array  # int32: batches seen
    params: dict[str, Any]  # float32 arrays; leaves of any other kind are carried along untrained
    opt_state: optax.OptState
    key: Array  # uint32 key data: dropout in step t uses fold_in(key, t)
    norm_mean: Array  # float32: running mean of the gradient norm, 0 before the first step


def _partition(params: dict[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """The leaves that have a gradient, and the others (compressed or integer)."""
    trainable = {path: leaf for path, leaf in params.items()
                 if hasattr(leaf, "dtype") and jax.tree_util.all_leaves([leaf])
                 and jnp.issubdtype(leaf.dtype, jnp.floating)}
    return trainable, {path: leaf for path, leaf in params.items() if path not in trainable}


def state_shardings(
    state: TrainState, like: Params, mesh: Mesh, *, shard_optimizer: bool = True, offload_optimizer: bool = False
) -> TrainState:
    """A NamedSharding for every array of an (abstract) state.

    Each optimizer moment lies like its parameter; with ``shard_optimizer`` it is split over the data axis too, where
    that divides it (ZeRO-1, arXiv:1910.02054): GSPMD then sums gradients into those parts, each device updates its own,
    and the updated parameters are gathered. With ``offload_optimizer`` it waits in the memory of the host between
    updates. UserError where the devices can use none of that.
    """
    if offload_optimizer:
        require_host_memory(mesh)
    of_params = flatten(shardings(like, mesh))
    shapes = {path: getattr(leaf, "shape", None) for path, leaf in flatten(like).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def of_leaf(path, leaf):
        name = getattr(path[-1], "key", None)
        if name not in of_params or leaf.shape != shapes[name]:
            return replicated
        sharding = spread(of_params[name], leaf.shape) if shard_optimizer else of_params[name]
        return sharding.with_memory_kind(HOST_MEMORY) if offload_optimizer else sharding

    opt_state = jax.tree_util.tree_map_with_path(of_leaf, state.opt_state)
    return TrainState(replicated, of_params, opt_state, replicated, replicated)


def _of_gradients(layout: TrainState) -> dict[str, NamedSharding]:
    """Where gradients lie: like the moments they enter."""
    found = {path: sharding for path, sharding in layout.params.items() if isinstance(sharding, NamedSharding)}
    for path, sharding in jax.tree_util.tree_leaves_with_path(layout.opt_state):
        name = getattr(path[-1], "key", None)
        if name in found and not sharding.is_fully_replicated:
            found[name] = sharding.with_memory_kind(None)
    return found


def _on_device(opt_state: optax.OptState, layout: TrainState | None) -> optax.OptState:
    """The optimizer's state, fetched from where it is offloaded to."""
    if layout is None:
        return opt_state
    return jax.tree.map(on_device, opt_state, layout.opt_state)


def abstract_state(
    like: Params, tx: optax.GradientTransformation, mesh: Mesh, **options: bool
) -> TrainState:
    """The state of a training of such parameters: shapes, dtypes and shardings (``state_shardings``, with its options),
    nothing allocated."""
    state = jax.eval_shape(lambda flat: _fresh(flat, tx, 0), flatten(like))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state, state_shardings(state, like, mesh, **options),
    )


def init_state(
    params: Params | Callable[[], Params], tx: optax.GradientTransformation, seed: int,
    layout: TrainState | None = None,
) -> TrainState:
    """A state at step 0. A function that makes parameters runs inside ``jit``: with a ``layout``
    (``state_shardings``) each device makes only its shards."""
    if callable(params):
        return jax.jit(lambda: _fresh(flatten(params()), tx, seed), out_shardings=layout)()
    return jax.jit(lambda flat: _fresh(flat, tx, seed), out_shardings=layout)(flatten(params))


def _fresh(flat: dict[str, Any], tx: optax.GradientTransformation, seed: int) -> TrainState:
    key = jax.random.key_data(jax.random.key(seed, impl=_KEY_IMPL))
    return TrainState(jnp.zeros((), jnp.int32), flat, tx.init(_partition(flat)[0]), key, jnp.zeros(()))


def make_step(
    graphdef: nnx.GraphDef,
    like: Params,
    loss: Loss,
    tx: optax.GradientTransformation,
    transform: Callable[[Array], Transform] | None = None,
    *,
    accumulate: int = 1,
    spike_factor: float = 0.0,
    layout: TrainState | None = None,
    compress: Literal["none", "bf16", "int8"] = "none",
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The compiled step. The state passed in is donated: use only the one that comes back.

    ``like`` gives the parameters their structure (shapes are enough: ``nn.abstract``). ``transform`` gives
    the Transform of a step (fake quantization, masks), which runs on the parameters before the forward pass and is
    differentiated through; the step is a traced int32. With
    ``accumulate`` = n the rows of the batch are visited in n micro-batches; as the loss is a sum and is divided once,
    by the weight of the whole batch, the result is that of the whole batch. ``layout`` pins the sharding of the
    returned state (``state_shardings``). With ``compress``, gradients are summed over the data axis of its mesh in so
    many bits (``training.reduce``), once a step.

    A step whose loss or gradient is not finite, or whose gradient norm exceeds ``spike_factor`` times its running mean
    (0: no limit), leaves the parameters and the optimizer as they were and reports ``bad``.

    Metrics, all scalars on the device: ``loss`` (objective per token), ``nll`` (plain negative log-likelihood per
    token, nats), ``weight`` (tokens), ``grad_norm`` (before clipping), ``bad`` (bool), and what else the loss sums.
    """

    def objective(trainable, frozen, batch, key, now):
        params = unflatten(like, {**frozen, **trainable})
        model = nnx.merge(graphdef, transform(now)(params) if transform else params)
        value, sums = loss(model, batch, key)
        return value, {"loss": value, **sums}

    gradient = jax.grad(objective, has_aux=True)
    lies = _of_gradients(layout) if layout is not None else {}

    def scattered(grads):
        if compress != "none" or not lies:
            return grads
        return {path: jax.lax.with_sharding_constraint(g, lies[path]) for path, g in grads.items()}

    def gradient_sums(trainable, frozen, now, batch, key):
        if accumulate == 1:
            grads, sums = gradient(trainable, frozen, batch, key, now)
            return scattered(grads), sums
        # Row i goes to micro-batch i % accumulate: with rows sharded in contiguous runs, no row changes its device.
        micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def body(total, indexed):
            index, each = indexed
            grads, sums = gradient(trainable, frozen, each, jax.random.fold_in(key, index), now)
            return jax.tree.map(jnp.add, total, (scattered(grads), sums)), None

        first = jax.tree.map(lambda x: x[0], micro)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, trainable, frozen, first, key, now)
        )
        return jax.lax.scan(body, zeros, (jnp.arange(accumulate), micro))[0]

    def compressed_sums(*args):
        grads, sums = each_replica(gradient_sums, frozen=3)(*args)
        grads = sum_replicas(grads, layout.params, lies, compress, jax.random.fold_in(args[-1], 1))
        return grads, jax.tree.map(lambda x: jnp.sum(x, 0), sums)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        trainable, frozen = _partition(state.params)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=_KEY_IMPL), state.step)
        sum_up = gradient_sums if compress == "none" else compressed_sums
        grads, sums = sum_up(trainable, frozen, state.step, batch, key)
        weight = jnp.maximum(sums["weight"], 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        bad = ~(jnp.isfinite(norm) & jnp.isfinite(sums["loss"]))
        limit = jnp.inf
        if spike_factor:
            limit = jnp.where(state.step < _SPIKE_WARMUP, jnp.inf, spike_factor * state.norm_mean)
            bad |= norm > limit
        before = _on_device(state.opt_state, layout)
        updates, opt_state = tx.update(grads, before, trainable)
        updated = optax.apply_updates(trainable, updates)
        trainable, opt_state = jax.tree.map(
            lambda old, new: jnp.where(bad, old, new), (trainable, before), (updated, opt_state)
        )
        # A spike enters the mean at the limit: should the norm stay high, the mean follows and training goes on.
        pace = 1 / jnp.minimum(state.step + 1, _SPIKE_HORIZON)
        norm_mean = jnp.where(
            jnp.isfinite(norm), state.norm_mean + pace * (jnp.minimum(norm, limit) - state.norm_mean), state.norm_mean
        )
        metrics = jax.tree.map(lambda x: x / weight, sums) | {
            "weight": sums["weight"], "grad_norm": norm, "bad": bad}
        return TrainState(state.step + 1, {**frozen, **trainable}, opt_state, state.key, norm_mean), metrics

    out_shardings = None
    if layout is not None:
        out_shardings = (layout, layout.step)  # metrics are replicated, like the step counter
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def make_eval(graphdef: nnx.GraphDef, like: Params, loss: Loss) -> Callable[[dict[str, Any], Batch], Sums]:
    """A compiled ``(params, batch) -> {"nll", "weight"}``: sums over the batch, without dropout."""

    @jax.jit
    def evaluate(params: dict[str, Any], batch: Batch) -> Sums:
        return loss(nnx.merge(graphdef, unflatten(like, params)), batch, None)[1]

    return evaluate
