#!/usr/bin/env bash
# Sets up .venv and runs `jaxlm quickstart`; arguments are passed on (./launch/quickstart.sh --out DIR).
set -euo pipefail
here="$PWD"
EXTRAS=""
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
jaxlm="$PWD/.venv/bin/jaxlm"
cd "$here"  # paths in the arguments are meant from there
exec "$jaxlm" quickstart "$@"
