#!/usr/bin/env bash
# One training as a JobSet on Google Kubernetes Engine; the arguments are those of `jaxlm train`, RUN below /runs:
#     NAME=... IMAGE=... CLAIM=... NODES=... CHIPS=... WORKERS=... launch/gke.sh [--dry-run] CONFIG.py --out /runs/RUN
# --dry-run prints the manifest. Stop it with `kubectl delete jobset NAME`: a checkpoint is saved first.
#
# Reads: NAME      of the JobSet
#        IMAGE     a container image with bash and jaxlm in PATH
#        CLAIM     a volume claim that many pods can write to, mounted at /runs
#        NODES     labels of the nodes: 'cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice,
#                  cloud.google.com/gke-tpu-topology: 4x4', or 'cloud.google.com/gke-accelerator: nvidia-h100-80gb'
#        CHIPS     of one worker: 'google.com/tpu: 4', or 'nvidia.com/gpu: 8'
#        WORKERS   pods of a slice
#        SLICES    1
# Sets in each pod: JAX_COORDINATOR_ADDRESS, JAXLM_PROCESS_COUNT, JAXLM_PROCESS_ID, JAXLM_HOSTS, JAXLM_STOPPED_STATUS
set -euo pipefail

dry=''
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
if [ $# -lt 3 ]; then sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
SLICES=${SLICES:-1} WORKERS=${WORKERS:-}
if ! [[ "$WORKERS" =~ ^[1-9][0-9]*$ && "$SLICES" =~ ^[1-9][0-9]*$ ]]; then
    echo "gke.sh: set WORKERS, and SLICES if it is not 1, to whole numbers" >&2; exit 2
fi
# shellcheck disable=SC2034  # it is read by name, below
PROCESSES=$((SLICES * WORKERS))
HOSTS=$(for ((s = 0; s < SLICES; s++)); do for ((w = 0; w < WORKERS; w++)); do printf ',%s' "${NAME:-}-slice-$s-$w"; done; done)
HOSTS=${HOSTS#,}
ARGUMENTS=''
for word in "$@"; do
    word=${word//\\/\\\\}
    ARGUMENTS+=", \"${word//\"/\\\"}\""
done
ARGUMENTS="[${ARGUMENTS#, }]"

manifest=$(<"$(dirname "$0")/gke.yaml")
for name in NAME IMAGE CLAIM NODES CHIPS WORKERS SLICES PROCESSES HOSTS ARGUMENTS; do
    if [ -z "${!name:-}" ]; then echo "gke.sh: set $name; $0 without arguments says to what" >&2; exit 2; fi
    manifest=${manifest//"\${$name}"/"${!name}"}
done
if [ "$dry" ]; then echo "$manifest"; else kubectl apply -f - <<<"$manifest"; fi
