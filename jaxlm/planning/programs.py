"""``forecast_programs``: the programs that a forecast compiles: the training step, or a server's prefill and decode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from jaxlm import nn
from jaxlm.compression.names import load_recipe
from jaxlm.core.errors import UserError
from jaxlm.core.sharding import batch_sharding, bytes_per_device, make_mesh, mesh_sizes, num_batch_shards, shardings
from jaxlm.core.tree import count_params, flatten
from jaxlm.planning.abstract_models import (
    abstract_batch,
    abstract_compressed,
    abstract_trained,
    cache_shardings,
    with_shardings,
    with_vocab_size,
)
from jaxlm.planning.topology import Topology, topology_devices
from jaxlm.training.config import Experiment
from jaxlm.training.flops import rows_and_length, step_flops
from jaxlm.training.objectives.reference_model import make_reference_model
from jaxlm.training.program import make_program

__all__ = ["ForecastProgram", "ServingShape", "forecast_programs"]


@dataclass(frozen=True)
class ServingShape:
    """The shape of a server to forecast.

    Attributes:
        recipe: the name of the recipe that compresses the weights; "" for bfloat16.
        batch: rows that are decoded together.
        context: tokens of a row, prompt and continuation; 0 for the model's maximum.
    """

    recipe: str = ""
    batch: int = 8
    context: int = 0


@dataclass(frozen=True)
class ForecastProgram:
    """A program to compile.

    Attributes:
        name: "train step", "prefill" or "decode".
        lower: traces and lowers the program for the mesh.
        arguments: abstract arguments of the program.
        mesh: the mesh over the devices of the topology.
        held: bytes on one device of each kind of argument ("parameters", "optimizer", "cache", ...), and of
            "gradients", which the program makes itself.
        tokens: tokens that one run processes on all devices together.
        flops: FLOPs that the model needs for these tokens, by ``training.flops.FLOP_CONVENTION``.
        parameters: the number of parameters of the dense model.
        notes: what the user should know about the shapes.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    arguments: tuple[Any, ...]
    mesh: Mesh
    held: Mapping[str, float]
    tokens: int
    flops: float
    parameters: int
    notes: tuple[str, ...] = ()


def forecast_programs(
    config: Experiment, topology: Topology, serving: ServingShape | None = None
) -> list[ForecastProgram]:
    """The training step of an experiment, or with ``serving`` the prefill and the decoding step of a server.

    Raises:
        UserError: when the mesh does not fit the devices, the mesh cannot share the batch, or the model cannot be
            served.
    """
    config = dataclasses.replace(config, model=with_vocab_size(config))
    sizes = mesh_sizes(config.mesh.preset, config.mesh.sizes, topology.size)
    mesh = make_mesh(**sizes, devices=topology_devices(topology))
    return [_train_step(config, mesh, topology)] if serving is None else _serving(config, mesh, topology, serving)


def _train_step(config: Experiment, mesh: Mesh, topology: Topology) -> ForecastProgram:
    graphdef, like = abstract_trained(config, platform_name(topology))
    batch = abstract_batch(config, mesh)
    reference = make_reference_model(config, graphdef, like, None)
    with jax.set_mesh(mesh):
        program = make_program(config, graphdef, like, mesh, reference)
    fixed = {"frozen": program.state.frozen, "average": program.state.average, "second model": program.state.reference}
    held = {
        "parameters": bytes_per_device(program.state.params),
        **{name: size for name, tree in fixed.items() if (size := bytes_per_device(tree))},
        "optimizer": bytes_per_device(program.state.opt_state),
        "gradients": bytes_per_device(program.state.params),
        "batch": bytes_per_device(batch),
    }
    shapes = {name: x.shape for name, x in batch.items()}
    rows, length = rows_and_length(shapes)
    notes: tuple[str, ...] = ()
    if config.model.kind == "seq2seq" and len(config.data.buckets) > 1:
        notes = (f"batches of the longest bucket: {rows} pairs of {length} tokens, all of them counted",)
    if config.mesh.offload_optimizer or config.model.offloads_activations:
        notes += ("times leave out transfers to and from host memory",)
    if mesh.shape["expert"] > 1 and config.model.sides and config.model.expert_routing == "dropless":
        notes += ("dropless routing: the rounds of the most crowded expert possible are counted; balanced routers need "
                  "one or two",)

    def lower() -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            return program.update.lower(program.state, batch)

    flops = step_flops(config.model, flatten(like), shapes)
    arguments, count = (program.state, batch), count_params(like)
    return ForecastProgram("train step", lower, arguments, mesh, held, rows * length, flops, count, notes)


def platform_name(topology: Topology) -> str:
    """The name of the devices' platform in ``compression.platforms``."""
    return "cpu" if topology.chip is None else "tpu"


def _serving(config: Experiment, mesh: Mesh, topology: Topology, serving: ServingShape) -> list[ForecastProgram]:
    if config.model.kind != "decoder":
        raise UserError(f"--serve forecasts decoder language models, and this model is a {config.model.kind}")
    if serving.batch < 1 or serving.batch % num_batch_shards(mesh):
        raise UserError(
            f"--batch {serving.batch} does not divide evenly into {num_batch_shards(mesh)} shards; make it a multiple"
        )
    like = nn.abstract(config.model)[1]
    recipe = load_recipe(serving.recipe) if serving.recipe else None
    model, params = abstract_compressed(recipe, config.model, like, "bfloat16", platform_name(topology))
    graphdef = nn.initializer(model)[0]
    batch, context = serving.batch, serving.context or model.max_positions
    rows = batch_sharding(mesh)
    params = with_shardings(params, shardings(params, mesh))
    cache = jax.eval_shape(lambda params: nnx.merge(graphdef, params).init_cache(batch, context), params)
    cache = with_shardings(cache, cache_shardings(cache, mesh))
    layout = jax.tree.map(lambda x: x.sharding, cache)
    # The compiler chooses the memory layout of keys and values, as it does in the loop over tokens of ``generate``.
    free = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding) if x.ndim > 1 else x.sharding, cache)
    held = {"parameters": bytes_per_device(params), "cache": bytes_per_device(cache)}

    def prefill(params, tokens_BxT):
        module = nnx.merge(graphdef, params)
        return module.decode(tokens_BxT, module.init_cache(batch, context))[1]  # decode computes the logits

    def decode(params, tokens_B, cache):
        logits_Bx1xV, cache = nnx.merge(graphdef, params).decode(tokens_B[:, None], cache)
        return jnp.argmax(logits_Bx1xV[:, -1], -1).astype(jnp.int32), cache

    def program(name: str, fn: Callable, shape: tuple[int, ...], *rest: Any, **options: Any) -> ForecastProgram:
        arguments = (params, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows), *rest)

        def lower() -> jax.stages.Lowered:
            with jax.set_mesh(mesh):
                return jax.jit(fn, **options).lower(*arguments)

        # The forward pass is a third of a training step, and each token attends to the whole context.
        tokens = math.prod(shape)
        flops = step_flops(model, flatten(like), {"inputs": (batch, context)}) / 3 * tokens / (batch * context)
        notes = (f"{batch} rows with a cache of {context:,} tokens each",)
        return ForecastProgram(name, lower, arguments, mesh, held, tokens, flops, count_params(like), notes)

    return [
        program("prefill", prefill, (batch, context), out_shardings=layout),
        program("decode", decode, (batch,), cache, donate_argnums=2, in_shardings=(None, None, free),
                out_shardings=(rows, free)),
    ]
