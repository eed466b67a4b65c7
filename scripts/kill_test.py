"""Kill a run at random moments until it is finished, and compare it with one that was left alone.

    python scripts/kill_test.py --kills 25 --seed 1 --output_dir /tmp/kills

A short job with a cold start, tools in worker processes, evaluations and a checkpoint after every second update
is run once without interruption. Then the same command is started again and again in a second folder. Each start
is killed in a phase that is drawn (one of PHASES), at a drawn fraction of the time that the phase took in the first
run, by SIGKILL of its process group, or one time in five by SIGTERM. When the run is finished before there were
enough kills, another begins in a third folder.

Of each stop: no tool worker is left after five seconds; SIGTERM ends within ten seconds with status 130, and the
update that it calls saved is there. Of each finished run: weights, metrics.jsonl (but for `step_time`), rollouts and
summary.json (but for its timings) are those of the first, and report.html is whole. Exit status 1 where one is not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[1]
PHASES = ("start", "cold_start", "evaluate", "rollout", "reward", "update", "save")
ONCE = ("start", "cold_start")  # begin once a start; the others many times
GRACE = 10.0  # seconds from SIGTERM to the end
MARK = "GRPO_JAX_KILL_TEST"  # variable by which the processes of a run are known

# The command, saying each phase as it begins, and with every turn that ends read as a call, so that tools run.
CHILD = """
import os, sys
from grpo_jax.rollout.conversation import Conversation
from grpo_jax.run.log import PhaseTimer
from grpo_jax.types import ParsedTurn, ToolCall
said, timed = os.fdopen(int(sys.argv.pop(1)), "w", buffering=1), PhaseTimer.__call__
def call(self, phase):
    said.write(phase + "\\n")
    return timed(self, phase)
def parse(self, ids, schemas):
    return ParsedTurn("", None, (ToolCall("add", {"a": len(ids), "b": sum(ids) % 97}),), None)
PhaseTimer.__call__, Conversation.parse = call, parse
from grpo_jax import train
sys.exit(train.main(sys.argv[1:]))
"""


@dataclasses.dataclass(frozen=True)
class Kill:
    """When and how to kill: at `fraction` of the `nth` time that a phase runs."""

    phase: str
    nth: int
    fraction: float
    signal: signal.Signals


def start(flags: list[str], folder: Path) -> tuple[subprocess.Popen, int]:
    """The command in a new process group, and the pipe that it says its phases into."""
    reading, writing = os.pipe()
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(writing), *flags, "--output_dir", str(folder)],
            cwd=ROOT, stdout=log, stderr=log, pass_fds=(writing,), start_new_session=True,
            env=os.environ | {MARK: str(folder), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    os.close(writing)
    return process, reading


def phases(pipe: int, until: float):
    """The phases as they begin, until a moment or the end of the process."""
    text = b""
    while (left := until - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
        if not (chunk := os.read(pipe, 4096)):
            return
        *whole, text = (text + chunk).split(b"\n")
        yield from (phase.decode() for phase in whole)


def whole_run(flags: list[str], folder: Path) -> dict[str, list[float]]:
    """Run without a kill; the seconds between one phase's beginning and the next one's."""
    began = {"start": [time.monotonic()]}
    process, pipe = start(flags, folder)
    took: dict[str, list[float]] = {}
    last = "start"
    for phase in phases(pipe, time.monotonic() + 1800):
        now = time.monotonic()
        took.setdefault(last, []).append(now - began[last][-1])
        began.setdefault(phase, []).append(now)
        last = phase
    took.setdefault(last, []).append(time.monotonic() - began[last][-1])
    os.close(pipe)
    if process.wait():
        raise SystemExit(f"the uninterrupted run ended with {process.returncode}; see {folder}.log")
    return took


def processor_seconds(pid: int) -> float:
    """Of a process, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def killed_run(flags: list[str], folder: Path, kill: Kill, seconds: float) -> tuple[int | None, float, float]:
    """Start and kill; the exit status (None where the run ended before), and the end's seconds and processor seconds.

    The latter say what the end would take on a machine that does nothing else.
    """
    process, pipe = start(flags, folder)
    seen = 1 if kill.phase == "start" else 0
    if not seen:
        for phase in phases(pipe, time.monotonic() + 600):
            seen += phase == kill.phase
            if seen == kill.nth:
                break
    if seen:  # else this start has no such phase, and ends by itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(kill.fraction * seconds)
    if process.poll() is not None or not seen:
        process.wait()
        os.close(pipe)
        return None, 0.0, 0.0
    began, used = time.monotonic(), processor_seconds(process.pid)
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    to = os.killpg if kill.signal == signal.SIGKILL else os.kill
    to(process.pid, kill.signal)
    for _ in phases(pipe, began + 600):
        pass  # a full pipe would hold it up
    os.close(pipe)
    status, took = process.wait(), time.monotonic() - began
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = ended.ru_utime + ended.ru_stime - others.ru_utime - others.ru_stime - used
    return status, took, used


def left_over(folder: Path) -> list[str]:
    """The processes of a run that are alive after five seconds."""
    for _ in range(50):
        alive = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"{MARK}={folder}".encode() in path.read_bytes().split(b"\0"):
                    alive.append(path.parent.name)
        if not alive:
            return []
        time.sleep(0.1)
    return alive


def found(folder: Path) -> dict[str, object]:
    """What a finished run leaves, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    summary.pop("timings")
    rollouts = {path.name: path.read_bytes() for path in (folder / "rollouts").glob("step_*.jsonl")}
    report = (folder / "report.html").read_text()
    return {
        "weights": (folder / "model/model.safetensors").read_bytes(),
        "cold start": (folder / "cold_start/model.safetensors").read_bytes(),
        "steps": [line["step"] for line in lines],
        "metrics.jsonl": [{k: v for k, v in line.items() if k != "step_time"} for line in lines],
        "rollouts": rollouts,
        "summary.json": summary,
        "report.html": report.rstrip().endswith("</html>") and f"{len(lines)} updates" in report,
    }


def main() -> int:
    """Run the test; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--output_dir", type=Path, default=None)
    parser.add_argument("--compilation_cache_dir", default=None, help="default: a new one in output_dir")
    options = parser.parse_args()
    out = (options.output_dir or Path(tempfile.mkdtemp(prefix="kill_test_"))).absolute() / uuid.uuid4().hex[
        :8
    ]
    out.mkdir(parents=True)
    flags = [
        "--config",
        "configs/smoke.yaml",
        "--max_steps",
        str(options.updates),
        "--log_completions",
        "false",
    ]
    flags += ["--eval_steps", "4", "--save_steps", "2", "--save_total_limit", "2", "--sft_eval_steps", "2"]
    flags += ["--compilation_cache_dir", options.compilation_cache_dir or str(out / "xla")]
    rng, problems = random.Random(options.seed), []
    print(f"seed {options.seed}, {options.kills} kills, in {out}", flush=True)
    took = whole_run(flags, out / "whole")
    whole = found(out / "whole")
    calls = sum(line["tools/call_frequency"] for line in whole["metrics.jsonl"])
    print(
        f"whole run: {sum(map(sum, took.values())):.1f} s, phases { ({k: len(v) for k, v in took.items()}) }"
    )
    if not calls:
        problems.append("the run called no tool")

    kills = runs = 0
    while kills < options.kills:
        runs += 1
        folder = out / f"run_{runs}"
        while kills < options.kills:
            possible = [p for p in PHASES if p != "cold_start" or not (folder / "cold_start").exists()]
            phase = rng.choice(possible)
            nth = 1 if phase in ONCE else rng.randint(1, 3)
            how = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
            kill = Kill(phase, nth, rng.random(), how)
            seconds = (
                max(took.get(phase, [0.1])) if phase in ONCE else sorted(took[phase])[len(took[phase]) // 2]
            )
            status, after, used = killed_run(flags, folder, kill, seconds)
            if status is None:
                break
            kills += 1
            log = (out / f"{folder.name}.log").read_text()
            saved = re.findall(r"Stopped after update (\d+), which is saved", log)
            steps = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()]
            print(
                f"kill {kills} of {options.kills}: {how.name} in {phase} {nth} at {kill.fraction * seconds:.2f} s: "
                f"status {status}, {after:.1f} s ({used:.1f} s of a processor), checkpoints {sorted(steps)}",
                flush=True,
            )
            if how == signal.SIGTERM and (after > GRACE or status != 130) and phase != "start":
                problems.append(
                    f"kill {kills}: SIGTERM took {after:.1f} s ({used:.1f} s of a processor), status {status}; asked: "
                    f"{GRACE:.0f} s, 130"
                )
            if saved and max(map(int, saved)) > max(steps, default=0):
                problems.append(
                    f"kill {kills}: update {max(map(int, saved))} was saved, now there is {steps}"
                )
            if alive := left_over(folder):
                problems.append(f"kill {kills}: processes {alive} are left")
        process, pipe = start(flags, folder)  # to the end; where it is finished already it says so
        for _ in phases(pipe, time.monotonic() + 1800):
            pass
        os.close(pipe)
        if process.wait():
            problems.append(f"{folder.name} ended with {process.returncode}; see {folder}.log")
            break
        again = found(folder)
        problems += [f"{folder.name}: {name} differs" for name in whole if whole[name] != again[name]]
        print(f"{folder.name}: compared {', '.join(whole)}", flush=True)
    print("\n".join(problems) or f"{kills} of {kills} kills: {runs} runs equal to the whole one")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
