"""2,000 damaged files over every format that jaxlm reads: each is read, or refused in one line.

    python tests/benchmarks/damaged_files.py [--cases 2000] [--seed 0] [--first 0] [--format NAME]

It counts, by format, the cases that loaded and were refused, and the faults: tracebacks (also processes that ended),
hangs (10 seconds of CPU time), memory (1.5 times that of a good file), and values that are silently wrong though there
are checksums. ``tests/damaged`` says how files are made and damaged. Cases run in a process that is replaced when it
ends or hangs; ``--first NUMBER --cases 1`` repeats one. It needs Linux, for the memory of a process.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUTCOMES = ("loaded", "refused", "traceback", "hang", "memory", "wrong")
CASES_PER_PROCESS = 500  # JAX's caches grow with every case
SECONDS = 30  # of CPU time without a result, after which a process is ended from outside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--format", help="this one only")
    parser.add_argument("--child", action="store_true", help="print each result as JSON, from this process")
    args = parser.parse_args()
    numbers = range(args.first, args.first + args.cases)
    if args.child:
        _child(args.seed, numbers, args.format)
        return
    began, counts = time.time(), collections.defaultdict(collections.Counter)
    for number, name, what, outcome, more in _results(args.seed, numbers, args.format):
        counts[name][outcome] += 1
        if outcome not in ("loaded", "refused"):
            print(f"seed {args.seed}, case {number}, {name}: {what}\n    {outcome}: {more}", flush=True)
    print(f"| format | files | {' | '.join(OUTCOMES)} |\n|---|{'---|' * (len(OUTCOMES) + 1)}")
    total = sum(counts.values(), collections.Counter())
    for name, found in [*sorted(counts.items()), ("all", total)]:
        print(f"| {name} | {sum(found.values())} | {' | '.join(str(found[each]) for each in OUTCOMES)} |")
    print(f"{time.time() - began:.0f} s")
    sys.exit(any(total[each] for each in OUTCOMES[2:]))


def _child(seed: int, numbers: range, name: str | None) -> None:
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print too
    sys.path.insert(0, str(ROOT))
    from tests.damaged import cases

    formats = (name,) if name else tuple(cases.FORMATS)
    print(json.dumps(formats), file=results, flush=True)
    for case, outcome, more in cases.run(seed, numbers, formats):
        what = f"{case.file}: {case.what}"
        print(json.dumps([case.number, case.format, what, outcome, more]), file=results, flush=True)


def _results(seed: int, numbers: range, name: str | None) -> Iterator[list]:
    """[number, format, what was damaged, outcome, more] of each case."""
    while numbers:
        part = numbers[:CASES_PER_PROCESS]
        command = [sys.executable, __file__, "--seed", str(seed), "--first", str(part[0]), "--cases", str(len(part))]
        command += ["--child", *(["--format", name] if name else [])]
        with tempfile.TemporaryFile("w+") as log:
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, bufsize=0, env=os.environ | {"RUST_BACKTRACE": "0"}
            )
            formats, done, ended = None, 0, ""
            while line := _line(child):
                if formats is None:
                    formats = json.loads(line)
                    continue
                yield json.loads(line)
                done += 1
            if line is None:
                ended = f"no result after {SECONDS} seconds of CPU time"
                child.kill()
            child.wait()
            log.seek(0)
            numbers = numbers[done:]
            if formats is None:
                sys.exit(f"the process cannot begin:\n{log.read()[-3000:]}")
            if done < len(part):
                more = ended or f"its process ended with {child.returncode}: {log.read()[-1000:]}"
                kind = "hang" if ended else "traceback"
                yield [numbers[0], formats[numbers[0] % len(formats)], "see --first", kind, more]
                numbers = numbers[1:]


def _line(child: subprocess.Popen) -> bytes | None:
    """The next line of a process; b"" when it has ended, None when it takes too much CPU time without one."""
    begun = _cpu(child.pid)
    while True:
        if select.select([child.stdout], [], [], 1)[0]:
            return child.stdout.readline()
        if _cpu(child.pid) - begun > SECONDS:
            return None


def _cpu(pid: int) -> float:
    """Seconds of CPU time that a process has taken."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
