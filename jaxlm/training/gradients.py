"""The gradient of a batch: of a loss, in micro-batches, and summed over replicas in few bits.

Every function of this file makes or wraps a ``GradientSums``, so that the step composes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxlm.core.tree import Params, Transform, flatten, unflatten
from jaxlm.data.batches.batch import Batch
from jaxlm.training.multihost.reduce import Bits, all_reduce_compressed, per_replica
from jaxlm.training.objectives.loss import Loss, LossSums
from jaxlm.training.partition import Partition
from jaxlm.training.state import TrainState, gradient_shardings

__all__ = ["Constants", "GradientSums", "ReferenceBuilder", "accumulated", "compressed_over_data", "loss_gradient",
           "sharded_like_moments"]

Constants = tuple[dict[str, Any], dict[str, Any]]  # ``TrainState.frozen`` and ``TrainState.reference``
# (trained parameters, constants, batch, key, step) -> (gradients, sums), both summed over the tokens of the batch;
# the sums are those of the loss, and "loss", what it differentiates.
GradientSums = Callable[[dict[str, Array], Constants, Batch, Array, Array], tuple[dict[str, Array], LossSums]]
# (parameters in training, leaves of the reference model, extra trained arrays) -> the reference model.
ReferenceBuilder = Callable[[Params, dict[str, Any], dict[str, Array]], Any]

_ADAPTERS = 2**32 - 1  # folded into a step's key for the dropout of adapters


def loss_gradient(
    graphdef: nnx.GraphDef, like: Params, loss: Loss, transform: Callable[[Array], Transform] | None,
    reference: ReferenceBuilder | None,
) -> GradientSums:
    """The gradient of a loss over a whole batch in one pass; see ``step.make_step`` for the arguments."""
    partition = Partition(flatten(like))

    def objective(trained, constants, batch, key, step):
        frozen, of_reference = constants
        params = unflatten(like, partition.join(trained, frozen, jax.random.fold_in(key, _ADAPTERS)))
        model = nnx.merge(graphdef, transform(step)(params) if transform else params)
        extra = [reference(params, of_reference, partition.extra(trained))] if reference else []
        value, sums = loss(model, batch, key, *extra)
        return value, {"loss": value, **sums}

    return jax.grad(objective, has_aux=True)


def sharded_like_moments(gradient: GradientSums, layout: TrainState | None) -> GradientSums:
    """Pins each gradient to the sharding of the optimizer moments that it enters, so that GSPMD sums into shards."""
    if layout is None:
        return gradient
    where = gradient_shardings(layout)

    def sharded(*args):
        grads, sums = gradient(*args)
        return {path: jax.lax.with_sharding_constraint(g, where[path]) for path, g in grads.items()}, sums

    return sharded


def accumulated(gradient: GradientSums, count: int) -> GradientSums:
    """The same gradient, in ``count`` micro-batches one after the other. The loss is a sum over tokens, so the result
    is that of the whole batch."""
    if count == 1:
        return gradient

    def in_micro_batches(trained, constants, batch, key, step):
        # Row i goes to micro-batch i % count: with rows sharded in contiguous runs, no row changes its device.
        micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

        def body(total, indexed):
            index, each = indexed
            return jax.tree.map(
                jnp.add, total, gradient(trained, constants, each, jax.random.fold_in(key, index), step)
            ), None

        first = jax.tree.map(lambda x: x[0], micro)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, trained, constants, first, key, step)
        )
        return jax.lax.scan(body, zeros, (jnp.arange(count), micro))[0]

    return in_micro_batches


def compressed_over_data(gradient: GradientSums, layout: TrainState, bits: Bits) -> GradientSums:
    """Each replica of the data axis computes the gradient of its own rows; they are summed in ``bits``, once a step
    (``training.multihost.reduce``)."""
    where = gradient_shardings(layout)

    def of_rows(trained, constants, step, batch, key):
        return gradient(trained, constants, batch, key, step)

    def compressed(trained, constants, batch, key, step):
        grads, sums = per_replica(of_rows, replicated=3)(trained, constants, step, batch, key)
        grads = all_reduce_compressed(grads, layout.params, where, bits, jax.random.fold_in(key, 1))
        return grads, jax.tree.map(lambda x: jnp.sum(x, 0), sums)

    return compressed
