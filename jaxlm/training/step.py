"""The training step: one pure function from (state, batch) to (state, metrics), compiled once per batch shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.core.sharding import HOST_MEMORY, fit_to_shape, on_device, require_host_memory, shard_over, shardings
from jaxlm.core.tree import Params, Transform, flatten, unflatten
from jaxlm.training.config import PrivacyConfig
from jaxlm.training.multihost.reduce import all_reduce_compressed, per_replica
from jaxlm.training.objectives.loss import Batch, Loss, LossSums
from jaxlm.training.optimizers.privacy import add_noise, clip_rows
from jaxlm.training.partition import Partition

__all__ = ["MakeReference", "Step", "TrainState", "abstract_state", "complete_state", "init_state", "make_eval",
           "make_step", "state_shardings"]

# From the parameters in training, a second model's own leaves, and what is trained beside, to that second model.
MakeReference = Callable[[Params, dict[str, Any], dict[str, Array]], Any]

_SPIKE_WARMUP = 20  # steps before a gradient norm can count as a spike
_SPIKE_HORIZON = 100  # steps that the running mean of the gradient norm remembers
_ADAPTERS, _NOISE = 2**32 - 1, 2**32 - 2  # folded into a step's key for the dropout of adapters and private noise
_KEY_IMPL = "threefry2x32"  # the same numbers on every platform and under every sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a training carries from step to step: what it resumes from, bit by bit.

    Plain dicts by parameter path (``training.partition``) rather than ``nnx.State``: they dispatch three times faster
    and make a readable checkpoint.
    """

    step: Array  # int32: batches seen
    params: dict[str, Array]  # what is trained, float32
    opt_state: optax.OptState
    key: Array  # uint32 key data: dropout in step t uses fold_in(key, t)
    norm_mean: Array  # float32: running mean of the gradient norm, 0 before the first step
    average: dict[str, Array]  # exponential moving average of ``params``; empty where there is none
    frozen: dict[str, Any]  # the model's other leaves, never changed
    reference: dict[str, Any]  # leaves of a second model that the loss asks, such as a teacher; never changed

    @property
    def saved(self) -> TrainState:
        """What a checkpoint holds: all but what never changes, which is had from where it came from."""
        return dataclasses.replace(self, frozen={}, reference={})


def state_shardings(
    state: TrainState, like: Params, mesh: Mesh, *, reference: Params | None = None, shard_optimizer: bool = True,
    offload_optimizer: bool = False,
) -> TrainState:
    """A NamedSharding for every array of an (abstract) state.

    Each optimizer moment lies like its parameter; with ``shard_optimizer`` it is split over the data axis too, where
    that divides it (ZeRO-1, arXiv:1910.02054): GSPMD then sums gradients into those parts, each device updates its own,
    and the updated parameters are gathered. With ``offload_optimizer`` it waits in the memory of the host between
    updates. UserError where the devices can use none of that.
    """
    if offload_optimizer:
        require_host_memory(mesh)
    of_params, frozen = Partition(flatten(like)).split(flatten(shardings(like, mesh)))
    replicated = NamedSharding(mesh, PartitionSpec())
    of_params |= {path: replicated for path in state.params if path not in of_params}

    def of_leaf(path, leaf):
        name = next((key.key for key in path[::-1] if getattr(key, "key", None) in of_params), None)
        if name is None or leaf.ndim != state.params[name].ndim:
            return replicated
        sharding = fit_to_shape(of_params[name], leaf.shape)  # scales of blocks are shorter than what they are of
        sharding = shard_over(sharding, leaf.shape) if shard_optimizer else sharding
        return sharding.with_memory_kind(HOST_MEMORY) if offload_optimizer else sharding

    moments = jax.tree_util.tree_map_with_path(of_leaf, (state.opt_state, state.average))
    others = flatten(shardings(reference, mesh)) if reference is not None else {}
    return TrainState(replicated, of_params, moments[0], replicated, replicated, moments[1], frozen, others)


def _of_gradients(layout: TrainState) -> dict[str, NamedSharding]:
    """Where gradients lie: like the moments they enter."""
    found = dict(layout.params)
    for path, sharding in jax.tree_util.tree_leaves_with_path(layout.opt_state):
        part = getattr(path[-1], "name", None)  # of a moment of several arrays, such as codes and their scales
        name = getattr(path[-2 if part == "codes" else -1], "key", None)
        if name in found and not sharding.is_fully_replicated:
            found[name] = sharding.with_memory_kind(None)
    return found


def _on_device(tree: Any, lies: Any) -> Any:
    """Arrays, fetched from where they are offloaded to; ``lies`` are their shardings, None: on the device."""
    return tree if lies is None else jax.tree.map(on_device, tree, lies)


def abstract_state(
    like: Params, tx: optax.GradientTransformation, mesh: Mesh, *, reference: Params | None = None,
    extra: Mapping[str, Any] = MappingProxyType({}), average: bool = False, **options: bool,
) -> TrainState:
    """The state of a training of such parameters, and of arrays ``beside`` them: shapes, dtypes and shardings
    (``state_shardings``, with its options), nothing allocated. ``average``: it keeps their moving average."""
    trained, frozen = Partition(flatten(like)).split(flatten(like))
    trained |= extra
    others = flatten(reference) if reference is not None else {}
    state = jax.eval_shape(lambda trained: _fresh(trained, tx, 0, average), trained)
    state = dataclasses.replace(state, frozen=frozen, reference=others)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state, state_shardings(state, like, mesh, reference=reference, **options),
    )


def init_state(
    params: Params | Callable[[], Params], tx: optax.GradientTransformation, seed: int,
    layout: TrainState | None = None, *, reference: Params | None = None,
    extra: Mapping[str, Any] = MappingProxyType({}), average: bool = False,
) -> TrainState:
    """A state at step 0. A function that makes parameters runs inside ``jit``: with a ``layout``
    (``state_shardings``) each device makes only its shards. Frozen leaves are taken over as they are, not copied."""
    fresh = callable(params)
    if fresh:
        partition = Partition(jax.eval_shape(lambda: flatten(params())))
        lies = None if layout is None else partition.join(layout.params, layout.frozen)
        flat = jax.jit(lambda: flatten(params()), out_shardings=lies)()
    else:
        flat = flatten(params)
        partition = Partition(flat)
    trained = partition.split(flat)[0] | extra
    start = jax.jit(
        lambda trained: _fresh(trained, tx, seed, average), donate_argnums=0 if fresh else (),
        out_shardings=None if layout is None else layout.saved,
    )
    return _completed(start(trained), partition.split(flat)[1], reference, layout)


def complete_state(
    saved: TrainState, params: Params | Callable[[], Params], layout: TrainState, reference: Params | None = None
) -> TrainState:
    """The state that a checkpoint was made of, with what it leaves out, from where it came from at the start."""
    if not layout.frozen and not layout.reference:
        return saved
    flat = flatten(params() if callable(params) else params)
    return _completed(saved, Partition(flat).split(flat)[1], reference, layout)


def _completed(saved: TrainState, frozen: dict[str, Any], reference: Params | None, layout: TrainState | None):
    others = flatten(reference) if reference is not None else {}
    if layout is not None:
        frozen, others = jax.device_put((frozen, others), (layout.frozen, layout.reference))
    return dataclasses.replace(saved, frozen=frozen, reference=others)


def _fresh(trained: dict[str, Array], tx: optax.GradientTransformation, seed: int, average: bool) -> TrainState:
    key = jax.random.key_data(jax.random.key(seed, impl=_KEY_IMPL))
    mean = trained if average else {}
    return TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained), key, jnp.zeros(()), mean, {}, {})


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
    reference: MakeReference | None = None,
    average: float = 0.0,
    privacy: PrivacyConfig | None = None,
) -> Step:
    """The compiled step.

    ``like`` gives the parameters their structure (shapes are enough: ``nn.abstract``). ``transform`` gives
    the Transform of a step (fake quantization, masks), which runs on the parameters before the forward pass and is
    differentiated through; the step is a traced int32. With
    ``accumulate`` = n the rows of the batch are visited in n micro-batches; as the loss is a sum and is divided once,
    by the weight of the whole batch, the result is that of the whole batch. ``layout`` pins the sharding of the
    returned state (``state_shardings``). With ``compress``, gradients are summed over the data axis of its mesh in so
    many bits (``training.multihost.reduce``), once a step. With ``reference`` the loss is given the model that it makes as a
    fourth argument. ``average`` is the decay of the moving average of what is trained, which is shorter at first. With
    ``privacy`` the gradient is the mean over the rows of their clipped gradients, with noise (``training.optimizers.privacy``).

    A step whose loss or gradient is not finite, or whose gradient norm exceeds ``spike_factor`` times its running mean
    (0: no limit), leaves the parameters and the optimizer as they were and reports ``bad``.

    Metrics, all scalars on the device: ``loss`` (objective per token), ``nll`` (plain negative log-likelihood per
    token, nats), ``weight`` (tokens), ``grad_norm`` (before clipping), ``bad`` (bool), and what else the loss sums.
    """

    partition = Partition(flatten(like))

    def objective(trainable, frozen, batch, key, now):
        own, others = frozen
        params = unflatten(like, partition.join(trainable, own, jax.random.fold_in(key, _ADAPTERS)))
        model = nnx.merge(graphdef, transform(now)(params) if transform else params)
        second = [reference(params, others, partition.extra(trainable))] if reference else []
        value, sums = loss(model, batch, key, *second)
        return value, {"loss": value, **sums}

    gradient = jax.grad(objective, has_aux=True)
    if privacy is not None:
        gradient = clip_rows(gradient, privacy.clip_norm)
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
        grads, sums = per_replica(gradient_sums, frozen=3)(*args)
        grads = all_reduce_compressed(grads, layout.params, lies, compress, jax.random.fold_in(args[-1], 1))
        return grads, jax.tree.map(lambda x: jnp.sum(x, 0), sums)

    def step(state: TrainState, frozen: tuple[dict, dict], batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        trainable = state.params
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=_KEY_IMPL), state.step)
        sum_up = gradient_sums if compress == "none" else compressed_sums
        grads, sums = sum_up(trainable, frozen, state.step, batch, key)
        weight = jnp.maximum(sums["weight"], 1)
        if privacy is None:
            grads = jax.tree.map(lambda g: g / weight, grads)
        else:
            rows = len(batch["weights"])
            noise = jax.random.fold_in(key, _NOISE)
            grads = add_noise(grads, privacy.clip_norm * privacy.noise_multiplier, noise, rows)
        norm = optax.tree.norm(grads)
        bad = ~(jnp.isfinite(norm) & jnp.isfinite(sums["loss"]))
        limit = jnp.inf
        if spike_factor:
            limit = jnp.where(state.step < _SPIKE_WARMUP, jnp.inf, spike_factor * state.norm_mean)
            bad |= norm > limit
        before, mean = _on_device((state.opt_state, state.average), layout and (layout.opt_state, layout.average))
        updates, opt_state = tx.update(grads, before, trainable)
        updated = optax.apply_updates(trainable, updates)
        decay = jnp.minimum(average, (state.step + 1) / (state.step + 10))
        averaged = {path: decay * old + (1 - decay) * updated[path] for path, old in mean.items()}
        trainable, opt_state, averaged = jax.tree.map(
            lambda old, new: jnp.where(bad, old, new), (trainable, before, mean), (updated, opt_state, averaged)
        )
        # A spike enters the mean at the limit: should the norm stay high, the mean follows and training goes on.
        pace = 1 / jnp.minimum(state.step + 1, _SPIKE_HORIZON)
        norm_mean = jnp.where(
            jnp.isfinite(norm), state.norm_mean + pace * (jnp.minimum(norm, limit) - state.norm_mean), state.norm_mean
        )
        metrics = jax.tree.map(lambda x: x / weight, sums) | {
            "weight": sums["weight"], "grad_norm": norm, "bad": bad}
        return dataclasses.replace(
            state, step=state.step + 1, params=trainable, opt_state=opt_state, norm_mean=norm_mean, average=averaged
        ), metrics

    out_shardings = None
    if layout is not None:
        out_shardings = (layout.saved, layout.step)  # metrics are replicated, like the step counter
    return Step(jax.jit(step, donate_argnums=0, out_shardings=out_shardings))


@dataclasses.dataclass(frozen=True)
class Step:
    """``step(state, batch) -> (state, metrics)``, compiled. What changes of the state passed in is donated: use only
    the one that comes back."""

    compiled: Any  # of (state without what never changes, that, batch)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        fixed = state.frozen, state.reference
        moved, metrics = self.compiled(state.saved, fixed, batch)
        return dataclasses.replace(moved, frozen=fixed[0], reference=fixed[1]), metrics

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """For abstract arguments."""
        return self.compiled.lower(state.saved, (state.frozen, state.reference), batch)


def make_eval(
    graphdef: nnx.GraphDef, like: Params, loss: Loss, reference: MakeReference | None = None
) -> Callable[[dict[str, Any], Batch, dict[str, Any]], LossSums]:
    """A compiled ``(params, batch, reference's) -> {"nll", "weight", ...}`` of flat parameters: sums over the batch,
    without dropout."""

    @jax.jit
    def evaluate(flat: dict[str, Any], batch: Batch, others: dict[str, Any] | None = None) -> LossSums:
        params = unflatten(like, flat)
        second = [reference(params, others, {})] if reference else []
        return loss(nnx.merge(graphdef, params), batch, None, *second)[1]

    return evaluate
