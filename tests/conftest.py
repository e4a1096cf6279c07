"""Tests run on eight CPU devices that JAX makes up, so that meshes are real; data from outside is optional."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.slow import is_slow

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile hundreds of small programs and run each once or twice, so the compiler's effort is their time: without
# optimisation they take a fifth of it. The last flag has another name since jax 0.11.
_HURRY = "use_fusion_emitters=false" if version("jax") < "0.11" else "opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        f"--xla_cpu_{_HURRY}",
    ]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("JAXLM_SLOW_TESTS"):
        for item in items:
            if is_slow(item.nodeid):
                item.add_marker(pytest.mark.skip(reason="one of many alike: JAXLM_SLOW_TESTS=1 runs them all"))


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Compiled programs go with the module they served: those of all tests together exceed the mappings of memory that
    Linux allows a process, and the compiler then aborts it."""
    yield
    import jax  # after the environment is set

    jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with corpora and models that are not part of this repository, named by JAXLM_SHARED."""
    path = Path(os.environ.get("JAXLM_SHARED") or Path(__file__).parents[2] / "shared")
    if not (path / "models").is_dir():
        pytest.skip(f"{path} is not there: set JAXLM_SHARED to a directory with models/ and data/")
    return path
