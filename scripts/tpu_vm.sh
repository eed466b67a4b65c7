#!/usr/bin/env bash
# Train on a Cloud TPU VM: one command per step, each of which may be repeated.
#
#   scripts/tpu_vm.sh create mine --type v6e-8 --zone us-east5-b --spot
#   scripts/tpu_vm.sh setup  mine --zone us-east5-b
#   scripts/tpu_vm.sh run    mine --zone us-east5-b --bucket gs://my-bucket -- --config configs/qwen3_1.7b.yaml
#   scripts/tpu_vm.sh status|logs|delete mine --zone us-east5-b
#
# Options: --type TYPE (create: v6e-8, v5litepod-8, v5p-8, v4-8, or a larger slice), --spot (create), --zone ZONE
# (default: that of gcloud), --bucket gs://… (run: the output_dir is copied there every minute and when the run ends,
# and fetched from there first: after a preemption create, setup and the same run continue), --output_dir DIR (run: of
# a slice with several hosts, on a disk that all of them see, such as Filestore), --dry_run (print the commands that
# would change anything, and run nothing).
# Needs: gcloud with a project and the TPU API. What is committed in this repository is what runs there.
set -euo pipefail

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2; }
die() { echo "Error: $*" >&2; exit 2; }

[[ $# -ge 2 ]] || usage
action=$1 name=$2 type='' zone='' bucket='' output='' spot=() dry='' train=()
shift 2
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || die "NAME must be lower-case letters, digits and dashes, got '$name'"
while [[ $# -gt 0 ]]; do
  case $1 in
    --type | --zone | --bucket | --output_dir)
      [[ $# -ge 2 ]] || die "$1 needs a value"
      case $1 in --type) type=$2 ;; --zone) zone=$2 ;; --bucket) bucket=$2 ;; *) output=$2 ;; esac
      shift 2 ;;
    --spot) spot=(--spot); shift ;;
    --dry_run) dry=yes; shift ;;
    --) shift; train=("$@"); break ;;
    *) die "unknown option '$1'; options of the training go after --" ;;
  esac
done
in_zone=(${zone:+"--zone=$zone"})

# Print a command as a shell reads it, and run it unless this is a dry run.
change() {
  printf '%q ' "$@" | sed 's/ $//'
  echo
  [[ -n $dry ]] || "$@"
}

# A command on the workers of the slice.
on() { change gcloud compute tpus tpu-vm ssh "$name" "${in_zone[@]}" "--worker=$1" "--command=$2"; }

# Every host has four chips; v6e and v5e also come as one host of eight. v4 and v5p count two cores a chip.
one_host() { [[ $1 =~ ^(v6e|v5litepod)-(1|4|8)$ || $1 =~ ^(v4|v5p)-8$ ]]; }

accelerator() { gcloud compute tpus tpu-vm describe "$name" "${in_zone[@]}" --format='value(acceleratorType)'; }

case $action in
  create)
    case $type in
      v6e-*) version=v2-alpha-tpuv6e ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v4-*) version=tpu-ubuntu2204-base ;;
      *) die "--type must be v6e-N, v5litepod-N, v5p-N or v4-N, got '$type'" ;;
    esac
    state=none
    if [[ -z $dry ]]; then
      state=$(gcloud compute tpus queued-resources describe "$name" "${in_zone[@]}" --format='value(state.state)' 2>/dev/null) || state=none
    fi
    case $state in
      none) ;;
      SUSPENDED | SUSPENDING | FAILED) # preempted, or refused
        change gcloud compute tpus queued-resources delete "$name" "${in_zone[@]}" --force --quiet ;;
      *) echo "$name is there already: $state"; exit 0 ;;
    esac
    change gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${in_zone[@]}" \
      "--accelerator-type=$type" "--runtime-version=$version" "${spot[@]}"
    ;;
  setup)
    archive=${TMPDIR:-/tmp}/grpo_jax.tar.gz
    change git -C "$(dirname "$0")/.." archive --format=tar.gz -o "$archive" HEAD
    change gcloud compute tpus tpu-vm scp "$archive" "$name:grpo_jax.tar.gz" "${in_zone[@]}" --worker=all
    # shellcheck disable=SC2016  # the hosts expand it
    on all 'set -e; mkdir -p grpo_jax; tar xzf grpo_jax.tar.gz -C grpo_jax; cd grpo_jax; export PATH=$HOME/.local/bin:$PATH; command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; [ -d .venv ] || uv venv --python 3.11 .venv; uv pip install --python .venv/bin/python -e ".[tpu]"; .venv/bin/python -c "import jax; print(jax.__version__)"'
    ;;
  run)
    [[ ${#train[@]} -gt 0 ]] || die "run needs the options of the training after --, as -- --config configs/x.yaml"
    [[ -z $bucket || $bucket == gs://* ]] || die "--bucket must begin with gs://, got '$bucket'"
    [[ -z $bucket || -z $output ]] || die "--bucket and --output_dir exclude each other"
    out=${output:-runs/$name}
    if [[ -z $dry && -z $output ]] && ! one_host "$(accelerator)"; then
      die "a slice with several hosts needs --output_dir on a disk that all of them see, such as Filestore"
    fi
    command=(.venv/bin/python -m grpo_jax.train "${train[@]}" --output_dir "$out")
    [[ -z $bucket ]] || command=(bash scripts/with_bucket.sh "${bucket%/}/$name" "$out" -- "${command[@]}")
    # in braces: a cd in the background would keep ssh waiting
    on all "cd grpo_jax && { GRPO_JAX_DISTRIBUTED=1 nohup $(printf '%q ' "${command[@]}")>> $name.log 2>&1 < /dev/null & }"
    echo "Follow it with: $0 logs $name${zone:+ --zone $zone}"
    ;;
  status)
    change gcloud compute tpus queued-resources describe "$name" "${in_zone[@]}" '--format=value(state.state)'
    on 0 "tail -n 3 grpo_jax/$name.log" ;;
  logs) on 0 "tail -n 200 -f grpo_jax/$name.log" ;;
  delete) change gcloud compute tpus queued-resources delete "$name" "${in_zone[@]}" --force --quiet ;;
  *) usage ;;
esac
