"""Weak scaling on paper: what ``jaxlm plan`` counts in the compiled step, against the closed-form minimum.

    python tests/benchmarks/weak_scaling.py [--chips 8 32 256] [--only fsdp tensor]

Fully sharded data parallelism ("fsdp") has two rows a chip; tensor parallelism ("tensor") has eight rows in all. State
is parameters and optimizer, of which the minimum is 12 bytes a parameter over all chips. Messages are those along the
axis, their minimum that of ``least_fsdp`` and ``least_tensor`` in ``planning.closed``. A mesh takes a compilation for
TPU v5e, half a minute to some minutes of one core. Needs libtpu.
"""

from __future__ import annotations

import argparse

from jaxlm import nn
from jaxlm.core.tree import count_params
from jaxlm.planning.child import run_forecast
from jaxlm.planning.closed import least_fsdp, least_tensor
from jaxlm.planning.topology import parse_topology
from jaxlm.training.config import DataConfig, Experiment, MeshConfig

SHAPES = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
LENGTH = 1024
COMMON = dict(vocab_size=32768, layers=4, dtype="bfloat16", tie_embeddings=False, max_positions=LENGTH)
MODELS = {  # every width divides by 256
    "fsdp": nn.DecoderConfig(width=2048, heads=16, ffn=5632, **COMMON),
    "tensor": nn.DecoderConfig(width=4096, heads=256, head_dim=32, ffn=11264, **COMMON),
}


def experiment(kind: str, chips: int) -> Experiment:
    mesh = MeshConfig(data=1, fsdp=chips) if kind == "fsdp" else MeshConfig(data=1, tensor=chips)
    rows = 2 * chips if kind == "fsdp" else 8
    return Experiment(model=MODELS[kind], data=DataConfig(seq_len=LENGTH, batch_size=rows), mesh=mesh)


def row(kind: str, chips: int) -> str:
    config = experiment(kind, chips)
    (found,) = run_forecast(config, parse_topology(f"v5e:{SHAPES[chips]}"), None, 0, lambda *_: None)["forecasts"]
    weights = count_params(nn.abstract(config.model)[1])
    held = found["memory"]["held"]
    state, least_state = held["parameters"] + held["optimizer"], 12 * weights / chips
    sent = sum(each["bytes"] for each in found["counts"]["collectives"] if kind in each["axes"])
    if kind == "fsdp":
        least = least_fsdp(weights, chips, 2)
    else:
        least = least_tensor(config.model, 8 * LENGTH, chips, 2)
    mib = [state / 2**20, state / least_state, found["memory"]["peak"] / 2**20, sent / 2**20, sent / least]
    return "| {} | {} | {:,.0f} | {:.2f} | {:,.0f} | {:,.0f} | {:.2f} |".format(kind, chips, *mib)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    print("| split | chips | state, MiB a chip | over the least | peak, MiB | sent, MiB a chip | over the least |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for kind in args.only:
        for chips in args.chips:
            print(row(kind, chips), flush=True)


if __name__ == "__main__":
    main()
