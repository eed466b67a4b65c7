"""report.html: a run's curves and conversations in one file that needs no network.

    python -m grpo_jax.report runs/quickstart

`train` writes it when it ends or is stopped by Ctrl-C; the command does so at any time, also while a run is in progress.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grpo_jax.files import whole_lines, write_text_atomic
from grpo_jax.run.log import interval_text, read_summary
from grpo_jax.run.options import GRPOConfig
from grpo_jax.scoring.evaluation import FIGURES
from grpo_jax.scoring.rewards import ROW_COLUMNS

WINDOW = 10  # updates of a running mean
WIDTH = 10.0  # inches of a picture
# panel -> the metrics in it; metrics that a run never wrote are left out, and so is a panel without any
PANELS = {
    "entropy, nats": ("entropy",),
    "KL to the reference, nats": ("kl",),
    "sampled tokens per completion": (
        "completions/min_length",
        "completions/mean_length",
        "completions/max_length",
    ),
    "tool calls per completion, and share of failures": ("tools/call_frequency", "tools/failure_frequency"),
    "share of completions ended by the model, and grounded": (
        "completions/turn_closed",
        "completions/answer_grounded",
    ),
    "share of groups with equal rewards, and of wasted groups": (
        "frac_reward_zero_std",
        "rollout/wasted_groups",
    ),
    "gradient norm": ("grad_norm",),
    "seconds per update": ("step_time",),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
svg { max-width: 100%; height: auto } pre { white-space: pre-wrap; margin: 0; font-size: 13px }
details { margin: .3rem 0 } summary { cursor: pointer } .who { color: #777; width: 6rem }
"""


def write_report(output_dir: str | Path) -> Path:
    """Write report.html from what a run has left so far.

    Raises:
        FileNotFoundError: when the folder holds no run.
    """
    folder = Path(output_dir)
    lines, summary = read_run(folder)
    title = html.escape(f"{folder.absolute().name}: {len(lines)} updates")
    parts, changed = [f"<h1>{title}</h1>"], changed_options(folder / "resolved_config.yaml")
    options = f"{len(changed)} options that are not the defaults"
    parts.append(f"<details><summary>{options}</summary>{_table(changed)}</details>" if changed else "")
    if shown := {when: summary[when] for when in ("before", "after") if summary.get(when)}:
        figure = _figure(2.6)
        for axes, name in zip(figure.subplots(1, len(FIGURES)), FIGURES, strict=True):
            draw_figure(axes, summary, name)
        names = next(iter(shown.values()))["intervals"]
        rows = [("", *shown), *((name, *(interval_text(s, name) for s in shown.values())) for name in names)]
        rows.append(("rows", *(s["n"] for s in shown.values())))
        parts += ["<h2>Evaluation</h2>", _table(rows) + _svg(figure)]
    parts += ["<h2>Training</h2>", _svg(_curves(lines))]
    if "timings" in summary:
        total = sum(summary["timings"].values())
        seconds = {phase: s for phase, s in summary["timings"].items() if s >= 0.005 * total}
        figure = _figure(0.6 + 0.3 * len(seconds))
        axes = figure.add_subplot()
        axes.bar_label(axes.barh(list(seconds), list(seconds.values()), color="C0"), fmt="%.0f s", padding=3)
        axes.invert_yaxis()
        axes.set(xlabel="seconds")
        parts += ["<h2>Time</h2>", _svg(figure)]
    parts += ["<h2>Conversations</h2>", *_conversations(folder / "rollouts")]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    path = folder / "report.html"
    write_text_atomic(
        path, f"<!doctype html>\n<html><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    return path


def write_missing_report(out: Path) -> None:
    """Write the report of a finished run that was killed before it did."""
    report, summary = out / "report.html", out / "summary.json"
    late = not report.exists() or report.stat().st_mtime_ns < summary.stat().st_mtime_ns
    if late and (out / "metrics.jsonl").exists():
        write_report(out)


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(metrics.jsonl's lines, summary.json) of a run; the summary is empty before the first evaluation."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl; name the output_dir of a run")
    return list(map(json.loads, whole_lines(metrics))), read_summary(folder)


# --- pictures ---


def draw_rewards(axes, lines: Sequence[dict[str, Any]]) -> None:
    """The mean reward of every batch, and its running mean."""
    steps, rewards = _series(lines, "reward")
    axes.plot(steps, rewards, color="0.75", label="batch mean")
    width = min(WINDOW, len(rewards))
    if width:
        smooth = np.convolve(rewards, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color="C0", label=f"mean of {width}")
    axes.set(xlabel="update", ylabel="reward")
    axes.legend(loc="lower right")


def draw_figure(axes, summary: dict[str, Any], figure: str) -> None:
    """One of the evaluation's figures before and after, with 95 % intervals."""
    for i, when in enumerate(("before", "after")):
        seen = summary.get(when)
        if not seen or seen.get(figure) is None:
            continue
        value, interval, error = seen[figure], seen["intervals"][figure], None
        if interval is not None:
            error = [[max(value - interval[0], 0)], [max(interval[1] - value, 0)]]
        axes.bar(i, value, yerr=error, color=("0.75", "C0")[i], capsize=4)
        axes.text(i, 0.03, f"{value:.2f}", ha="center")
    axes.set(xticks=(0, 1), xticklabels=("before", "after"), xlim=(-0.6, 1.6), ylim=(0, 1.05))
    axes.set_title(figure, fontsize=10)


def _curves(lines):
    names = {key for line in lines for key in line}
    panels = {title: [m for m in metrics if m in names] for title, metrics in PANELS.items()}
    means = sorted(n for n in names if n.startswith("rewards/") and n.endswith("/mean"))
    panels["rewards"] = means if len(means) > 1 else []
    ends = sorted(n for n in names if n.startswith("status/"))
    panels["how completions ended, share"] = [n for n in ends if any(line.get(n) for line in lines)]
    panels["evaluation"] = [f"eval/{name}" for name in FIGURES if f"eval/{name}" in names]
    panels["evaluation, sampled"] = sorted(n for n in names if n.startswith(("eval/mean@", "eval/pass@")))
    panels = {title: metrics for title, metrics in panels.items() if metrics}
    rows = 1 + -(-len(panels) // 2)
    figure = _figure(2.6 * rows)
    grid = figure.add_gridspec(rows, 2)
    draw_rewards(figure.add_subplot(grid[0, :]), lines)
    for i, (title, metrics) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[1 + i // 2, i % 2])
        for metric in metrics:
            steps, values = _series(lines, metric)
            axes.plot(steps, values, label=metric.split("/", 1)[-1].removesuffix("/mean"), linewidth=1)
        axes.set_title(title, fontsize=10)
        if len(metrics) > 1:
            axes.legend(fontsize=8)
    return figure


def _figure(height: float):
    from matplotlib.figure import Figure  # 0.4 s to import; no window is ever opened

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _series(lines, name):
    """Steps and values of a metric, where it is a number."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps), np.array(values, float)


def _svg(figure) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grpo_jax"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    return text.getvalue()[text.getvalue().index("<svg") :]


# --- text ---


def changed_options(path: Path) -> list[tuple[str, str]]:
    """The options of a resolved_config.yaml that are not the defaults, as JSON; none where there is no file."""
    if not path.is_file():
        return []
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    default = GRPOConfig()
    return [(k, json.dumps(v)) for k, v in given.items() if v != getattr(default, k, None)]


def _conversations(folder: Path) -> list[str]:
    """The row of lowest, middle and highest reward of the first, middle and last update."""
    files = sorted(folder.glob("step_*.jsonl"))
    parts = []
    for i in sorted({0, len(files) // 2, len(files) - 1}) if files else ():
        rows = list(map(json.loads, whole_lines(files[i])))
        rows.sort(key=lambda row: sum(value or 0 for value in row["rewards"].values()))
        parts.append(f"<h3>Update {int(files[i].stem.removeprefix('step_'))}</h3>")
        parts += [_conversation(rows[j]) for j in sorted({0, len(rows) // 2, len(rows) - 1})]
    return parts or ["<p>No rollouts yet.</p>"]


def _conversation(row: dict[str, Any]) -> str:
    said = [("user", row["prompt"])]
    for message in row["messages"]:
        parts = [message.get("reasoning_content"), message.get("content")]
        parts += [
            json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()
        ]
        said.append((message["role"], "\n".join(part for part in parts if part)))
    said += [("answer", row["answer"]), ("status", row["status"]), ("advantage", f"{row['advantage']:+.3f}")]
    said += [(name, value) for name, value in row.items() if name not in ROW_COLUMNS]  # from log_extra
    rewards = ", ".join(f"{name} {'–' if value is None else value}" for name, value in row["rewards"].items())
    table = "".join(
        f'<tr><td class="who">{html.escape(who)}</td><td><pre>{html.escape(str(text))}</pre></td></tr>'
        for who, text in said
    )
    heading = html.escape(f"{rewards}: {row['prompt'][:100]}")
    return f"<details><summary>{heading}</summary><table>{table}</table></details>"


def _table(rows: Sequence[Sequence[Any]]) -> str:
    cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
