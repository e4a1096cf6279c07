"""The programs that a forecast compiles: the training step as it is trained, a prompt read, a token decoded."""

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
from jaxlm.core.sharding import batch_sharding, batch_ways, bytes_per_device, make_mesh, mesh_sizes, shardings
from jaxlm.core.tree import count_params, flatten
from jaxlm.planning.abstract import (
    cache_layout,
    complete_model,
    compressed,
    train_batch,
    trained_model,
    with_layout,
)
from jaxlm.planning.topology import Topology, devices_of
from jaxlm.training.config import Experiment
from jaxlm.training.flops import rows_of, step_flops
from jaxlm.training.objectives.reference_model import reference_model_of
from jaxlm.training.program import make_program

__all__ = ["Program", "Serving", "programs_of"]


@dataclass(frozen=True)
class Serving:
    """What to serve instead of training: ``batch`` rows of up to ``context`` tokens (0: as the model says), in
    bfloat16, or by a recipe (its name)."""

    recipe: str = ""
    batch: int = 8
    context: int = 0


@dataclass(frozen=True)
class Program:
    """One program to compile.

    Attributes:
        name: "train step", "prefill" or "decode".
        lower: traces and lowers it, for the mesh.
        arguments: what it is called with, abstract.
        mesh: over the devices of the topology.
        held: bytes a device has of what goes in, by what it is; gradients too, which the program makes.
        tokens: that one run takes, of all devices.
        flops: that the model needs for them, by ``training.flops.FLOP_CONVENTION``.
        parameters: of the dense model.
        notes: what the user should know of the shapes.
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


def programs_of(config: Experiment, topology: Topology, serving: Serving | None = None) -> list[Program]:
    """UserError on what cannot be: a mesh that does not fit, a batch that cannot be shared."""
    config = dataclasses.replace(config, model=complete_model(config))
    mesh = make_mesh(**mesh_sizes(config.mesh.preset, config.mesh.sizes, topology.size), devices=devices_of(topology))
    return [_train_step(config, mesh, topology)] if serving is None else _serving(config, mesh, topology, serving)


def _train_step(config: Experiment, mesh: Mesh, topology: Topology) -> Program:
    graphdef, like = trained_model(config, platform_of(topology))
    batch = train_batch(config, mesh)
    reference = reference_model_of(config, graphdef, like, None)
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
    rows, length = rows_of(shapes)
    notes: tuple[str, ...] = ()
    if config.model.kind == "seq2seq" and len(config.data.buckets) > 1:
        notes = (f"batches are those of the longest bucket, {rows} pairs of {length} tokens, all of them counted",)
    if config.mesh.offload_optimizer or getattr(config.model, "remat", "").startswith("offload"):
        notes += ("what goes to the host's memory and back is not in the times",)
    if mesh.shape["expert"] > 1 and getattr(config.model, "expert_routing", "") == "dropless":
        notes += ("dropless routing: as many rounds are counted as the most crowded expert could need; balanced "
                  "routers need one or two",)

    def lower() -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            return program.update.lower(program.state, batch)

    flops = step_flops(config.model, flatten(like), shapes)
    arguments, count = (program.state, batch), count_params(like)
    return Program("train step", lower, arguments, mesh, held, rows * length, flops, count, notes)


def platform_of(topology: Topology) -> str:
    """What ``compression.platforms`` calls its devices."""
    return "cpu" if topology.chip is None else "tpu"


def _serving(config: Experiment, mesh: Mesh, topology: Topology, serving: Serving) -> list[Program]:
    if config.model.kind != "decoder":
        raise UserError(f"--serve forecasts language models, and this is a {config.model.kind}")
    if serving.batch < 1 or serving.batch % batch_ways(mesh):
        raise UserError(f"--batch {serving.batch} cannot be shared by {batch_ways(mesh)} devices; make it a multiple")
    like = nn.abstract(config.model)[1]
    recipe = load_recipe(serving.recipe) if serving.recipe else None
    model, params = compressed(recipe, config.model, like, "bfloat16", platform_of(topology))
    graphdef = nn.initializer(model)[0]
    batch, context = serving.batch, serving.context or model.max_positions
    rows = batch_sharding(mesh)
    params = with_layout(params, shardings(params, mesh))
    cache = jax.eval_shape(lambda params: nnx.merge(graphdef, params).init_cache(batch, context), params)
    cache = with_layout(cache, cache_layout(cache, mesh))
    layout = jax.tree.map(lambda x: x.sharding, cache)
    # How keys and values lie in memory is the compiler's choice, as it is in the loop over tokens of ``generate``.
    free = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding) if x.ndim > 1 else x.sharding, cache)
    held = {"parameters": bytes_per_device(params), "cache": bytes_per_device(cache)}

    def prefill(params, tokens_BxT):
        module = nnx.merge(graphdef, params)
        return module.decode(tokens_BxT, module.init_cache(batch, context))[1]  # logits are left to decode

    def decode(params, tokens_B, cache):
        logits_Bx1xV, cache = nnx.merge(graphdef, params).decode(tokens_B[:, None], cache)
        return jnp.argmax(logits_Bx1xV[:, -1], -1).astype(jnp.int32), cache

    def program(name: str, fn: Callable, shape: tuple[int, ...], *rest: Any, **options: Any) -> Program:
        arguments = (params, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows), *rest)

        def lower() -> jax.stages.Lowered:
            with jax.set_mesh(mesh):
                return jax.jit(fn, **options).lower(*arguments)

        # A third of what a training step computes is the forward pass, and each token looks at all of the context.
        tokens = math.prod(shape)
        flops = step_flops(model, flatten(like), {"inputs": (batch, context)}) / 3 * tokens / (batch * context)
        notes = (f"{batch} rows, a cache of {context:,} tokens each",)
        return Program(name, lower, arguments, mesh, held, tokens, flops, count_params(like), notes)

    return [
        program("prefill", prefill, (batch, context), out_shardings=layout),
        program("decode", decode, (batch,), cache, donate_argnums=2, in_shardings=(None, None, free),
                out_shardings=(rows, free)),
    ]
