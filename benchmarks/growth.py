"""How a step's time grows with the preamble, the rows, the completions and the tool turns.

    python benchmarks/growth.py > growth.md         # about 10 minutes on 2 idle cores; draws docs/growth.png

One length varies at a time. The model has 4 layers of width 128 and 4,096 vocabulary rows; tool turns are
scripted: 32 tokens are sampled, a response of 32 tokens is fed, and so on. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from job import Shape, ToolTurns, make_job, narrow
from step import RunningStep, timed

from grpo_jax.models.cost import Lengths

TURN = 32  # tokens that are sampled in a turn, and tokens of a tool response
BASE = Shape(narrow(4096), Lengths(P=4, G=8, T0=1500, T1=20, T2=64), remat=False)
SWEEPS = {
    "preamble": (300, 750, 1500, 3000, 6000),
    "rows": (8, 16, 32, 64, 128),
    "completion": (32, 64, 128, 256),
    "tool turns": (0, 1, 2, 3),
}
QUICK_BASE = Shape(narrow(700, L=1), Lengths(P=1, G=8, T0=100, T1=20, T2=16), remat=False)
QUICK_SWEEPS = {"preamble": (50, 100), "rows": (8, 16), "completion": (16, 32), "tool turns": (0, 1)}
PARTS = ("prefill", "decode", "update")


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement: what was changed to what value, the job, and the seconds of each part."""

    sweep: str
    value: int
    shape: Shape
    turns: ToolTurns
    seconds: dict[str, float]

    @property
    def rollout(self) -> float:
        """Seconds of prefill and decode, tool responses included."""
        return self.seconds["prefill"] + self.seconds["decode"]


def changed(base: Shape, sweep: str, value: int) -> tuple[Shape, ToolTurns]:
    """The base shape with one thing set to a value."""
    x, turns = base.lengths, ToolTurns()
    if sweep == "preamble":
        x = dataclasses.replace(x, T0=value)
    elif sweep == "rows":
        x = dataclasses.replace(x, P=value // x.G)
    elif sweep == "completion":
        x = dataclasses.replace(x, T2=value)
    else:
        x, turns = dataclasses.replace(x, T2=(2 * value + 1) * TURN), ToolTurns(value, TURN)
    return dataclasses.replace(base, lengths=x), turns


def measure(shape: Shape, turns: ToolTurns, repeats: int) -> dict[str, float]:
    """Median seconds of each part, without compilation."""
    running = RunningStep(make_job(shape, turns))
    parts = {name: getattr(running, name) for name in ("export", *PARTS)}
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats + 1):
        for name, part in parts.items():
            seconds[name].append(timed(part)[0])
    jax.clear_caches()  # every point compiles its own programs
    return {name: statistics.median(seconds[name][1:]) for name in PARTS}


def markdown(points: list[Point]) -> str:
    """The table of docs/performance.md."""
    lines = [
        "| changed | preamble | rows | completion | tool turns | prefill s | decode s | update s | all s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        x = p.shape.lengths
        cells = [p.sweep, x.T0, x.B, x.T2, p.turns.count]
        cells += [f"{p.seconds[part]:.3f}" for part in PARTS] + [f"{sum(p.seconds.values()):.3f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(points: list[Point], png: Path) -> None:
    """One panel per sweep: seconds of rollout and update."""
    sweeps = list(dict.fromkeys(p.sweep for p in points))
    figure, panels = plt.subplots(1, len(sweeps), figsize=(3 * len(sweeps), 3), layout="constrained")
    for axes, sweep in zip(panels, sweeps, strict=True):
        chosen = [p for p in points if p.sweep == sweep]
        values = [p.value for p in chosen]
        axes.plot(values, [p.rollout for p in chosen], "o-", label="rollout")
        axes.plot(values, [p.seconds["update"] for p in chosen], "s-", label="update")
        axes.set(xlabel=sweep if sweep in ("rows", "tool turns") else f"{sweep} tokens", xlim=0, ylim=0)
        if sweep == "tool turns":
            axes.set(xlim=(-0.2, None), xticks=values)
    panels[0].set(ylabel="seconds")
    panels[0].legend()
    figure.savefig(png, dpi=110)


def main() -> None:
    """Measure every point, print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--png", type=Path, default=Path("docs/growth.png"), help="picture to write")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs after the first (default 3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    args = parser.parse_args()
    base, sweeps = (QUICK_BASE, QUICK_SWEEPS) if args.quick else (BASE, SWEEPS)
    points = []
    for sweep, values in sweeps.items():
        for value in values:
            shape, turns = changed(base, sweep, value)
            points.append(Point(sweep, value, shape, turns, measure(shape, turns, args.repeats)))
            print(f"{sweep} {value}: {sum(points[-1].seconds.values()):.3f} s", file=sys.stderr)
    print(markdown(points))
    draw(points, args.png)


if __name__ == "__main__":
    main()
