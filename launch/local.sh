#!/usr/bin/env bash
# Several processes on this machine as one training:
#     launch/local.sh -n 4 [--dry-run] -- jaxlm train CONFIG.py --out RUN
# Lines of output begin with the number of their process. When a process fails, the others are ended, and its status is
# this script's. TERM and Ctrl-C go to all of them: they save a checkpoint and end with 0. GPUs are dealt out evenly.
#
# Reads: PORT (of process 0; default: a free one), GRACE (seconds for the others after a failure; 10)
# Sets:  JAX_COORDINATOR_ADDRESS, JAXLM_PROCESS_COUNT, JAXLM_PROCESS_ID, and on GPUs JAX_LOCAL_DEVICE_IDS
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
count='' dry=''
while [ $# -gt 0 ]; do
    case "$1" in
    -n) count="${2:-}"; shift 2 || usage ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) usage ;;
    esac
done
[[ "$count" =~ ^[1-9][0-9]*$ && $# -gt 0 ]] || usage

PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
free_port() {
    local port
    while port=$((20000 + RANDOM % 10000)); (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo "$port"
}
export JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-$(free_port)}" JAXLM_PROCESS_COUNT="$count"
gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
devices_of() {  # of process $1: its share of the GPUs
    [ "$gpus" -lt "$count" ] || seq -s, $(($1 * gpus / count)) $((($1 + 1) * gpus / count - 1))
}

if [ "$dry" ]; then
    for ((i = 0; i < count; i++)); do
        devices=$(devices_of "$i")
        echo "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS JAXLM_PROCESS_COUNT=$count JAXLM_PROCESS_ID=$i" \
            ${devices:+"JAX_LOCAL_DEVICE_IDS=$devices"} "$(printf '%q ' "$@")"
    done
    exit
fi

pipes=$(mktemp -d)
pids=() prefixes=()
declare -A ended
send() {  # signal $1 to those that run
    for ((i = 0; i < ${#pids[@]}; i++)); do [ "${ended[$i]:-}" ] || kill "-$1" "${pids[$i]}" 2>/dev/null || true; done
}
trap 'send KILL; rm -rf "$pipes"' EXIT
for ((i = 0; i < count; i++)); do
    devices=$(devices_of "$i")
    mkfifo "$pipes/$i"
    sed -u "s/^/$i: /" <"$pipes/$i" & prefixes+=($!)
    env JAXLM_PROCESS_ID="$i" ${devices:+JAX_LOCAL_DEVICE_IDS="$devices"} "$@" >"$pipes/$i" 2>&1 & pids+=($!)
done
trap 'send TERM' TERM INT

status=0 left=$count deadline=''
while [ "$left" -gt 0 ]; do
    sleep 0.2 || true
    for ((i = 0; i < count; i++)); do
        [ "${ended[$i]:-}" ] || kill -0 "${pids[$i]}" 2>/dev/null && continue
        code=0; wait "${pids[$i]}" || code=$?
        ended[$i]=1 left=$((left - 1))
        if [ $code -ne 0 ] && [ $status -eq 0 ]; then
            status=$code deadline=$((SECONDS + ${GRACE:-10}))
            echo "local.sh: process $i ended with status $code; ending the others" >&2
        fi
    done
    if [ "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then send KILL; fi
done
wait "${prefixes[@]}"
exit $status
