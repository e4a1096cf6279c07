"""Every kind of parallelism, alone and mixed, against one device. As a program it tries all mixes, a line each:

    python -m tests.training.mixes [MODEL ...] [--only PART_OF_A_NAME]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from functools import cache

if __name__ == "__main__":
    import tests.conftest  # noqa: F401 - the environment, before JAX reads it

import jax
import numpy as np
import optax
from flax import nnx

from jaxlm import nn
from jaxlm.core.sharding import batch_sharding, make_mesh
from jaxlm.core.tree import map_params
from jaxlm.training.objectives.loss import make_loss
from jaxlm.training.state import abstract_state, init_state
from jaxlm.training.step import StepOptions, make_step
from tests.models import build

ROWS, LENGTH, VOCABULARY, STEPS = 16, 16, 64, 20
SIZES = dict(vocab_size=VOCABULARY, width=16, heads=8, kv_heads=8, ffn=32)
# Embeddings have size 1: the first norm would amplify small ones, and their rounding errors with them.
MODELS = {
    "decoder": nn.DecoderConfig(**SIZES, layers=8, tie_embeddings=False, embed_scale=True),
    "seq2seq": nn.preset("tiny", **SIZES, encoder_layers=8, decoder_layers=8, dropout=0.0),
    "moe": nn.DecoderConfig(**SIZES, layers=8, experts=8, expert_ffn=16, embed_scale=True),
}
# One line a mix: the sizes of axes, and options tried with them: of the model, of the step, or of the sharding of the
# optimizer.
MIXES = [
    dict(data=8),
    dict(fsdp=8),
    dict(tensor=8),
    dict(sequence=8),
    dict(stage=8),
    dict(data=2, fsdp=4),
    dict(data=2, tensor=4),
    dict(fsdp=4, tensor=2),
    dict(data=2, fsdp=2, tensor=2),
    dict(data=2, fsdp=2, tensor=2, accumulate=2, remat="full", offload_optimizer=True),
    dict(data=4, sequence=2),
    dict(fsdp=2, sequence=4, remat="full"),
    dict(tensor=2, sequence=4),
    dict(sequence=8, ring_min_keys=1),
    dict(data=2, sequence=2, tensor=2, ring_min_keys=1, remat="full"),
    dict(fsdp=2, sequence=2, tensor=2, ring_min_keys=1, accumulate=2),
    dict(data=2, fsdp=2, tensor=2, shard_optimizer=False),
    dict(data=4, fsdp=2, scan_layers=False),
    dict(data=2, fsdp=4, remat="offload"),
    dict(stage=2, data=4),
    dict(stage=2, data=2, tensor=2),
    dict(stage=4, fsdp=2, remat="full"),
    dict(stage=2, sequence=2, tensor=2),
    dict(stage=2, fsdp=2, sequence=2, ring_min_keys=1, remat="full"),
    dict(stage=2, data=2, tensor=2, microbatches=4, remat="dots"),
    dict(expert=8),
    dict(data=2, expert=4),
    dict(expert=4, tensor=2),
    dict(fsdp=2, expert=2, tensor=2, remat="full"),
    dict(expert=2, sequence=2, data=2, accumulate=2),
    dict(stage=2, expert=2, fsdp=2),
]
_AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")
_MODEL = ("remat", "ring_min_keys", "scan_layers", "microbatches")


def name(mix: dict) -> str:
    return "-".join(f"{key}{value}" for key, value in mix.items())


def batches(model: str) -> list[dict[str, np.ndarray]]:
    """Batches whose rows hold two documents, or have padding in the source."""
    random, found = np.random.default_rng(0), []
    for _ in range(STEPS):
        batch = {key: random.integers(3, VOCABULARY, (ROWS, LENGTH)).astype(np.int32) for key in ("inputs", "targets")}
        batch["weights"] = (random.random((ROWS, LENGTH)) < 0.8).astype(np.float32)
        ends = random.integers(4, LENGTH - 3, (ROWS, 1))
        if model == "seq2seq":
            source = random.integers(3, VOCABULARY, (ROWS, LENGTH))
            batch["src"] = np.where(np.arange(LENGTH) < ends, source, 0).astype(np.int32)
        else:
            second = np.arange(LENGTH) >= ends
            batch["segment_ids"] = 1 + second.astype(np.int32)
            batch["positions"] = (np.arange(LENGTH) - ends * second).astype(np.int32)
        found.append(batch)
    return found


def initial(config):
    return map_params(lambda path, leaf: leaf * (12.5 if path.endswith("table") else 1), build(config)[1])


def train(model: str, mix: dict | None = None, steps: int = STEPS):
    """Losses of every step, gradients of the first, the state at the end, and the mesh (None: one device).

    With momentum the optimizer's state after a step is the gradient of that step.
    """
    mix = dict(mix or {})
    changes = {key: mix.pop(key) for key in _MODEL if key in mix}
    sizes = {key: mix.pop(key) for key in _AXES if key in mix}
    accumulate = mix.pop("accumulate", 1)
    config = dataclasses.replace(MODELS[model], **changes)
    graphdef, like = nn.abstract(config)
    tx = optax.sgd(0.1, momentum=0.9)
    mesh = make_mesh(**{"data": 1} | sizes) if sizes else None
    layout = None
    if mesh is not None:
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(like, tx, mesh, **mix))
    step = make_step(graphdef, like, make_loss(config), tx, options=StepOptions(accumulate), layout=layout)
    losses = []
    with jax.set_mesh(mesh or make_mesh(devices=jax.devices()[:1])):
        state = init_state(initial(config), tx, 0, layout)
        for batch in batches(model)[:steps]:
            if mesh is not None:
                batch = {key: jax.device_put(x, batch_sharding(mesh, x.shape[1])) for key, x in batch.items()}
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            if len(losses) == 1:
                gradients = jax.device_get(optax.tree.get(state.opt_state, "trace"))
    assert step.compiled._cache_size() == 1
    return np.array(losses), gradients, state, mesh, like


@cache
def alone(model: str, steps: int = STEPS):
    losses, gradients, state, *_ = train(model, steps=steps)
    return losses, gradients, jax.device_get(state.params)


def differences(model: str, mix: dict, steps: int = STEPS) -> dict[str, float]:
    """The largest relative differences to one device: of losses, of gradients and of the final parameters (each divided
    by the largest number of its tensor). Asserts that no tensor takes more of a device than its share."""
    losses, gradients, state, mesh, like = train(model, mix, steps)
    want_losses, want_gradients, want_params = alone(model, steps)
    check_bytes(state, like, mesh, mix.get("shard_optimizer", True))
    params = jax.device_get(state.params)

    def largest(got, want):
        return max(float(np.max(np.abs(got[path] - want[path])) / np.max(np.abs(want[path]))) for path in want)

    # The gradient of a key bias is zero but for rounding errors, so it is not compared.
    real = {path: leaf for path, leaf in want_gradients.items() if not path.endswith("/k/bias")}
    return {
        "loss": float(np.max(np.abs(losses / want_losses - 1))), "gradient": largest(gradients, real),
        "parameters": largest(params, {path: leaf for path, leaf in want_params.items() if path in real}),
    }


# The mesh axes that split a dimension, independently of ``core.sharding.RULES``.
_SPLIT = {"embed": ["fsdp"], "heads": ["tensor"], "kv_heads": ["tensor"], "mlp": ["tensor"], "vocab": ["tensor"],
          "experts": ["expert"], "layers": ["stage"]}


def check_bytes(state, like, mesh, shard_optimizer: bool) -> None:
    """Asserts that no parameter and no moment takes more of any device than its share."""
    axes = {"/".join(map(str, path)): variable.get_metadata("axes") for path, variable in nnx.to_flat_state(like)}
    moments = optax.tree.get(state.opt_state, "trace")
    for path, leaf in state.params.items():
        share = math.prod(mesh.shape[split] for axis in axes[path] for split in _SPLIT.get(axis, ()))
        for array, parts in ((leaf, share), (moments[path], share * (mesh.shape["data"] if shard_optimizer else 1))):
            assert leaf.nbytes % parts == 0
            for shard in array.addressable_shards:
                assert shard.data.nbytes == leaf.nbytes // parts, (path, array.sharding.spec, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    for model in options.models:
        for mix in MIXES:
            if options.only in name(mix):
                begun = time.perf_counter()
                worst = differences(model, mix)
                print(f"{model:8} {name(mix):50} " + "  ".join(f"{key} {value:.1e}" for key, value in worst.items())
                      + f"  {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
