#!/usr/bin/env bash
# Writes the tables of README.md that programs make, each between its markers. With --check it changes nothing and fails
# where one is not current. Reads PYTHON, an interpreter that has jaxlm (.venv/bin/python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
results=tests/benchmarks/results
new="$(mktemp)"
trap 'rm -f "$new" "$new.table" "$new.next"' EXIT
cp README.md "$new"

fill() { # NAME COMMAND...: what the command prints goes between <!-- NAME --> and <!-- /NAME -->
    local name=$1
    shift
    grep -q "^<!-- $name -->$" "$new" || { echo "README.md has no marker <!-- $name -->" >&2; exit 2; }
    "$@" > "$new.table"
    awk -v open="<!-- $name -->" -v close_="<!-- /$name -->" -v table="$new.table" '
        $0 == close_ { inside = 0 }
        !inside { print }
        $0 == open { inside = 1; while ((getline line < table) > 0) print line }
    ' "$new" > "$new.next"
    mv "$new.next" "$new"
}

fill families "$python" -m jaxlm.hf.families.registry
fill recipes "$python" -m jaxlm.compression.names
fill plan "$python" tests/benchmarks/planning/plan_tables.py "$results/plan" --show
fill scaling "$python" tests/benchmarks/planning/weak_scaling.py --show "$results/weak_scaling.json"
fill pareto "$python" tests/benchmarks/compression/multi30k_pareto.py --show "$results/multi30k_pareto.json"
fill compression "$python" tests/benchmarks/compression/compression_reference.py --show "$results/compression_reference.json"

if cmp -s "$new" README.md; then
    exit 0
elif [ "${1:-}" = --check ]; then
    diff -u README.md "$new" >&2 || true
    echo "README.md is not what the programs say; run launch/readme.sh" >&2
    exit 1
fi
cat "$new" > README.md
echo "README.md is written" >&2
