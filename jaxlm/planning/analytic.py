"""Closed forms: what a step must hold and send at least, and a quick estimate of what it takes.

They rank the meshes of a search before any is compiled, say what a change would do to a program that does not fit, and
are what weak scaling is measured against (``tests/benchmarks/planning/weak_scaling.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import AbstractMesh

from jaxlm.core.sharding import abstract_mesh, batch_ways, bytes_per_device
from jaxlm.core.tree import flatten
from jaxlm.nn.attention.flash import in_blocks
from jaxlm.nn.config import ModelConfig
from jaxlm.planning.abstract import complete_model, train_batch, trained_model
from jaxlm.planning.topology import Topology
from jaxlm.training.config import Experiment, LoraConfig, MeshConfig
from jaxlm.training.flops import rows_of, step_flops
from jaxlm.training.objectives.reference_model import reference_model_of
from jaxlm.training.program import make_program

__all__ = ["Estimate", "estimate", "least_fsdp", "least_tensor", "state_bytes"]


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of a step on one device, before compiling it."""

    state: float
    activations: float
    compute: float
    network: float

    @property
    def peak(self) -> float:
        return self.state + self.activations

    @property
    def step(self) -> float:
        return max(self.compute, self.network)


def state_bytes(config: Experiment, devices: int) -> float:
    """Parameters, optimizer and gradients of one device, as the rules lay them out."""
    trained, rest = _state(config, abstract_mesh(config.mesh.preset, config.mesh.sizes, devices))
    return 2 * trained + rest


def _state(config: Experiment, mesh: AbstractMesh) -> tuple[float, float]:
    """Bytes of what is trained, and of everything else: what is frozen, the optimizer, a second model."""
    graphdef, like = _abstract(config.model, config.lora, config.mesh.rules)
    state = make_program(config, graphdef, like, mesh, reference_model_of(config, graphdef, like, None)).state
    trained = bytes_per_device(state.params)
    return trained, bytes_per_device(state) - trained


@functools.lru_cache(maxsize=4)
def _abstract(model: ModelConfig, lora: LoraConfig, rules: tuple[str, ...]):
    return trained_model(Experiment(model=model, lora=lora, mesh=MeshConfig(rules=rules)), "tpu")


def estimate(config: Experiment, topology: Topology) -> Estimate:
    """For a topology with figures. The messages are those of ``least_fsdp`` and ``least_tensor`` and of an all-reduce
    of the gradients along "data"; activations are what a remat policy keeps, the work of one layer, and the logits."""
    config = dataclasses.replace(config, model=complete_model(config))
    mesh = abstract_mesh(config.mesh.preset, config.mesh.sizes, topology.size)
    model, chip = config.model, topology.chip
    shapes = {name: x.shape for name, x in train_batch(config, mesh).items()}
    flat = flatten(_abstract(model, config.lora, config.mesh.rules)[1])
    remat = getattr(model, "remat", "none")
    again = {"none": 3, "dots": 3.1}.get(remat, 4) / 3
    compute = again * step_flops(model, flat, shapes) / (topology.size * chip.flops)

    tokens = math.prod(rows_of(shapes)) / (batch_ways(mesh) * mesh.shape["sequence"])
    item = 2 if model.dtype == "bfloat16" else 4
    parameters, rest = _state(config, mesh)
    ways = mesh.shape
    sent = {
        "fsdp": config.train.accumulate * least_fsdp(parameters / 4 * ways["fsdp"], ways["fsdp"], item),
        "tensor": again * least_tensor(model, tokens, ways["tensor"], item),
        "expert": again * _least_expert(model, tokens, ways["expert"], item),
        "data": 2 * (ways["data"] - 1) / ways["data"] * parameters,
    }
    network = sum(size / _bandwidth(topology, mesh.shape[axis]) for axis, size in sent.items() if size)
    tokens /= config.train.accumulate
    rows = max(rows_of(shapes)[0] / (batch_ways(mesh) * config.train.accumulate), 1)
    activations = _activations(model, remat, tokens, rows, rows_of(shapes)[1], ways, item) / ways["stage"]
    return Estimate(2 * parameters + rest, activations, compute, network)


def least_fsdp(weights: float, ways: int, item: int) -> float:
    """Bytes that a device sends in a step of fully sharded data parallelism: weights gathered for the forward and for
    the backward pass in the type of the activations, gradients scattered once in float32 (arXiv:1910.02054, section
    7.2)."""
    return (ways - 1) / ways * weights * (2 * item + 4)


def least_tensor(model: ModelConfig, tokens: float, ways: int, item: int) -> float:
    """Bytes that a device sends in a step of tensor parallelism: two all-reduces a layer forward and two backward
    (arXiv:1909.08053, section 3), and one each for the embedding and the output head."""
    return (4 * _layers(model) + 2) * 2 * (ways - 1) / ways * tokens * model.width * item


def _least_expert(model: ModelConfig, tokens: float, ways: int, item: int) -> float:
    """Of expert parallelism: each token there and back for each of its experts, forward and backward."""
    if not getattr(model, "experts", 0):
        return 0.0
    return 4 * _layers(model) * (ways - 1) / ways * tokens * model.experts_per_token * model.width * item


def _layers(model: ModelConfig) -> float:
    """A decoder's layer with cross-attention counts one and a half."""
    return model.encoder_layers + 1.5 * model.decoder_layers if model.kind == "seq2seq" else model.layers


def _activations(
    model, remat: str, tokens: float, rows: float, length: int, ways: Mapping[str, int], item: int
) -> float:
    residual, tensor = tokens * model.width * item, ways["tensor"]
    logits = 2 * tokens * model.vocab_size * 4 / tensor
    if model.kind == "lstm":
        return logits + model.layers * 8 * residual
    heads, gates = model.heads * model.d_head, 3 if model.gated else 2
    wide = tokens * (heads + 2 * model.n_kv_heads * model.d_head + gates * model.d_ffn) * item / tensor
    scores = 3 * rows * model.heads * length**2 * 4 / tensor
    if in_blocks(length, length) and ways["sequence"] == 1 and not model.attention_dropout:
        scores = 3 * tokens * heads * 4 / tensor  # what blocks add up: outputs, then gradients of keys and values
    kept = {"none": 4 * residual + wide + scores, "dots": 3 * residual + wide}.get(remat, residual)
    return logits + _layers(model) * kept + 4 * residual + 2 * wide + scores


def _bandwidth(topology: Topology, ways: int) -> float:
    """Of an axis: its share of the torus's dimensions, one at least; both ways if they close."""
    chip = topology.chip
    share = max(1, round(chip.dimensions * math.log(ways) / math.log(max(topology.size, 2))))
    return chip.link * share * (2 if topology.closes(0) else 1)


def mesh_shapes(devices: int, experts: int = 1) -> list[MeshConfig]:
    """Every data x fsdp x expert x tensor mesh of so many devices; "expert" divides the number of experts."""
    def divisors(count: int) -> list[int]:
        return [size for size in range(1, count + 1) if count % size == 0]

    return [
        MeshConfig(data=devices // (fsdp * expert * tensor), fsdp=fsdp, tensor=tensor, expert=expert)
        for tensor in divisors(devices) for expert in divisors(math.gcd(devices // tensor, experts))
        for fsdp in divisors(devices // (tensor * expert))
    ]
