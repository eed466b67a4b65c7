#!/usr/bin/env bash
# One task on each node of a Slurm cluster; the job is requeued until the run is finished.
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 jobs/slurm.sh --config configs/qwen3_8b_lora.yaml --output_dir /shared/mine
#
# Submit it from the repository's root with the environment activated; data and output_dir must be on a disk that all nodes see.
# A minute before the time limit, and when it is preempted, the run saves and ends with status 130.
#SBATCH --job-name=grpo_jax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=grpo_jax-%j.log
set -uo pipefail

srun --kill-on-bad-exit=0 python -m grpo_jax.train "$@"
status=$?
# 130: stopped and saved. 143: srun itself received SIGTERM.
if [[ $status == 130 || $status == 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
