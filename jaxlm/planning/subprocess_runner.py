"""Runs a forecast in a process of its own: ``python -m jaxlm.planning.subprocess_runner``.

JAX must know the number of simulated CPU devices before it starts, and a compiler that aborts or writes to standard
error then affects only that process. The request is JSON on standard input; the replies are lines of JSON on standard
output.
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
from jaxlm.core.processes import module_command, module_environment
from jaxlm.core.progress import Progress
from jaxlm.planning.topology import Topology, parse_topology
from jaxlm.training.config import Experiment

__all__ = ["run_forecast"]


def run_forecast(
    config: Experiment, topology: Topology, serving: dict[str, Any] | None, search: int, progress: Progress
) -> dict[str, Any]:
    """Forecasts an experiment in a new process.

    Args:
        config: the experiment.
        topology: the devices to compile for.
        serving: the fields of ``ServingShape`` to forecast a server; None to forecast training.
        search: how many meshes of a search to compile; 0 for no search.
        progress: called with (what, done, total).

    Returns:
        ``{"forecasts": [...], "search": [...]}``: lists of ``Forecast.to_json``, each with suggestions under
        ``advice``, and of ``MeshCandidate.to_json``.

    Raises:
        UserError: as the functions that make the forecast raise it.
        RuntimeError: when the process ended without a reply; the message has the end of its standard error.
    """
    request = {"config": to_dict(config), "topology": topology.name, "serving": serving, "search": search}
    command = module_command("jaxlm.planning.subprocess_runner")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(topology)
        )
        try:
            with child.stdin as pipe:
                json.dump(request, pipe)
            reply = None
            for line in child.stdout:
                reply = json.loads(line)
                if "progress" in reply:
                    progress(*reply["progress"])
            child.wait()
        finally:
            child.kill()
            child.stdout.close()
        if child.returncode or reply is None:
            log.seek(0)
            raise RuntimeError(f"the forecast failed with status {child.returncode}:\n{log.read()[-4000:]}")
    if "error" in reply:
        raise UserError(reply["error"])
    return reply


def _environment(topology: Topology) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    if topology.chip is None:
        flags = f"{flags} --xla_force_host_platform_device_count={topology.size}"
    return module_environment(
        XLA_FLAGS=flags,
        JAX_PLATFORMS="cpu",
        JAX_ENABLE_COMPILATION_CACHE="false",  # a program from the cache does not report its memory
        TPU_SKIP_MDS_QUERY="1",  # a machine without TPUs has no metadata server
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # libtpu opens no device here
    )


def _main() -> None:
    stdout, sys.stdout = sys.stdout, sys.stderr

    def send(data: dict[str, Any]) -> None:
        print(json.dumps(data), file=stdout, flush=True)

    def progress(what: str, done: int, total: int) -> None:
        send({"progress": [what, done, total]})

    request = json.load(sys.stdin)
    try:
        send(_reply(request, progress))
    except UserError as error:
        send({"error": str(error)})


def _reply(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from jaxlm.planning.forecasting import forecast
    from jaxlm.planning.mesh_search import search
    from jaxlm.planning.programs import ServingShape, forecast_programs
    from jaxlm.planning.suggestions import suggest_changes

    config, topology = from_dict(Experiment, request["config"]), parse_topology(request["topology"])
    serving = ServingShape(**request["serving"]) if request["serving"] else None
    if request["search"]:
        found = search(config, topology, request["search"], progress)
        best = [each.forecast.to_json() | {"advice": []} for each in found[:1] if each.forecast]
        return {"forecasts": best, "search": [each.to_json() for each in found]}
    programs, results = forecast_programs(config, topology, serving), []
    for i, program in enumerate(programs):
        progress(f"compiling the {program.name}", i, len(programs))
        result = forecast(program, config, topology)
        results.append(result.to_json() | {"advice": suggest_changes(result, config, topology, serving)})
    progress("compiling", len(programs), len(programs))
    return {"forecasts": results, "search": []}


if __name__ == "__main__":
    _main()
