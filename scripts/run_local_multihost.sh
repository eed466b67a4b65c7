#!/usr/bin/env bash
# Run the training in N processes on this machine, each with one CPU device, joined as the hosts of a cluster are.
#
#   scripts/run_local_multihost.sh 2 --config configs/smoke.yaml --output_dir /tmp/two
#
# The first process prints; the others write to OUTPUT of TMPDIR. The exit status is the first one's, or that of the
# first process that failed. SIGTERM and Ctrl-C reach all: they save and end with status 130.
set -uo pipefail

[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
n=$1
shift
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 JAX_NUM_PROCESSES=$n
port=$(python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
logs=$(mktemp -d)
pids=()
for ((i = 0; i < n; i++)); do
  if [[ $i == 0 ]]; then
    JAX_PROCESS_ID=0 python -m grpo_jax.train "$@" &
  else
    JAX_PROCESS_ID=$i python -m grpo_jax.train "$@" >"$logs/$i.log" 2>&1 &
  fi
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
status=0
for i in "${!pids[@]}"; do
  while :; do # wait returns early when a signal comes
    wait "${pids[$i]}"
    code=$?
    kill -0 "${pids[$i]}" 2>/dev/null || break
  done
  if [[ $code != 0 && $i != 0 ]]; then
    echo "Process $i ended with status $code; its last lines ($logs/$i.log):" >&2
    tail -n 5 "$logs/$i.log" >&2
  fi
  [[ $status != 0 ]] || status=$code
done
exit "$status"
