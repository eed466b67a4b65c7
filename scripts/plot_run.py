"""Draws a run's reward curve: `python scripts/plot_run.py runs/quickstart docs/quickstart.png`.

Needs matplotlib (`pip install -e ".[plot]"`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def main() -> None:
    """Read metrics.jsonl and summary.json of a run and write one PNG."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="output_dir of a run")
    parser.add_argument("png", type=Path, help="picture to write")
    args = parser.parse_args()
    lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "reward" in line]
    rewards = np.array([line["reward"] for line in lines if "reward" in line])
    summary = json.loads((args.run / "summary.json").read_text())
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8, 3), gridspec_kw={"width_ratios": [3, 1]}, layout="constrained"
    )
    width = min(10, len(rewards))
    left.plot(steps, rewards, color="0.75", label="batch mean")
    smooth = np.convolve(rewards, np.ones(width) / width, mode="valid")
    left.plot(steps[width - 1 :], smooth, color="C0", label=f"mean of {width}")
    left.set(xlabel="update", ylabel="reward", ylim=(0, 1.02))
    left.legend(loc="lower right")
    _bars(right, summary)
    figure.savefig(args.png, dpi=110)


def _bars(axes, summary: dict) -> None:
    """exact_answer_match before and after, with 95 % intervals."""
    for i, when in enumerate(("before", "after")):
        value = summary[when]["exact_answer_match"]
        low, high = summary[when]["intervals"]["exact_answer_match"]
        axes.bar(i, value, yerr=[[value - low], [high - value]], color=("0.75", "C0")[i], capsize=4)
        axes.text(i, 0.03, f"{value:.2f}", ha="center")
    axes.set(xticks=(0, 1), xticklabels=("before", "after"), ylim=(0, 1.02), title="exact answers")


if __name__ == "__main__":
    main()
