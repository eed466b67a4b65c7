"""A golden run: four updates of small jobs, hashed, so that a refactoring shows that it changed no bit.

    python scripts/golden_run.py            # one line a job: the hashes of metrics.jsonl and of the weights

Run it on one machine before and after a change and compare the lines. Times are left out of the metrics.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLAIN_KL = ("--use_bias_correction_kl", "false")
JOBS = {
    "plain": [],
    "kl": ["--beta", "0.04", *PLAIN_KL, "--num_iterations", "2"],
    "parts": ["--micro_batches", "4", "--loss_type", "dr_grpo", "--importance_sampling_level", "sequence"],
    "lora": ["--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0.1", "--beta", "0.04", *PLAIN_KL],
    "quantile": ["--top_entropy_quantile", "0.5", "--micro_batches", "2", "--scale_rewards", "batch"],
    "cold": ["--cold_start", "true", "--sft_max_steps", "4", "--mask_truncated_completions", "true"],
}
# varies between the completions of an untrained model, so that every update has advantages
REWARD = """
def reward_func(completions, completion_ids, **kwargs):
    return [sum(ids) % 11 / 11 for ids in completion_ids]
"""
COMMON = ["--config", "configs/smoke.yaml", "--max_steps", "4", "--eval_steps", "2", "--cold_start", "false"]


def digest(chunks) -> str:
    """The first 16 digits of a SHA-256."""
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()[:16]


def metrics_lines(path: Path):
    """The lines of metrics.jsonl without the times."""
    for line in path.read_text(encoding="utf-8").splitlines():
        values = {name: value for name, value in json.loads(line).items() if name != "step_time"}
        yield json.dumps(values, sort_keys=True).encode()


def main() -> None:
    """Run every job, or those named, and print its hashes."""
    for name in sys.argv[1:] or JOBS:
        with tempfile.TemporaryDirectory() as folder:
            reward = Path(folder) / "checksum.py"
            reward.write_text(REWARD)
            command = [sys.executable, "-m", "grpo_jax.train", *COMMON, *JOBS[name], "--output_dir", folder]
            command += ["--reward_fn", str(reward)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            metrics = digest(metrics_lines(Path(folder) / "metrics.jsonl"))
            rollouts = digest(p.read_bytes() for p in sorted(Path(folder).glob("rollouts/*.jsonl")))
            weights = digest(p.read_bytes() for p in sorted(Path(folder).glob("model/*.safetensors")))
        print(f"{name:<10} metrics {metrics}  rollouts {rollouts}  weights {weights}", flush=True)


if __name__ == "__main__":
    main()
