"""The commands under one name, and what all of them do with their options."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from jax.errors import JaxRuntimeError

from grpo_jax import __main__ as commands
from grpo_jax import hosts
from grpo_jax.files import OutputError
from grpo_jax.run.command import run_command
from grpo_jax.run.fields import OPTIONS

ROOT = Path(__file__).parent.parent


def python(*argv, cwd=ROOT):
    """A Python process with the package, in its own folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_package_run_by_itself_lists_its_commands():
    ran = python("-m", "grpo_jax", "--help")
    assert ran.returncode == 0
    for name in commands.COMMANDS:
        assert f"\n  {name} " in ran.stdout
        assert (ROOT / f"grpo_jax/{name}.py").is_file()
    assert python("-m", "grpo_jax").returncode == 2


def test_an_unknown_command_names_the_nearest(capsys):
    assert commands.main(["trian"]) == 2
    assert capsys.readouterr().err == "Error: no command 'trian'; nearest: train\n"
    assert commands.main(["zzz"]) == 2
    assert "commands:\n  train" in capsys.readouterr().err


@pytest.mark.parametrize("name", commands.OF_OPTIONS)
def test_help_of_a_command_lists_the_options_without_importing_jax(name):
    code = (
        "import sys, grpo_jax.__main__ as m\n"
        "try: m.main(sys.argv[1:])\n"
        "except SystemExit as end: print('status', end.code)\n"
        "print([m for m in ('jax', 'transformers', 'flax', 'numpy') if m in sys.modules])"
    )
    out = python("-c", code, name, "--help").stdout
    assert f"usage: grpo-jax {name} [--config FILE]" in out
    assert "--learning_rate FLOAT" in out
    assert out.endswith("status 0\n[]\n")


def test_a_command_finds_modules_of_the_folder_it_runs_in(tmp_path, monkeypatch):
    """A console script has the folder of the script in sys.path, python -m the folder it runs in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    assert commands.main(["export", "--checkpoint", "latest", "--output_dir", "none"]) == 2
    assert sys.path[0] == str(tmp_path)


def test_a_command_of_the_shell_starts_as_with_python_m(monkeypatch):
    """It is given no words, from which it knows that the root logger's handlers are not the user's."""
    seen = []
    monkeypatch.setattr("grpo_jax.export.main", lambda *given: seen.append((given, sys.argv[1:])) or 0)
    monkeypatch.setattr(sys, "argv", ["grpo-jax", "export", "--output_dir", "x"])
    assert commands.main() == 0
    assert seen == [((), ["--output_dir", "x"])]


def test_wrong_options_are_reported_before_jax_is_imported():
    code = (
        "import sys; from grpo_jax.run.command import run_command\n"
        "print(run_command('train', '', None, ['--sed', '1']), 'jax' in sys.modules)"
    )
    ran = python("-c", code)
    assert ran.stdout == "2 False\n"
    assert ran.stderr == "Error: --sed: unknown option 'sed'; nearest: seed (its value: 1)\n"


@pytest.mark.parametrize("name", commands.OF_OPTIONS)
def test_print_config_prints_the_options_and_does_nothing_else(name, capsys, tmp_path):
    assert commands.main([name, "--print_config", "--seed", "7", "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert ["seed", "7", "--seed"] in [line.split() for line in out.splitlines()]
    assert len(out.splitlines()) == len(OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["check", "plan"])
def test_options_of_training_are_refused_elsewhere(option, capsys):
    value = {"check": "true", "plan": "cpu"}[option]
    assert run_command("sft", "", lambda *_: 0, [f"--{option}", value]) == 2
    assert f"{option} is an option of grpo_jax.train; leave it out of grpo_jax.sft" in capsys.readouterr().err


def test_a_command_says_where_its_options_come_from_and_runs_with_absolute_paths(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("seed: 3")
    seen = []

    def run(resolved, console):
        seen.append(resolved.config)
        os.chdir("/")  # as a user's file may

    assert run_command("train", "", run, ["--config", "c.yaml", "--output_dir", "out"]) == 0
    assert "Options: c.yaml, 1 flag, defaults otherwise" in capsys.readouterr().out
    assert (seen[0].output_dir, seen[0].seed) == (f"{tmp_path}/out", 3)


def failing(error, cause=None):
    """A command that fails, as those of a run do."""

    def run(resolved, console):
        try:
            if cause is not None:
                raise cause
        finally:
            raise error from None

    return run


RESET = "Connection reset by peer [127.0.0.1]:5000"
UNWRITTEN = OutputError("cannot write checkpoints/2: unknown")


@pytest.mark.parametrize(
    ("error", "cause", "status"),
    [
        (ValueError(f"UNKNOWN: Gloo all-reduce failed: {RESET}"), None, 1),
        (JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed"), None, 1),
        (JaxRuntimeError("ABORTED: a peer is gone"), None, 1),  # the runtime's, whatever it says
        (RuntimeError("UNAVAILABLE: the coordination service has shut down"), None, 1),
        (OSError(RESET), None, 1),
        (UNWRITTEN, JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), 1),
        (UNWRITTEN, OSError("No space left on device"), None),
        (ValueError("seed must be >= 0, got -1"), None, None),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), None, None),
        (
            JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 8 bytes."),
            None,
            None,
        ),
    ],
    ids=str,
)
def test_an_error_of_several_processes_that_may_follow_from_the_end_of_another_says_so(
    error, cause, status, capsys, monkeypatch
):
    class Ended(BaseException):
        pass

    monkeypatch.setattr(hosts, "alone", lambda: False)
    monkeypatch.setattr(os, "_exit", mock.Mock(side_effect=Ended))
    with pytest.raises(Ended):
        run_command("train", "", failing(error, cause), [])
    said = "If another process of this run has ended (see its own output), this error follows from it."
    assert (said in capsys.readouterr().err) == (status is not None)
    os._exit.assert_called_once_with(status or (2 if isinstance(error, ValueError) else 1))


def test_the_error_of_a_process_that_is_alone_follows_from_no_other(capsys):
    assert run_command("train", "", failing(ValueError(f"no such file: {RESET}")), []) == 2
    assert capsys.readouterr().err == f"Error: no such file: {RESET}\n"
