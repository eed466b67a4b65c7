#!/usr/bin/env bash
# What only a GPU can show, in under nine minutes from a bare machine: benchmarks/gpu.sh [FILE.jsonl]
# Each measurement is one JSON line, appended when it is there, the most important first; one that fails or takes too
# long is a line that says so. `DRY_RUN=1 benchmarks/gpu.sh` runs all of it on a CPU with tiny sizes.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu.jsonl}")
deadline=$(($(date +%s) + ${SECONDS_IN_ALL:-530}))
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ "${DRY_RUN:-0}" = 1 ]; then
  export JAX_PLATFORMS=cpu
elif ! python -c 'import flax, jax; assert jax.default_backend() == "gpu"' 2>/dev/null; then
  python -m pip install -q -e ".[cuda]" || exit 1
fi

# measure SECONDS PART…: a part in a process of its own, so that neither memory nor an error reaches the next one
measure() {
  local limit=$1 left=$((deadline - $(date +%s)))
  shift
  if [ "$left" -lt 10 ]; then limit=0; elif [ "$left" -lt "$limit" ]; then limit=$left; fi
  local why="no time left"
  if [ "$limit" -gt 0 ]; then
    timeout -k 5 "$limit" python benchmarks/gpu.py "$@" --out "$out" && return
    why="status $? within $limit s"
  fi
  echo "{\"part\": \"$*\", \"failed\": \"$why\"}" >>"$out"
}

measure 70 parity float32
measure 70 parity bfloat16
measure 120 step qwen3-1.7b --rows 64 --preamble 5800
measure 120 step qwen3-1.7b --rows 256 --preamble 300
measure 90 profile qwen3-0.6b --rows 64 --preamble 5800
measure 120 step qwen2.5-0.5b --rows 64 --preamble 5800
measure 120 drafts qwen3-1.7b --rows 64
measure 120 step qwen3-0.6b --rows 64 --preamble 300
measure 120 step qwen3-1.7b --rows 256 --preamble 5800
measure 120 step qwen2.5-0.5b --rows 256 --preamble 300
measure 120 step qwen3-0.6b --rows 256 --preamble 5800
measure 120 step qwen3-1.7b --rows 64 --preamble 300
measure 120 step qwen2.5-0.5b --rows 64 --preamble 300
measure 120 step qwen3-0.6b --rows 64 --preamble 5800
measure 120 step qwen2.5-0.5b --rows 256 --preamble 5800
measure 120 step qwen3-0.6b --rows 256 --preamble 300
cat "$out"
