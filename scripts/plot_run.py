"""Draws a run's reward curve and two of its figures: `python scripts/plot_run.py runs/quickstart docs/quickstart.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from grpo_jax.run.report import draw_figure, draw_rewards, read_run


def main() -> None:
    """Read metrics.jsonl and summary.json of a run and write one PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run")
    parser.add_argument("png", type=Path, help="picture to write")
    args = parser.parse_args()
    lines, summary = read_run(args.run)
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, *right = figure.subplots(1, 3, gridspec_kw={"width_ratios": [3, 1, 1]})
    draw_rewards(left, lines)
    for axes, name in zip(right, ("exact_answer_match", "answer_grounded"), strict=True):
        draw_figure(axes, summary, name)
    figure.savefig(args.png, dpi=110)


if __name__ == "__main__":
    main()
