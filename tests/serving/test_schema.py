"""/openapi.json is true: whatever it allows is answered as it says, whatever it forbids is refused."""

from __future__ import annotations

import pytest

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

import httpx  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

from jaxlm.serving.protocol.openapi import openapi_document  # noqa: E402

schema = schemathesis.openapi.from_dict(openapi_document(api_keys=False))
# So that most requests reach a model, and few programs are compiled.
TAME = {
    "/v1/completions": {"model": "plain", "max_tokens": 3, "n": 2},
    "/v1/chat/completions": {"model": "tiny", "max_tokens": 3, "n": 2},
    "/v1/translate": {"model": "words", "beam": 2, "max_length": 4, "alternatives": 1},
    "/v1/inspect": {"model": "tiny", "steps": 2, "method": "gradient_x_input"},
}


def test_the_document_is_that_of_the_server(server):
    assert httpx.get(f"{server.url}/openapi.json").json() == openapi_document(api_keys=False)
    assert openapi_document(api_keys=True)["components"]["securitySchemes"]


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_whatever_the_schema_allows_is_answered_as_it_says(case, server):
    excluded = []
    if case.meta.generation.mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
        tame = TAME[case.path]
        case.body = case.body | {name: value for name, value in tame.items() if name == "model" or case.body.get(name)}
        excluded = [positive_data_acceptance]  # the small models know no letters but their own, and have little room
    case.call_and_validate(base_url=server.url, excluded_checks=excluded, timeout=120)
