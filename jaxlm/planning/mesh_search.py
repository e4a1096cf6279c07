"""``search``: finds the mesh and the remat policy that suit an experiment best.

All candidates are ranked by analytic estimates, and the most promising of them are compiled.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.nn.config import DecoderConfig
from jaxlm.planning.analytic import Estimate, estimate, mesh_shapes
from jaxlm.planning.forecasting import Forecast, forecast
from jaxlm.planning.programs import forecast_programs
from jaxlm.planning.topology import Topology
from jaxlm.training.config import Experiment

__all__ = ["MeshCandidate", "search"]

_SHOWN = 10  # candidates that are returned


@dataclass(frozen=True)
class MeshCandidate:
    """An experiment with another mesh and remat policy. ``forecast`` is None if it was not compiled."""

    config: Experiment
    estimate: Estimate
    forecast: Forecast | None = None

    @property
    def peak(self) -> float:
        """Bytes on one device."""
        return self.forecast.memory.peak if self.forecast else self.estimate.peak

    @property
    def seconds(self) -> float:
        """Of a step; infinite if the compiler found that the program does not fit."""
        if self.forecast is None:
            return self.estimate.step
        return self.forecast.time.step if self.forecast.time else float("inf")

    def fits(self, topology: Topology) -> bool:
        return self.peak <= topology.chip.memory and self.seconds < float("inf")

    def to_json(self) -> dict[str, Any]:
        return {
            "mesh": self.config.mesh.sizes, "remat": self.config.model.remat, "peak": self.peak,
            "seconds": self.seconds if self.seconds < float("inf") else None,
            "compiled": self.forecast is not None,
        }


def search(
    config: Experiment, topology: Topology, compiled: int, progress: Callable[[str, int, int], None]
) -> list[MeshCandidate]:
    """The best ten candidates, best first: those that fit before those that do not, then by speed.

    Args:
        config: the experiment; its mesh and remat policy are replaced.
        topology: the devices.
        compiled: how many of the best candidates by analytic estimate are compiled.
        progress: called with (what, done, total).

    Raises:
        UserError: on CPU devices, whose speed is not known; for an LSTM, which has no remat policies; and when no mesh
            can share the batch.
    """
    if topology.chip is None:
        raise UserError("--search ranks meshes by time, and the speed of a CPU is not known; give a TPU topology")
    if config.model.kind == "lstm":
        raise UserError("--search chooses a mesh and a remat policy for a Transformer, and this model is an LSTM")
    found = []
    for each in _variants(config, topology):
        try:
            found.append(MeshCandidate(each, estimate(each, topology)))
        except UserError:  # this mesh cannot share the batch
            continue
    if not found:
        raise UserError(
            f"no mesh of {topology.size} devices can share the batch; make data.batch_size a multiple of their number"
        )

    def order(candidate: MeshCandidate) -> tuple:
        return not candidate.fits(topology), candidate.seconds, candidate.peak

    found.sort(key=order)
    for i, candidate in enumerate(found[:compiled]):
        progress("compiling the best candidates", i, compiled)
        (program,) = forecast_programs(candidate.config, topology)
        found[i] = dataclasses.replace(candidate, forecast=forecast(program, candidate.config, topology))
    progress("compiling the best candidates", compiled, compiled)
    return sorted(found, key=lambda each: (each.forecast is None, order(each)))[:_SHOWN]


def _variants(config: Experiment, topology: Topology) -> Iterator[Experiment]:
    model = config.model
    policies = typing.get_args(typing.get_type_hints(DecoderConfig)["remat"])
    for sizes in mesh_shapes(topology.size, max(model.experts, 1)):
        if any(size % sizes.tensor for size in (model.heads, model.n_kv_heads, model.d_ffn)):
            continue
        mesh = dataclasses.replace(config.mesh, preset="ddp", sequence=1, stage=1, **{
            axis: size for axis, size in sizes.sizes.items() if size
        })
        for remat in policies:
            if not remat.startswith("offload"):  # the time of transfers to the host is not estimated
                yield dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(model, remat=remat))
