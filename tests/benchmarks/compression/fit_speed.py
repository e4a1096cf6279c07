"""How fast two builds of jaxlm fit a model to a budget, run in turn, and whether they choose the same.

    python tests/benchmarks/compression/fit_speed.py --other OTHER/.venv/bin/python [--rounds 3] [--samples 128]

Both run ``jaxlm compress MODEL --fit SIZE --calibrate SPEC`` as a process of its own, without a cache of compiled
programs. JAXLM_SHARED names the directory of the model and the data. It prints for each build the median seconds and
CPU seconds, their ratios, and whether what was chosen for each kernel is equal.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(python: str, arguments: list[str], out: Path) -> tuple[float, float]:
    """Seconds and CPU seconds of one fit."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [python, "-m", "jaxlm", "compress", *arguments, "--out", str(out)], check=True, env=environment,
        cwd=out.parent, stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begin, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def choices(out: Path) -> dict[str, dict | None]:
    """What was chosen for each kernel."""
    return {row["kernel"]: row["choice"] for row in json.loads((out / "compression.json").read_text())["choices"]}


def main() -> None:
    shared = Path(os.environ.get("JAXLM_SHARED") or Path(__file__).parents[4] / "shared")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", required=True, metavar="PYTHON", help="an interpreter that has the other build")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=str(shared / "models/books-llama"))
    parser.add_argument("--fit", default="3.2bits", metavar="SIZE")
    parser.add_argument("--calibrate", default=f"text:{shared / 'data/tinyshakespeare.txt'}", metavar="SPEC")
    parser.add_argument("--samples", type=int, default=128)
    args = parser.parse_args()
    arguments = [args.model, "--fit", args.fit, "--calibrate", args.calibrate, "--samples", str(args.samples)]
    builds = {"this": sys.executable, "other": args.other}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in builds}
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            for name, python in builds.items():
                out = Path(scratch) / f"{name}{number}"
                taken[name].append(run(python, arguments, out))
                found[name] = choices(out)
                print(f"{name:<6}{taken[name][-1][0]:>9.1f} s{taken[name][-1][1]:>9.1f} s of CPU", flush=True)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in taken.items()}
    for name, (seconds, cpu) in medians.items():
        print(f"{name:<6}{seconds:>9.1f} s{cpu:>9.1f} s of CPU  (medians of {args.rounds})")
    ratios = [other / this for this, other in zip(medians["this"], medians["other"], strict=True)]
    print(f"this build is {ratios[0]:.2f}x as fast, {ratios[1]:.2f}x in CPU seconds")
    different = [kernel for kernel, choice in found["this"].items() if found["other"].get(kernel) != choice]
    print("the choices are equal" if not different else f"{len(different)} choices differ: {', '.join(different[:5])}")


if __name__ == "__main__":
    main()
