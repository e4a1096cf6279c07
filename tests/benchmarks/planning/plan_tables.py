"""The tables of forecasts: runs ``jaxlm plan`` for every row that OUT does not hold yet, and prints the tables.

    python tests/benchmarks/planning/plan_tables.py OUT [--only ROW ...]
    python tests/benchmarks/planning/plan_tables.py OUT --show       # runs nothing

Each row is a file ``OUT/ROW.json`` of ``jaxlm plan --json``. libtpu is needed (``pip install jaxlm[plan]``). A row
takes one compilation: half a minute to some minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CONFIGS = Path(__file__).parents[3] / "configs"
SERVE = "--topology v5e:2x4 --serve --batch 16 --context 4096 --mesh.preset ddp --mesh.tensor 8"
TRAINING = {
    "7b": "llama_7b.py --topology v5e:16x16",
    "70b": "llama_70b.py --topology v5p:4x8x8",
    "8x7b": "mixtral_8x7b.py --topology v5p:4x8x8",
}
WMT = {
    "wmt-1": "wmt14_en_de_big.py --topology v5e:1x1 --train.accumulate 8",
    "wmt-4": "wmt14_en_de_big.py --topology v5e:2x2 --train.accumulate 2",
    "wmt-8": "wmt14_en_de_big.py --topology v5e:2x4",
    "wmt-32": "wmt14_en_de_big.py --topology v5e:4x8",
}
SERVING = {
    "serve-bf16": f"llama_70b.py {SERVE}",
    "serve-int8": f"llama_70b.py {SERVE} --recipe w8a8-dynamic",
    "serve-int4": f"llama_70b.py {SERVE} --recipe w4a16-gptq",
}


def read(out: Path, row: str) -> list[dict] | None:
    path = out / f"{row}.json"
    return json.loads(path.read_text())["forecasts"] if path.exists() else None


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"


def markdown(header: str, rows: list[list[str]]) -> str:
    names = [name.strip() for name in header.split("|")]
    return "\n".join(f"| {' | '.join(row)} |" for row in [names, ["---", *["---:"] * (len(names) - 1)], *rows])


def training(out: Path) -> str:
    rows = []
    for row, command in TRAINING.items():
        if found := read(out, row):
            (it,) = found
            held, time = it["memory"]["held"], it["time"]
            state = held["parameters"] + held["optimizer"]
            rest = held["gradients"] + it["memory"]["activations"]
            times = [milliseconds(each) for each in (time["compute"], time["memory"], sum(time["network"].values()))]
            rows.append([f"`{command}`", f"{gib(state)} + {gib(rest)}", " / ".join(times), f"{it['mfu']:.0%}",
                         f"{it['tokens_per_second']:,.0f}", f"{it['days']:,.0f}", f"{it['chip_hours'] / 1e3:,.0f}"])
    return markdown("`jaxlm plan configs/...` | GiB a chip: state + the rest | ms: compute / memory / network | "
                    "MFU, at most | tokens/s | days | thousand chip-hours", rows)


def wmt(out: Path) -> str:
    rows, alone = [], None
    for row, command in WMT.items():
        if found := read(out, row):
            (it,) = found
            alone = alone or it["tokens_per_second"] / it["devices"]
            rows.append([f"{it['devices']}", f"`{command.partition(' ')[2]}`", gib(it["memory"]["peak"]),
                         f"{milliseconds(it['time']['step'])} ({it['time']['bound']})",
                         f"{milliseconds(it['time']['serial'])}", f"{it['tokens_per_second']:,.0f}",
                         f"{it['tokens_per_second'] / alone:.2f}"])
    return markdown("chips | options | GiB a chip | ms a step | without overlap | tokens/s | speed-up", rows)


def serving(out: Path) -> str:
    rows = []
    for row in SERVING:
        if found := read(out, row):
            prefill, decode = found
            cells = [row.removeprefix("serve-"), gib(decode["memory"]["held"]["parameters"]),
                     gib(max(each["memory"]["peak"] for each in found))]
            for it in found:
                over = f"{gib(it['over'])} GiB too much"
                cells.append(f"{milliseconds(it['time']['step'])} ({it['time']['bound']})" if it["time"] else over)
            cells.append(f"{decode['tokens_per_second']:,.0f}" if decode["time"] else "")
            rows.append(cells)
    return markdown("weights | GiB of weights a chip | peak | prefill, ms | a token, ms | tokens/s decoding", rows)


def tables(out: Path) -> str:
    """All tables of what ``out`` holds."""
    return "\n\n".join(table(out) for table in (training, wmt, serving))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", metavar="ROW", default=[], help="these rows")
    parser.add_argument("--show", action="store_true", help="only what OUT holds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for row, command in (TRAINING | WMT | SERVING).items():
        file = args.out / f"{row}.json"
        if args.show or file.exists() or (args.only and row not in args.only):
            continue
        config, *options = command.split()
        words = [sys.executable, "-m", "jaxlm", "plan", str(CONFIGS / config), *options]
        print(f"{row}: jaxlm plan configs/{command}", file=sys.stderr, flush=True)
        subprocess.run([*words, "--json", str(file)], check=True, stdout=sys.stderr)
    print(tables(args.out))


if __name__ == "__main__":
    main()
