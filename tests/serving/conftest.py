"""A server for the tests, where the extra ``serve`` is installed; without it there are none."""

from __future__ import annotations

from importlib.util import find_spec

if all(find_spec(name) for name in ("httpx", "prometheus_client", "pydantic", "starlette", "uvicorn")):
    from tests.serving.servers import lms, models, server  # noqa: F401
else:
    collect_ignore_glob = ["test_*.py"]
