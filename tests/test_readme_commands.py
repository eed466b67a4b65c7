"""Every command in a fenced block of README.md and the docs is one that works as pasted."""

import ast
import re
import shlex
import subprocess
import sys

import launch
import pytest

from grpo_jax.run.config import parse_config
from grpo_jax.run.trl_options import ALIASES

ROOT = launch.ROOT
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
STARTS = ("python ", "pip ", "pytest", "ruff ", "bash ", "scripts/", "sbatch ", "sky ", "grpo-jax ", "JAX_")


def commands():
    """(page, command) of every line of a fenced block that is a command; `\\` continues a line, ` #` ends it."""
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.split(r"\s+#", line)[0].strip()
                if line.startswith(STARTS):
                    yield page.name, line


COMMANDS = sorted(set(commands()))


def of(start, *pages):
    return [line for page, line in COMMANDS if line.startswith(start) and (not pages or page in pages)]


def test_the_pages_have_commands_of_every_kind():
    assert {line.split()[0] for _, line in COMMANDS} >= {"python", "pip", "pytest", "scripts/tpu_vm.sh"}


@pytest.mark.parametrize("line", [line for _, line in COMMANDS], ids=str)
def test_every_command_is_a_line_that_a_shell_takes(line):
    assert subprocess.run(["bash", "-n", "-c", line], capture_output=True).returncode == 0


def test_installs_name_extras_that_there_are():
    extras = set(re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.M))
    named = re.findall(r"\[([\w,]+)\]", " ".join(of("pip ")))
    assert named and {extra for one in named for extra in one.split(",")} <= extras


def package_commands():
    return [
        line
        for _, line in COMMANDS
        if re.search(r"grpo_jax\.(train|sft|evaluate|chat|serve) |^grpo-jax \w+ ", line)
    ]


@pytest.mark.parametrize("line", package_commands(), ids=str)
def test_options_are_those_of_the_command(line, monkeypatch):
    """Parsed as the command does it; `…` stands for a config."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(line.replace("--config …", "--config configs/smoke.yaml").replace("…", ""))
    for part in words:
        if "grpo_jax.train --" in part:  # a command within a command, as gcloud's
            words = shlex.split(part)
    at = next(i for i, word in enumerate(words) if word.startswith("grpo_jax.") or word == "grpo-jax")
    flags = words[at + 1 :]
    if "&&" in flags:
        flags = flags[: flags.index("&&")]
    if not flags or flags[0] in ("--help", "COMMAND"):
        return
    resolved = parse_config(flags, prog="test", default_config="configs/default.yaml")
    given = {word[2:].partition("=")[0] for word in flags if word.startswith("--")} - {"config"}
    assert all(resolved.origin[ALIASES.get(name, name)] == f"--{name}" for name in given)


@pytest.mark.parametrize("line", of("python benchmarks/"), ids=str)
def test_benchmarks_have_the_flags_that_are_shown(line):
    words = shlex.split(line)
    source = (ROOT / words[1]).read_text() + (ROOT / "benchmarks" / "job.py").read_text()
    known = {
        text
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(text := node.value, str)
    }
    for flag in (word for word in words[2:] if word.startswith("--")):
        assert flag in known or flag.lstrip("-") in known, flag


# As pasted


def run(line, folder):
    words = [sys.executable if word == "python" else word for word in shlex.split(line)]
    environment = {**launch.os.environ, **launch.ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_readmes_own_tools_train_a_model_that_is_evaluated_exported_and_drawn(tmp_path):
    """The three files, the commands and the Python as they stand, except the model, which is a new one, and
    fewer updates."""
    readme = (ROOT / "README.md").read_text()
    for name, text in re.findall(
        r"^`([\w.]+\.(?:py|jsonl))`[^\n]*\n\n```\w*\n(.*?)^```", readme, re.M | re.S
    ):
        launch.write(tmp_path / name, text)
    (train,) = [line for line in of("python -m grpo_jax.train", "README.md") if "my_tools.py" in line]
    (evaluate,) = of("python -m grpo_jax.evaluate", "README.md")
    (export,) = of("python -m grpo_jax.export", "README.md")
    (report,) = of("python -m grpo_jax.report", "README.md")
    small = train.replace("Qwen/Qwen2.5-0.5B-Instruct", "scratch").replace("--max_steps 50", "--max_steps 2")
    out = run(f"{small} --max_completion_length 63", tmp_path)
    assert "update 2/2" in out and "2 × 8 completions" in out
    assert "exact_answer_match" in run(evaluate, tmp_path)
    assert "Written: " in run(export, tmp_path)
    assert (tmp_path / run(report, tmp_path).strip()).exists()

    (python,) = re.findall(r"^```python\n(from grpo_jax .*?)^```", readme, re.M | re.S)
    for given, here in (
        ("Qwen/Qwen2.5-0.5B-Instruct", "scratch"),
        ('"runs/mine", max_steps=50', '"runs/python", max_steps=1, max_completion_length=63'),
    ):
        assert given in python
        python = python.replace(given, here)
    imports = "from my_tools import add, multiply\nfrom my_reward import reward_func\n"
    launch.write(tmp_path / "script.py", imports + python)
    assert "Finished: 1 updates" in run("python script.py", tmp_path)


@pytest.mark.slow
def test_the_quickstart_command_runs(tmp_path):
    """README's second command with few updates."""
    (line,) = of("python -m grpo_jax.train --config configs/quickstart.yaml", "README.md")
    few = "--max_steps 1 --sft_max_steps 2 --sft_eval_steps 2 --eval_dataset_id_or_path data/math_test.jsonl[:32]"
    out = run(f"{line} {few} --output_dir {tmp_path / 'run'}", ROOT)
    assert "Finished: 1 updates" in out
