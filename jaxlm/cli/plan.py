"""Forecasts the memory and time of a training or a server, for devices that need not exist, by compiling it for them.

    jaxlm plan CONFIG.py --topology v5e:16x16 [--mesh.preset fsdp ...]
    jaxlm plan CONFIG.py --topology v5e:2x4 --serve --recipe w8a8-dynamic --batch 8 --context 4096 --mesh.tensor 8
    jaxlm plan CONFIG.py --topology v5e:8x8 --search

Memory is what the compiler reports. Arithmetic, memory traffic and messages are counted in the compiled program; times
are lower bounds computed from the published figures of the chip, under assumptions that are printed. No data is needed.
Forecasts for TPUs need libtpu: pip install jaxlm[plan].
"""

from __future__ import annotations

import argparse
from typing import Any

from jaxlm.cli.arguments import load_experiment
from jaxlm.cli.output import ProgressBar, add_json, check_writable, format_bytes, print_fields, print_table, write_json
from jaxlm.core.errors import UserError

_COMPILED = 4  # candidates of a search that are compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "jaxlm plan CONFIG.py --topology NAME [--serve ...] [--search] [--json FILE] [--a.b VALUE ...]"
    parser.add_argument("config", metavar="CONFIG.py", help="a Python file with config = Experiment(...)")
    parser.add_argument("--topology", metavar="NAME", required=True, help="v5e:16x16, v5p:4x4x8, v6e:2x4, v4:2x2x1; "
                        "two slices: v5e:16x16*2; cpu:8")
    parser.add_argument("--serve", action="store_true", help="forecast prefill and decoding instead of training")
    parser.add_argument("--recipe", metavar="NAME", default="",
                        help="with --serve: how weights are compressed (bfloat16)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="with --serve: rows decoded together (8)")
    parser.add_argument("--context", type=int, default=0, metavar="N", help="with --serve: tokens of a row (the "
                        "model's context)")
    parser.add_argument("--search", action="store_true", help="compare meshes and remat policies: the best ten, of "
                        f"which the {_COMPILED} most promising are compiled")
    add_json(parser)
    parser.set_defaults(overrides="")


def run(args: argparse.Namespace) -> None:
    check_writable(args.json)
    from jaxlm.planning.subprocess_runner import run_forecast
    from jaxlm.planning.topology import parse_topology

    topology = parse_topology(args.topology)
    config = load_experiment(args.config, args.overrides)
    if args.search and args.serve:
        raise UserError("--search is for training; remove --serve")
    if not args.serve and (args.recipe or args.context):
        raise UserError("--recipe and --context need --serve (for training with a recipe: --qat.recipe)")
    serving = {"recipe": args.recipe, "batch": args.batch, "context": args.context} if args.serve else None
    found = run_forecast(config, topology, serving, _COMPILED if args.search else 0, ProgressBar())
    if found["search"]:
        print_table([_candidate(row) for row in found["search"]])
        print()
    for i, forecast in enumerate(found["forecasts"]):
        if i:
            print()
        _print(forecast)
    if any(forecast["time"] for forecast in found["forecasts"]):
        from jaxlm.planning.roofline import ASSUMPTIONS

        print()
        for line in (f"the chip's figures are those of {topology.chip.source}", *ASSUMPTIONS):
            print(f"assumed: {line}")
    write_json(args.json, found)


def _print(forecast: dict[str, Any]) -> None:
    """Prints a ``Forecast.to_json``."""
    from jaxlm.core.sharding import describe_mesh

    memory, counts, time = forecast["memory"], forecast["counts"], forecast["time"]
    mesh = describe_mesh(forecast["mesh"])
    print_fields({
        "program": forecast["program"], "devices": f"{forecast['devices']:,} ({forecast['topology']}): {mesh}",
        "parameters": forecast["parameters"], **({"shapes": "; ".join(forecast["notes"])} if forecast["notes"] else {}),
    })
    print()
    rows = [{"memory of a device": name, "bytes": format_bytes(round(held))} for name, held in memory["held"].items()]
    rest = format_bytes(round(memory["activations"]))
    rows.append({"memory of a device": "activations and other temporaries", "bytes": rest})
    rows.append({"memory of a device": "peak", "bytes": format_bytes(round(memory["peak"])) + _of_capacity(memory)})
    print_table(rows)
    if forecast["over"]:
        print(f"\ndoes not fit: {format_bytes(round(forecast['over']))} are missing")
        for line in forecast["advice"]:
            print(f"try {line}")
    if counts and counts["collectives"]:
        print()
        print_table([
            {"messages of a device": row["kind"], "along": "+".join(row["axes"]), "times": row["times"],
             "bytes sent": format_bytes(round(row["bytes"]))} for row in counts["collectives"]
        ])
    if counts:
        print()
        print_fields(_figures(forecast, counts, time))


def _of_capacity(memory: dict[str, Any]) -> str:
    capacity = memory["capacity"]
    return f" of {format_bytes(round(capacity))}, {memory['peak'] / capacity:.0%}" if capacity else ""


def _figures(forecast: dict[str, Any], counts: dict[str, Any], time: dict[str, Any] | None) -> dict[str, Any]:
    fields = {
        "FLOPs of a device": f"{sum(counts['flops'].values()):.4g}",
        "model FLOPs of a device": f"{forecast['flops'] / forecast['devices']:.4g}",
        "memory traffic": format_bytes(round(counts["traffic"])),
        "tokens": forecast["tokens"],
    }
    if time is None:
        return fields | {"time": "unknown: there are no figures for this device"}
    network = ", ".join(f"{axes} {_seconds(each)}" for axes, each in time["network"].items())
    fields |= {
        "compute": _seconds(time["compute"]), "memory": _seconds(time["memory"]), "network": network or "none",
        "time, at least": f"{_seconds(time['step'])} ({time['bound']}); {_seconds(time['serial'])} without overlap",
        "tokens a second": f"{forecast['tokens_per_second']:,.0f}",
        "MFU, at most": f"{forecast['mfu']:.1%}",
    }
    if forecast["days"]:
        fields |= {
            "training": f"{forecast['total_tokens']:,} tokens: {forecast['days']:.3g} days, "
                        f"{forecast['chip_hours']:,.0f} chip-hours",
        }
    return fields


def _candidate(row: dict[str, Any]) -> dict[str, Any]:
    mesh = {axis: ways for axis, ways in row["mesh"].items() if axis in ("data", "fsdp", "expert", "tensor")}
    return {
        **mesh, "remat": row["remat"], "peak": format_bytes(round(row["peak"])),
        "step": "does not fit" if row["seconds"] is None else _seconds(row["seconds"]),
        "from": "compiler" if row["compiled"] else "estimate",
    }


def _seconds(seconds: float) -> str:
    unit, many = next((unit for unit in (("s", 1), ("ms", 1e3)) if seconds * unit[1] >= 1), ("us", 1e6))
    return f"{seconds * many:.3g} {unit}"
