#!/usr/bin/env bash
# Writes the tables in README pages that programs make; with --check it only compares, and fails where one is not current.
# Reads PYTHON, an interpreter that has jaxlm (.venv/bin/python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" -m tests.benchmarks.tables "$@"
