"""What surviving costs on the quickstart: checkpoints, a restart, SIGTERM. Run it on a quiet machine, about 6 minutes.

    python benchmarks/survival.py [--updates 40] [--output_dir DIR]

Prints, of GRPO without evaluation from a cold-started model, with a warm compile cache:
1. seconds of the loop without checkpoints and with one every ten updates, twice each in turn (asked: 5 % more);
2. seconds from the start of the command that continues to its first update (asked: 15);
3. seconds from SIGTERM in an update's rollout to the end (asked: 10).
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(out: Path, *flags: str) -> subprocess.Popen:
    """The quickstart's command with other flags."""
    command = [sys.executable, "-m", "grpo_jax.train", "--config", "configs/quickstart.yaml"]
    command += ["--logging_steps", "1", "--eval_dataset_id_or_path", "none", "--output_dir", str(out), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def updates(process: subprocess.Popen, last: int | None = None) -> dict[int, float]:
    """When each update was reported, up to `last` or to the end of the process; seconds of a monotonic clock."""
    seen: dict[int, float] = {}
    for line in process.stdout or ():
        if found := re.match(r"update (\d+)/", line):
            seen[int(found[1])] = time.monotonic()
            if last in seen:
                break
    return seen


def loop_seconds(out: Path, *flags: str) -> float:
    """From the first update's report to the last one's."""
    shutil.rmtree(out, ignore_errors=True)
    process = start(out, *flags)
    seen = updates(process)
    if process.wait():
        raise SystemExit(f"the run in {out} ended with status {process.returncode}")
    return max(seen.values()) - seen[1]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--output_dir", type=Path, default=None)
    args = parser.parse_args()
    folder = (args.output_dir or Path(tempfile.mkdtemp(prefix="survival_"))).absolute()
    begun = start(folder / "first", "--max_steps", "1")  # for its cold start
    updates(begun)
    begun.wait()
    flags = ["--model_name_or_path", str(folder / "first/cold_start"), "--cold_start", "false"]
    flags += ["--max_steps", str(args.updates)]

    took = {"no": [], "steps": []}
    loop_seconds(folder / "no", *flags, "--save_strategy", "no")  # compiles
    for _ in range(2):
        for strategy, seconds in took.items():
            seconds.append(
                loop_seconds(folder / strategy, *flags, "--save_strategy", strategy, "--save_steps", "10")
            )
    without, with_ = (min(seconds) for seconds in took.values())
    print(
        f"loop of {args.updates} updates: {took['no']} s without checkpoints, {took['steps']} s with one every 10"
    )
    print(f"checkpoints: {with_ / without - 1:+.1%} of the time (asked: 5 %)", flush=True)

    out = folder / "stopped"
    process = start(out, *flags, "--save_steps", "10")
    updates(process, 12)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    print(
        f"SIGTERM: {time.monotonic() - began:.1f} s, status {process.returncode} (asked: 10 s, 130)",
        flush=True,
    )
    began = time.monotonic()
    process = start(out, *flags, "--save_steps", "10")
    first = next(iter(updates(process, 13).items()))
    print(f"restart: {first[1] - began:.1f} s to update {first[0]} (asked: 15 s)")
    process.send_signal(signal.SIGTERM)
    process.communicate()


if __name__ == "__main__":
    main()
