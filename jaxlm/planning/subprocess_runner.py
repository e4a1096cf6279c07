"""Forecasts in a process of their own, ``python -m jaxlm.planning.subprocess_runner``: JAX must know before it starts that there
are to be N devices, and a compiler that aborts or writes to standard error ends or litters only that.

The request is JSON on standard input, the answers are lines of JSON on standard output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from jaxlm.core.config import from_dict, to_dict
from jaxlm.core.errors import UserError
from jaxlm.core.progress import Progress
from jaxlm.planning.topology import Topology, parse_topology
from jaxlm.training.config import Experiment

__all__ = ["run_forecast"]


def run_forecast(
    config: Experiment, topology: Topology, serving: dict[str, Any] | None, search: int, progress: Progress
) -> dict[str, Any]:
    """``{"forecasts": [...], "search": [...]}``, see ``Forecast.to_json`` and ``Candidate.to_json``; each forecast with
    ``advice``. ``serving`` has the fields of ``Serving``; ``search`` is how many meshes to compile, 0 for no search.

    Raises:
        UserError: as the functions that make the forecast.
        RuntimeError: the process ended without an answer; the end of what it wrote.
    """
    request = {"config": to_dict(config), "topology": topology.name, "serving": serving, "search": search}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
        child = subprocess.Popen(
            [sys.executable, "-m", "jaxlm.planning.subprocess_runner"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise,
            text=True, env=_environment(topology),
        )
        try:
            with child.stdin as pipe:
                json.dump(request, pipe)
            answer = None
            for line in child.stdout:
                answer = json.loads(line)
                if "progress" in answer:
                    progress(*answer["progress"])
            child.wait()
        finally:
            child.kill()
            child.stdout.close()
        if child.returncode or answer is None:
            noise.seek(0)
            raise RuntimeError(f"the forecast failed with status {child.returncode}:\n{noise.read()[-4000:]}")
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def _environment(topology: Topology) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    if topology.chip is None:
        flags = f"{flags} --xla_force_host_platform_device_count={topology.size}"
    return os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from there does not tell its memory
        "TPU_SKIP_MDS_QUERY": "1",  # nobody answers where there are no TPUs
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # none is opened
    }


def _main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(data: dict[str, Any]) -> None:
        print(json.dumps(data), file=answers, flush=True)

    def progress(what: str, done: int, total: int) -> None:
        answer({"progress": [what, done, total]})

    request = json.load(sys.stdin)
    try:
        answer(_answer(request, progress))
    except UserError as error:
        answer({"error": str(error)})


def _answer(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from jaxlm.planning.forecast import forecast
    from jaxlm.planning.programs import Serving, programs_of
    from jaxlm.planning.search import search
    from jaxlm.planning.suggestions import advise

    config, topology = from_dict(Experiment, request["config"]), parse_topology(request["topology"])
    serving = Serving(**request["serving"]) if request["serving"] else None
    if request["search"]:
        found = search(config, topology, request["search"], progress)
        best = [each.forecast.to_json() | {"advice": []} for each in found[:1] if each.forecast]
        return {"forecasts": best, "search": [each.to_json() for each in found]}
    programs, results = programs_of(config, topology, serving), []
    for i, program in enumerate(programs):
        progress(f"compiling the {program.name}", i, len(programs))
        result = forecast(program, config, topology)
        results.append(result.to_json() | {"advice": advise(result, config, topology, serving)})
    progress("compiling", len(programs), len(programs))
    return {"forecasts": results, "search": []}


if __name__ == "__main__":
    _main()
