#!/usr/bin/env bash
# One training on all workers of a Cloud TPU slice, over ssh; the arguments are those of `jaxlm train`:
#     TPU=NAME ZONE=ZONE launch/tpu_pod.sh [--dry-run] CONFIG.py --out RUN [--a.b VALUE ...]
#     TPU=NAME ZONE=ZONE launch/tpu_pod.sh --stop          each worker saves a checkpoint and ends
# Every worker has this repository, set up, in DIRECTORY, and sees RUN on a shared file system.
#
# Reads: TPU, ZONE, PROJECT (gcloud's own), DIRECTORY (jaxlm, in the home directory), PORT (of process 0; 8476)
# Sets:  JAX_COORDINATOR_ADDRESS, JAXLM_PROCESS_COUNT, JAXLM_PROCESS_ID, JAXLM_HOSTS, on the workers
set -euo pipefail

dry=''
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
if [ $# -eq 0 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
where=("$TPU" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"})

run() { if [ "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
on_all_workers() { run gcloud compute tpus tpu-vm ssh "${where[@]}" --worker=all --command "$1"; }

if [ "$1" = --stop ]; then
    on_all_workers "pkill -TERM -f 'jaxlm [t]rain'"
    exit
fi
hosts=$(run gcloud compute tpus tpu-vm describe "${where[@]}" --format 'value[delimiter=","](networkEndpoints[].ipAddress)')
if [ "$dry" ]; then echo "$hosts"; hosts=WORKER_0,WORKER_1; fi
commas=${hosts//[^,]/}
number='$(curl -sf -H "Metadata-Flavor: Google" http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)'
on_all_workers "cd ${DIRECTORY:-jaxlm} && JAX_COORDINATOR_ADDRESS=${hosts%%,*}:${PORT:-8476} JAXLM_HOSTS=$hosts \
JAXLM_PROCESS_COUNT=$((${#commas} + 1)) JAXLM_PROCESS_ID=$number .venv/bin/jaxlm train $(printf '%q ' "$@")"
