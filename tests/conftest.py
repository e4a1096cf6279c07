"""Tests run on eight CPU devices that JAX makes up, so that meshes are real; data from outside is optional."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.slow import is_slow

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile thousands of small programs and run each once or twice, so the compiler's effort is their time: without
# optimisation and in one piece they take a sixth of it. The last flag has another name since jax 0.11.
_HURRY = "use_fusion_emitters=false" if version("jax") < "0.11" else "opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        f"--xla_cpu_{_HURRY}",
    ]
)
# What one worker or child process has compiled, the others load.
_PROGRAMS = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="jaxlm-tests-")
if _PROGRAMS:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
gc.set_threshold(200_000, 20, 50)  # tracing makes millions of small objects, and few of them are garbage


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
