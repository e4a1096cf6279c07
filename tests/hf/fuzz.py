"""A fuzzer of model directories: each damaged one loads, or is an error of one line that names it.

    python -m tests.hf.fuzz [--cases 10000] [--seed 0] [--first 0]

A case is a small model of a Hugging Face family whose config.json, weights or index are damaged at random. The damage
depends on the seed and the number of the case, which are printed where it fails; ``--first NUMBER --cases 1`` repeats
the case. It also fails if it warns, takes ``SECONDS``, or asks for ``BYTES`` of memory, because lengths and sizes in a
file are only claims. Cases run in child processes, so that one that ends its process is only one failure.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import functools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.numpy import save

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.hf.directory import read_model
from jaxlm.hf.tensor_files import WEIGHTS_FILE
from tests.hf.damage import CONFIG, DAMAGE, Files
from tests.hf.families.families import GOLDEN, weights
from tests.limits import Hang, limited, traced

COMPRESSED = {"jaxlm-w4a16": "w4a16-rtn-g8"}  # models in jaxlm's own format: name -> recipe
BASES = (
    "llama", "llama-longrope", "llama-yarn", "gpt2", "gpt_neox", "mixtral", "qwen3", "qwen3_moe-sparse", "gemma3_text",
    "phi3", "t5", "marian", "bart", *COMPRESSED,
)
SECONDS = 10  # CPU time: other programs may keep the process waiting
BYTES = 2**30
CASES_PER_CHILD = 500  # JAX's caches grow with every case
Result = tuple[int, str, str]  # number of the case, its damage, the outcome


@functools.cache
def base(name: str) -> Files:
    """The undamaged files of a golden case or of a compressed model."""
    if name in COMPRESSED:
        with tempfile.TemporaryDirectory() as root:
            _write(Path(root, "dense"), base("llama"))
            jaxlm.compress(jaxlm.load(Path(root, "dense")), COMPRESSED[name]).save(Path(root, "small"))
            return {file: Path(root, "small", file).read_bytes() for file in (CONFIG, WEIGHTS_FILE)}
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    return {CONFIG: json.dumps(golden["config"]).encode(), WEIGHTS_FILE: save(weights(golden["tensors"]))}


def case(seed: int, number: int, bases: tuple[str, ...]) -> tuple[str, Files]:
    """A description of the damage, and the damaged files."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(bases)
    files = dict(base(name))
    return f"{name}: {rng.choice(DAMAGE)(rng, files)}", files


def outcome(directory: Path) -> str:
    """The outcome of reading a directory: "loaded", "refused", or what went wrong."""
    try:
        with limited(BYTES, SECONDS), warnings.catch_warnings():
            warnings.simplefilter("error")
            read_model(directory)
    except UserError as error:
        message = str(error)
        if len(message.splitlines()) != 1 or str(directory) not in message or not message.isprintable():
            return f"the message is not one line that names the directory: {message!r}"
        return "refused"
    except Hang:
        return f"it took {SECONDS} seconds"
    except BaseException as error:
        return traced(error)
    return "loaded"


def run(seed: int, numbers: range, bases: tuple[str, ...] = BASES) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as root:
        for name in bases:  # undamaged they must load; this also compiles before anything is measured
            _write(Path(root, name), base(name))
            read_model(Path(root, name))
        for number in numbers:
            damage, files = case(seed, number, bases)
            directory = Path(root, str(number))
            _write(directory, files)
            yield number, damage, outcome(directory)
            shutil.rmtree(directory)


def _write(directory: Path, files: Files) -> None:
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)


def run_in_children(seed: int, numbers: range) -> Iterator[Result]:
    while numbers:
        command = ["--seed", str(seed), "--first", str(numbers[0]), "--cases", str(len(numbers)), "--child"]
        child = subprocess.run([sys.executable, "-m", __spec__.name, *command], capture_output=True, text=True)
        results = [json.loads(line) for line in child.stdout.splitlines()]
        yield from results
        numbers = numbers[len(results) :]
        if numbers:
            damage, _ = case(seed, numbers[0], BASES)
            yield numbers[0], damage, f"its process ended with {child.returncode}: {child.stderr[-2000:]}"
            numbers = numbers[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--child", action="store_true", help="print each result as JSON, from this process")
    args = parser.parse_args()
    numbers = range(args.first, args.first + args.cases)
    if args.child:
        for result in run(args.seed, numbers):
            print(json.dumps(result), flush=True)
            faulthandler.dump_traceback_later(60 * SECONDS, exit=True)  # in case no signal can end a case
        return
    began, counts = time.time(), collections.Counter()
    parts = [numbers[i : i + CASES_PER_CHILD] for i in range(0, len(numbers), CASES_PER_CHILD)]
    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(lambda part: list(run_in_children(args.seed, part)), parts):
            for number, damage, found in results:
                good = found in ("loaded", "refused")
                counts[found if good else "failed"] += 1
                if not good:
                    print(f"seed {args.seed}, case {number}: {damage}\n    {found}", flush=True)
    print(f"{counts['loaded']} loaded, {counts['refused']} refused, {counts['failed']} failed; "
          f"{time.time() - began:.0f} s")
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
