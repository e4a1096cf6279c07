"""Weak scaling on paper: what ``jaxlm plan`` counts in the compiled step, against the closed-form minimum.

    python tests/benchmarks/planning/weak_scaling.py [--chips 8 32 256] [--only fsdp tensor] [--json FILE]
    python tests/benchmarks/planning/weak_scaling.py --show FILE

Fully sharded data parallelism ("fsdp") has two rows for each chip; tensor parallelism ("tensor") has eight rows in
all. State is parameters and optimizer state; its minimum is 12 bytes a parameter over all chips. Messages are those
along the axis; their minimum is ``min_fsdp_bytes`` or ``min_tensor_bytes`` of ``planning.analytic``. Each mesh takes a
compilation for TPU v5e: half a minute to some minutes of one core. libtpu is needed. ``--show`` prints the table of a
JSON file.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from jaxlm import nn
from jaxlm.core.tree import count_params
from jaxlm.planning.analytic import min_fsdp_bytes, min_tensor_bytes
from jaxlm.planning.subprocess_runner import run_forecast
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


def row(kind: str, chips: int) -> dict[str, float | str]:
    """Bytes of one chip."""
    config = experiment(kind, chips)
    (found,) = run_forecast(config, parse_topology(f"v5e:{SHAPES[chips]}"), None, 0, lambda *_: None)["forecasts"]
    weights = count_params(nn.abstract(config.model)[1])
    held = found["memory"]["held"]
    state, least_state = held["parameters"] + held["optimizer"], 12 * weights / chips
    sent = sum(each["bytes"] for each in found["counts"]["collectives"] if kind in each["axes"])
    if kind == "fsdp":
        least = min_fsdp_bytes(weights, chips, 2)
    else:
        least = min_tensor_bytes(config.model, 8 * LENGTH, chips, 2)
    return {"split": kind, "chips": chips, "state": state, "least_state": least_state,
            "peak": found["memory"]["peak"], "sent": sent, "least_sent": least}


def markdown(rows: list[dict]) -> str:
    head = ("| split | chips | state, MiB a chip | over the least | peak, MiB | sent, MiB a chip | over the least |\n"
            "|---|---:|---:|---:|---:|---:|---:|")
    return "\n".join([head, *(
        f"| {it['split']} | {it['chips']} | {it['state'] / 2**20:,.0f} | {it['state'] / it['least_state']:.2f} | "
        f"{it['peak'] / 2**20:,.0f} | {it['sent'] / 2**20:,.0f} | {it['sent'] / it['least_sent']:.2f} |" for it in rows
    )])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows it holds are not made again")
    parser.add_argument("--show", type=Path, metavar="FILE")
    args = parser.parse_args()
    file = args.show or args.json
    rows = json.loads(file.read_text()) if file and file.exists() else []
    made = {(it["split"], it["chips"]) for it in rows}
    for kind, chips in () if args.show else itertools.product(args.only, args.chips):
        if (kind, chips) not in made:
            rows.append(row(kind, chips))
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(markdown(sorted(rows, key=lambda it: (it["split"], it["chips"]))))


if __name__ == "__main__":
    main()
