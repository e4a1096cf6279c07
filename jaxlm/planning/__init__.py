"""Forecasts of training and serving on devices that need not exist: ``jaxlm plan`` as a library.

    from jaxlm.planning import forecast, forecast_programs, parse_topology

    topology = parse_topology("v5e:16x16")
    (program,) = forecast_programs(experiment, topology)
    print(forecast(program, experiment, topology).memory.peak)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlm.core.lazy import lazy

if TYPE_CHECKING:
    from jaxlm.planning.analytic import Estimate, estimate
    from jaxlm.planning.forecasting import Forecast, Memory, forecast
    from jaxlm.planning.hlo_costs import Collective, HloCosts
    from jaxlm.planning.mesh_search import MeshCandidate, search
    from jaxlm.planning.programs import ForecastProgram, ServingShape, forecast_programs
    from jaxlm.planning.roofline import Roofline
    from jaxlm.planning.subprocess_runner import run_forecast
    from jaxlm.planning.suggestions import suggest_changes
    from jaxlm.planning.topology import Topology, parse_topology
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__, analytic="Estimate estimate", forecasting="Forecast Memory forecast", hlo_costs="Collective HloCosts",
        mesh_search="MeshCandidate search", programs="ForecastProgram ServingShape forecast_programs",
        roofline="Roofline", subprocess_runner="run_forecast", suggestions="suggest_changes",
        topology="Topology parse_topology",
    )
