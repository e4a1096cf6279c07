"""Tests run on eight CPU devices that JAX makes up, so that meshes are real; data from outside is optional."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

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
# What one worker, child process or earlier run has compiled, the others load while versions and flags are the same.
_CACHES = Path(__file__).parents[1] / ".pytest_cache" / "xla"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _made_by = [sys.version, *(version(package) for package in ("jax", "jaxlib")), os.environ["XLA_FLAGS"]]
    _programs = _CACHES / hashlib.sha256("\n".join(_made_by).encode()).hexdigest()[:16]
    for other in _CACHES.glob("*") if "PYTEST_XDIST_WORKER" not in os.environ else ():
        if other != _programs:
            shutil.rmtree(other, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_programs)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
_MOST_MAPPINGS = 45_000  # of the 65,530 that Linux allows a process
_MOST_RESIDENT = 3 * 2**30  # bytes of one worker
gc.disable()  # tracing makes millions of small objects, and few are garbage: free_programs collects when memory grows


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("JAXLM_SLOW_TESTS"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="one of many alike: JAXLM_SLOW_TESTS=1 runs them all"))


def pytest_sessionfinish() -> None:
    gc.freeze()  # pytest collects garbage several times at its end: what is left ends with the process


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Compiled programs stay for the modules that compile the same, until they take too much memory, or come near the
    number of mappings that Linux allows a process, past which the compiler aborts it."""
    yield
    mappings = Path("/proc/self/maps").read_text().count("\n")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if mappings > _MOST_MAPPINGS or resident > _MOST_RESIDENT:
        import jax  # after the environment is set

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with corpora and models that are not part of this repository, named by JAXLM_SHARED."""
    path = Path(os.environ.get("JAXLM_SHARED") or Path(__file__).parents[2] / "shared")
    if not (path / "models").is_dir():
        pytest.skip(f"{path} is not there: set JAXLM_SHARED to a directory with models/ and data/")
    return path
