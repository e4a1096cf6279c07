#!/usr/bin/env bash
# Sets up .venv and runs the tests; arguments go to pytest (./launch/test.sh tests/nn -x).
set -euo pipefail
EXTRAS="[dev]"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
