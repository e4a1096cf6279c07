"""The public names of ``jaxlm.training``."""

from __future__ import annotations

import subprocess
import sys

import jaxlm.training


def test_every_public_name_is_there():
    assert {"Experiment", "DataConfig", "MeshConfig", "make_step", "train"} <= set(jaxlm.training.__all__)
    for name in jaxlm.training.__all__:
        assert getattr(jaxlm.training, name) is not None


def test_importing_the_package_imports_no_jax():
    code = "import sys, jaxlm.training; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
