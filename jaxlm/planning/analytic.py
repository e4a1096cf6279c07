"""Analytic (closed-form) estimates of a training step, without compiling it.

They rank the meshes of a search before any of them is compiled, predict what a change does to a program that does not
fit into memory, and give the lower bounds of messages that ``tests/benchmarks/planning/weak_scaling.py`` compares with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import AbstractMesh

from jaxlm.core.sharding import abstract_mesh, bytes_per_device, num_batch_shards
from jaxlm.core.tree import flatten
from jaxlm.nn.attention.flash import uses_flash
from jaxlm.nn.config import ModelConfig
from jaxlm.planning.abstract_models import abstract_batch, abstract_trained, with_vocab_size
from jaxlm.planning.topology import Topology
from jaxlm.training.config import Experiment, LoraConfig, MeshConfig
from jaxlm.training.flops import rows_and_length, step_flops
from jaxlm.training.objectives.reference_model import make_reference_model
from jaxlm.training.program import make_program

__all__ = ["Estimate", "estimate", "min_fsdp_bytes", "min_tensor_bytes", "state_bytes"]


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a training step on one device.

    Attributes:
        state: bytes of parameters, gradients, optimizer, and frozen or second models.
        activations: bytes.
        compute: seconds of arithmetic.
        network: seconds of messages.
    """

    state: float
    activations: float
    compute: float
    network: float

    @property
    def peak(self) -> float:
        """Bytes."""
        return self.state + self.activations

    @property
    def step(self) -> float:
        """Seconds, if arithmetic and messages overlap perfectly."""
        return max(self.compute, self.network)


def state_bytes(config: Experiment, devices: int) -> float:
    """Bytes of parameters, optimizer and gradients on one of ``devices`` devices, under the sharding rules."""
    trained, rest = _state(config, abstract_mesh(config.mesh.preset, config.mesh.sizes, devices))
    return 2 * trained + rest


def _state(config: Experiment, mesh: AbstractMesh) -> tuple[float, float]:
    """Bytes on one device of the trained parameters, and of the rest: frozen parameters, optimizer, reference model."""
    graphdef, like = _abstract(config.model, config.lora, config.mesh.rules)
    state = make_program(config, graphdef, like, mesh, make_reference_model(config, graphdef, like, None)).state
    trained = bytes_per_device(state.params)
    return trained, bytes_per_device(state) - trained


@functools.lru_cache(maxsize=4)
def _abstract(model: ModelConfig, lora: LoraConfig, rules: tuple[str, ...]):
    return abstract_trained(Experiment(model=model, lora=lora, mesh=MeshConfig(rules=rules)), "tpu")


def estimate(config: Experiment, topology: Topology) -> Estimate:
    """Estimates a training step on a topology whose chip has published figures.

    Messages are the minimum of each mesh axis (``min_fsdp_bytes``, ``min_tensor_bytes``, ...) and an all-reduce of the
    gradients along "data". Activations are what the remat policy keeps, the work space of one layer, and the logits.

    Raises:
        UserError: when the mesh cannot share the batch evenly.
    """
    config = dataclasses.replace(config, model=with_vocab_size(config))
    mesh = abstract_mesh(config.mesh.preset, config.mesh.sizes, topology.size)
    model, chip = config.model, topology.chip
    shapes = {name: x.shape for name, x in abstract_batch(config, mesh).items()}
    flat = flatten(_abstract(model, config.lora, config.mesh.rules)[1])
    remat = model.remat
    recompute = {"none": 3, "dots": 3.1}.get(remat, 4) / 3  # of forward + backward, where remat "none" does 3 forwards
    compute = recompute * step_flops(model, flat, shapes) / (topology.size * chip.flops)

    tokens = math.prod(rows_and_length(shapes)) / (num_batch_shards(mesh) * mesh.shape["sequence"])
    item = 2 if model.dtype == "bfloat16" else 4
    parameters, rest = _state(config, mesh)
    ways = mesh.shape
    sent = {
        "fsdp": config.train.accumulate * min_fsdp_bytes(parameters / 4 * ways["fsdp"], ways["fsdp"], item),
        "tensor": recompute * min_tensor_bytes(model, tokens, ways["tensor"], item),
        "expert": recompute * _min_expert_bytes(model, tokens, ways["expert"], item),
        "data": 2 * (ways["data"] - 1) / ways["data"] * parameters,
    }
    network = sum(size / _bandwidth(topology, mesh.shape[axis]) for axis, size in sent.items() if size)
    tokens /= config.train.accumulate
    rows = max(rows_and_length(shapes)[0] / (num_batch_shards(mesh) * config.train.accumulate), 1)
    activations = _activations(model, remat, tokens, rows, rows_and_length(shapes)[1], ways, item) / ways["stage"]
    return Estimate(2 * parameters + rest, activations, compute, network)


def min_fsdp_bytes(weights: float, ways: int, item: int) -> float:
    """The least bytes that a device sends in a step of fully sharded data parallelism over ``ways`` devices.

    ``weights`` are gathered for the forward and for the backward pass as numbers of ``item`` bytes, and gradients are
    scattered once in float32 (arXiv:1910.02054, section 7.2).
    """
    return (ways - 1) / ways * weights * (2 * item + 4)


def min_tensor_bytes(model: ModelConfig, tokens: float, ways: int, item: int) -> float:
    """The least bytes that a device sends in a step of tensor parallelism over ``ways`` devices.

    ``tokens`` tokens a device, with activations of ``item`` bytes, take two all-reduces a layer forward and two
    backward (arXiv:1909.08053, section 3), and one each for the embedding and the output head.
    """
    return (4 * _layers(model) + 2) * 2 * (ways - 1) / ways * tokens * model.width * item


def _min_expert_bytes(model: ModelConfig, tokens: float, ways: int, item: int) -> float:
    """The least bytes of expert parallelism: each token goes to each of its experts and back, in both passes."""
    if not model.experts:
        return 0.0
    return 4 * _layers(model) * (ways - 1) / ways * tokens * model.experts_per_token * model.width * item


def _layers(model: ModelConfig) -> float:
    """The number of layers, where a decoder layer with cross-attention counts as one and a half."""
    return model.encoder_layers + 1.5 * model.decoder_layers if model.kind == "seq2seq" else model.layers


def _activations(
    model: ModelConfig, remat: str, tokens: float, rows: float, length: int, ways: Mapping[str, int], item: int
) -> float:
    """Bytes of activations on one device, for ``tokens`` tokens in ``rows`` rows of ``length`` at a time."""
    residual, tensor = tokens * model.width * item, ways["tensor"]
    logits = 2 * tokens * model.vocab_size * 4 / tensor
    if model.kind == "lstm":
        return logits + model.layers * 8 * residual
    heads, gates = model.heads * model.d_head, 3 if model.gated else 2
    wide = tokens * (heads + 2 * model.n_kv_heads * model.d_head + gates * model.d_ffn) * item / tensor
    scores = 3 * rows * model.heads * length**2 * 4 / tensor
    if uses_flash(length, length) and ways["sequence"] == 1 and not model.attention_dropout:
        scores = 3 * tokens * heads * 4 / tensor  # blocks accumulate outputs, then gradients of keys and values
    kept = {"none": 4 * residual + wide + scores, "dots": 3 * residual + wide}.get(remat, residual)
    return logits + _layers(model) * kept + 4 * residual + 2 * wide + scores


def _bandwidth(topology: Topology, ways: int) -> float:
    """Bytes a second of a mesh axis: the links of its share of the torus dimensions (at least one), in both directions
    where the dimensions wrap around."""
    chip = topology.chip
    share = max(1, round(chip.dimensions * math.log(ways) / math.log(max(topology.size, 2))))
    return chip.link * share * (2 if topology.wraps_around(0) else 1)


def mesh_shapes(devices: int, experts: int = 1) -> list[MeshConfig]:
    """Every data x fsdp x expert x tensor mesh of ``devices`` devices; "expert" divides the number of experts."""

    def divisors(count: int) -> list[int]:
        return [size for size in range(1, count + 1) if count % size == 0]

    return [
        MeshConfig(data=devices // (fsdp * expert * tensor), fsdp=fsdp, tensor=tensor, expert=expert)
        for tensor in divisors(devices) for expert in divisors(math.gcd(devices // tensor, experts))
        for fsdp in divisors(devices // (tensor * expert))
    ]
