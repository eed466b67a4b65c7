#!/usr/bin/env bash
# Run a command that writes its results to a local folder, and keep a copy of that folder in a bucket.
#
#   scripts/with_bucket.sh gs://my-bucket/mine runs/mine -- python -m grpo_jax.train --config … --output_dir runs/mine
#
# The bucket's copy is fetched first if the folder does not exist, so that the same command continues on another
# machine; the copy is updated every COPY_SECONDS (default 60) and when the command has ended. SIGTERM is passed on.
# Names are copied in their order: checkpoints before the metrics that belong to them. A partly copied
# checkpoint is recognised as damaged at the next start, which uses the previous one.
set -uo pipefail

[[ $# -ge 4 && $3 == -- ]] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
bucket=$1 folder=$2
shift 3
unfinished='.*(\.orbax-checkpoint-tmp|\.tmp|\.run\.lock|\.damaged-).*'

# The folder appears when it is whole: one that is not would be copied over the bucket.
if [[ ! -e $folder ]]; then
  if listed=$(gcloud storage ls "$bucket/" 2>&1); then
    rm -rf "$folder.part" && mkdir -p "$folder.part"
    gcloud storage rsync --recursive "$bucket" "$folder.part" && mv "$folder.part" "$folder" || exit 1
  elif [[ $listed != *"matched no objects"* ]]; then
    echo "Error: $bucket cannot be listed: $listed" >&2
    exit 1
  fi
fi

copy() {
  [[ -e $folder ]] || return 0
  gcloud storage rsync --recursive --delete-unmatched-destination-objects "--exclude=$unfinished" "$folder" "$bucket"
}

"$@" &
command=$!
trap 'kill -TERM "$command" 2>/dev/null' TERM INT
# the sleep outlives the loop that is killed: it must not hold the output of whoever started this
(while sleep "${COPY_SECONDS:-60}" >/dev/null 2>&1; do copy; done) &
copier=$!
status=0
while :; do # wait returns early when a signal comes
  wait "$command"
  status=$?
  kill -0 "$command" 2>/dev/null || break
done
kill "$copier" 2>/dev/null
wait "$copier" 2>/dev/null
copy || echo "Warning: the last copy to $bucket failed; $folder holds what is newer" >&2
exit "$status"
