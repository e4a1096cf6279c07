#!/usr/bin/env bash
# Sets up .venv and runs the tests; arguments go to pytest (./launch/test.sh tests/nn -x).
# JAXLM_SLOW_TESTS=1 adds those marked slow, which try the same on more kinds of models and meshes.
set -euo pipefail
EXTRAS="[dev]"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# Three workers keep two cores busy: tests of processes and servers wait now and then.
exec .venv/bin/python -m pytest -n 3 --dist worksteal "$@"
