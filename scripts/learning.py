"""What the choices of GRPO do on the quickstart's job: runs every row of docs/learning.md and writes its tables.

    python scripts/learning.py runs/learning                 # all rows and seeds; continues what was interrupted
    python scripts/learning.py runs/learning loss_type       # the rows whose names begin so
    python scripts/learning.py runs/learning --table         # docs/learning.md from the runs that are finished

All rows of a seed start from the same cold start, except where a row says otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rewards.math_answer_reward import math_answer_reward

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/learning.md"
MARK = "<!-- written by scripts/learning.py --table -->"
SEEDS = (1, 2, 3)
WINDOW = 5  # updates over which a sampled figure is averaged, as one batch holds only 16 prompts
REACHED = 0.9

SPENT = "processor_seconds.json"  # in a run's folder: of its process and workers, which other work does not change

QUICKSTART = "configs/quickstart.yaml"
TWO_STEP = "configs/two_step.yaml"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        options: those that differ from the config's.
        config: of the run, which names its cold start too.
    """

    options: Mapping[str, Any]
    config: str = QUICKSTART


ROWS = {
    "quickstart": Row({}),
    **{
        f"loss_type {loss}": Row({"loss_type": loss} | more)
        for loss, more in {
            "grpo": {},
            "bnpo": {},
            "dr_grpo": {},
            "cispo": {"epsilon_high": 5.0},
            "sapo": {},
            "luspo": {"importance_sampling_level": "sequence"},
            "vespo": {},
        }.items()
    },
    "loss_type dapo, 2 iterations": Row({"num_iterations": 2}),
    "loss_type cispo, 2 iterations": Row({"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2}),
    "advantage_estimator loo": Row({"advantage_estimator": "loo"}),
    "advantage_estimator none": Row({"advantage_estimator": "none", "scale_rewards": "none"}),
    "scale_rewards batch": Row({"scale_rewards": "batch"}),
    "scale_rewards none": Row({"scale_rewards": "none"}),
    "dynamic_sampling, 60 updates": Row({"dynamic_sampling": True, "max_steps": 60}),
    "dynamic_sampling": Row({"dynamic_sampling": True}),
    "difficulty_sampling": Row({"difficulty_sampling": True}),
    "reward accuracy": Row({"reward_fn": ["accuracy"]}),
    "reward math_reward": Row({"reward_fn": ["rewards/math_reward.py"]}),
    "reward math_reward + grounded": Row({"reward_fn": ["rewards/math_reward.py", "grounded"]}),
    "reward math_reward + grounded, each normalised": Row(
        {
            "reward_fn": ["rewards/math_reward.py", "grounded"],
            "multi_objective_aggregation": "normalize_then_sum",
        }
    ),
    "two calls": Row({}, TWO_STEP),
    "two calls, turn credit": Row(
        {"reward_fn": ["rewards/multi_step_reward.py", "rewards/turn_reward.py"], "turn_advantage_coef": 0.5},
        TWO_STEP,
    ),
}


def run(command: str, config: str, out: Path, options: Mapping[str, Any]) -> None:
    """A command of the package, which does nothing where it has finished already.

    Raises:
        SystemExit: it failed; its output is in OUT.log.
    """
    argv = [sys.executable, "-m", f"grpo_jax.{command}", "--config", config, "--output_dir", str(out)]
    for name, value in options.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value).lower()])]
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    print(f"{out.name}: {' '.join(argv[2:])}", flush=True)
    before = seconds_of_children()
    with log.open("w") as file:
        if status := subprocess.run(argv, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode:
            sys.exit(f"{out.name}: exit status {status}; see {log}")
    (out / SPENT).write_text(json.dumps(seconds_of_children() - before) + "\n")


def seconds_of_children() -> float:
    """Processor seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def slug(name: str) -> str:
    """A row's name as that of its folder."""
    return "".join(c if c.isalnum() else "_" for c in name)


def make(folder: Path, name: str, seed: int) -> None:
    """One run of a row, and its seed's cold start where that is not there."""
    row = ROWS[name]
    cold = folder / f"cold_{Path(row.config).stem}_{seed}"
    if not (cold / "sft.json").exists():
        run("sft", row.config, cold, {"seed": seed})
    out = folder / f"{slug(name)}_{seed}"
    if not finished(out):
        start = {"seed": seed, "cold_start": False, "model_name_or_path": str(cold / "model")}
        run("train", row.config, out, start | dict(row.options))


def finished(out: Path) -> bool:
    """Whether a run has its last evaluation."""
    path = out / "summary.json"
    return path.exists() and json.loads(path.read_text()).get("after") is not None


def figures(out: Path) -> dict[str, float]:
    """What the tables show of one finished run."""
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    right = [right_share(out, line["step"]) for line in lines]
    means = [mean(right[i + 1 - WINDOW : i + 1]) for i in range(WINDOW - 1, len(right))]
    reached = next((i + WINDOW for i, value in enumerate(means) if value >= REACHED), None)
    found = {f"{name} {when}": summary[when][name] for when in ("before", "after") for name in SHOWN}
    rollouts = mean(line.get("rollout/rounds", 1) for line in lines)
    spent = json.loads((out / SPENT).read_text())
    return found | {
        "rollouts": rollouts, "updates": reached, "wasted": mean(zero_spread(lines)), "seconds": spent,
    }  # fmt: skip


SHOWN = ("exact_answer_match", "answer_grounded")
COLUMNS = {  # figure: its title in the table, its digits
    "exact_answer_match before": ("exact before", 3),
    "exact_answer_match after": ("exact after", 3),
    "answer_grounded before": ("grounded before", 3),
    "answer_grounded after": ("grounded after", 3),
    "updates": ("updates to 0.9", 0),
    "seconds": ("processor seconds", 0),
    "rollouts": ("rollouts", 2),
    "wasted": ("wasted", 2),
}


def right_share(out: Path, step: int) -> float:
    """Share of an update's completions with the right result, told to the user: the quickstart's reward of 1."""
    rows = [json.loads(x) for x in (out / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()]
    columns = [[row[name] for row in rows] for name in ("messages", "answer", "status")]
    return mean(float(reward == 1.0) for reward in math_answer_reward(*columns))


def zero_spread(lines: list[dict[str, Any]]) -> list[float]:
    """Share of groups whose rewards were equal, by update."""
    return [line.get("rollout/wasted_groups", line["frac_reward_zero_std"]) for line in lines]


def shown(values: list[float | None], digits: int) -> str:
    """Mean and range over the seeds; "–" where a seed has no such figure."""
    if any(value is None for value in values):
        there = [value for value in values if value is not None]
        return f"{len(there)} of {len(values)} seeds" + (f": {shown(there, digits)}" if there else "")
    low, high = min(values), max(values)
    return f"{mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(folder: Path, written: str) -> str:
    """The rows of which every seed is finished, as Markdown.

    Args:
        written: the table so far, whose other rows stay: their runs may be in another folder, or gone.
    """
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in written.splitlines() if " | " in line}
    head = ["row", "options", *(title for title, _ in COLUMNS.values())]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in ROWS.items():
        outs = [folder / f"{slug(name)}_{seed}" for seed in SEEDS]
        if not all(map(finished, outs)):
            lines += [kept[name]] if name in kept else []
            continue
        of_seeds = [figures(out) for out in outs]
        cells = [shown([one[column] for one in of_seeds], digits) for column, (_, digits) in COLUMNS.items()]
        given = ", ".join(f"`{option}: {value}`" for option, value in row.options.items()) or "–"
        lines.append(f"| {' | '.join([name, given, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Run rows, or write the page's table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument("names", nargs="*", help="beginnings of rows' names; all rows without")
    parser.add_argument("--table", action="store_true", help="write the table into docs/learning.md")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    args = parser.parse_args()
    if args.table:
        before, written, after = PAGE.read_text(encoding="utf-8").split(MARK)
        made = table(args.folder, written)
        PAGE.write_text(f"{before}{MARK}\n\n{made}\n\n{MARK}{after}", encoding="utf-8")
        return
    chosen = [name for name in ROWS if not args.names or name.startswith(tuple(args.names))]
    for seed in args.seeds:
        for name in chosen:
            make(args.folder, name, seed)


if __name__ == "__main__":
    main()
