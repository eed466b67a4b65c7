"""The job scripts, as far as they can be checked without a cluster: their text, and what they would call."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from launch import ROOT

SCRIPTS = sorted(p for folder in ("scripts", "jobs") for p in (ROOT / folder).glob("*.sh"))
SSH = "gcloud compute tpus tpu-vm ssh mine --zone=us-east5-b"


@pytest.fixture
def stubs(tmp_path):
    """A folder of programs at the head of PATH, each of which notes its arguments; returns how to make one."""
    calls = tmp_path / "calls"
    calls.write_text("")

    def make(name: str, body: str = "") -> Path:
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "{calls}"\n{body}\n')
        program.chmod(0o755)
        return calls

    return make


def bash(tmp_path, script, *args, **kwargs):
    """A script with the stubs on its PATH."""
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | kwargs.pop("env", {})
    command = ["bash", str(ROOT / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **kwargs)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    found = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert found.stdout == ""


# Cloud TPU VMs


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "create mine --type v6e-8 --zone us-east5-b --spot",
            "gcloud compute tpus queued-resources create mine --node-id=mine --zone=us-east5-b "
            "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e --spot\n",
        ),
        (
            "create mine --type v5litepod-8",
            "gcloud compute tpus queued-resources create mine --node-id=mine --accelerator-type=v5litepod-8 "
            "--runtime-version=v2-alpha-tpuv5-lite\n",
        ),
        (
            "run mine --zone us-east5-b --bucket gs://b/ -- --config x.yaml",
            f"{SSH} --worker=all --command=cd\\ grpo_jax\\ \\&\\&\\ \\{{\\ GRPO_JAX_DISTRIBUTED=1\\ nohup\\ bash\\ "
            "scripts/with_bucket.sh\\ gs://b/mine\\ runs/mine\\ --\\ .venv/bin/python\\ -m\\ grpo_jax.train\\ --config\\ "
            "x.yaml\\ --output_dir\\ runs/mine\\ \\>\\>\\ mine.log\\ 2\\>\\&1\\ \\<\\ /dev/null\\ \\&\\ \\}\n"
            f"Follow it with: {ROOT}/scripts/tpu_vm.sh logs mine --zone us-east5-b\n",
        ),
        (
            "logs mine --zone us-east5-b",
            f"{SSH} --worker=0 --command=tail\\ -n\\ 200\\ -f\\ grpo_jax/mine.log\n",
        ),
        (
            "delete mine",
            "gcloud compute tpus queued-resources delete mine --force --quiet\n",
        ),
    ],
)
def test_a_dry_run_prints_the_commands_and_runs_none(tmp_path, stubs, words, expected):
    calls = stubs("gcloud")
    action, name, *rest = words.split()
    ran = bash(tmp_path, "scripts/tpu_vm.sh", action, name, "--dry_run", *rest)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, expected, "")
    assert calls.read_text() == ""


def test_setup_sends_what_is_committed_to_every_host(tmp_path, stubs):
    calls = stubs("gcloud")
    stubs("git")
    ran = bash(tmp_path, "scripts/tpu_vm.sh", "setup", "mine", env={"TMPDIR": "/t"})
    assert ran.returncode == 0, ran.stderr
    first, second, third = calls.read_text().splitlines()
    assert re.fullmatch(
        r"git -C .*/scripts/\.\. archive --format=tar\.gz -o /t/grpo_jax\.tar\.gz HEAD", first
    )
    assert second == "gcloud compute tpus tpu-vm scp /t/grpo_jax.tar.gz mine:grpo_jax.tar.gz --worker=all"
    assert third.startswith(
        "gcloud compute tpus tpu-vm ssh mine --worker=all --command=set -e; mkdir -p grpo_jax;"
    )
    for part in ("uv venv --python 3.11 .venv", 'uv pip install --python .venv/bin/python -e ".[tpu]"'):
        assert part in third


@pytest.mark.parametrize(
    ("state", "made"),
    [("", ["create"]), ("ACTIVE", []), ("WAITING_FOR_RESOURCES", []), ("SUSPENDED", ["delete", "create"])],
)
def test_create_may_be_repeated_and_replaces_what_was_preempted(tmp_path, stubs, state, made):
    calls = stubs("gcloud", f'[[ $4 != describe ]] || {{ echo "{state}"; [[ -n "{state}" ]]; }}')
    ran = bash(tmp_path, "scripts/tpu_vm.sh", "create", "mine", "--type", "v6e-8")
    assert ran.returncode == 0, ran.stderr
    verbs = [line.split()[4] for line in calls.read_text().splitlines()]
    assert verbs == ["describe", *made]
    assert ("is there already" in ran.stdout) == (not made)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("create mine --type h100", "--type must be v6e-N, v5litepod-N, v5p-N or v4-N, got 'h100'"),
        ("create Mine --type v6e-8", "NAME must be lower-case letters"),
        ("run mine", "run needs the options of the training after --"),
        ("run mine --bucket b -- --config x", "--bucket must begin with gs://, got 'b'"),
        ("run mine --config x", "unknown option '--config'; options of the training go after --"),
        (
            "run mine -- --config x",
            "a slice with several hosts needs --output_dir on a disk that all of them see",
        ),
    ],
)
def test_wrong_words_are_named(tmp_path, stubs, words, message):
    calls = stubs("gcloud", "echo v6e-16")
    ran = bash(tmp_path, "scripts/tpu_vm.sh", *words.split())
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "ssh" not in calls.read_text()


BUCKET = """
case "$2" in
  ls) ls "$BUCKET" ;;
  rsync) from=("${@: -2:1}"); to=("${@: -1}"); mkdir -p "${to/gs:\\/\\/b/$BUCKET}"
         cp -r "${from/gs:\\/\\/b/$BUCKET}/." "${to/gs:\\/\\/b/$BUCKET}/" ;;
esac
"""


def test_a_folder_is_fetched_from_the_bucket_and_kept_there_and_sigterm_is_passed_on(tmp_path, stubs):
    """A folder stands for the bucket; the command adds to what an earlier machine had left there."""
    calls = stubs("gcloud", BUCKET)
    bucket, folder = tmp_path / "bucket", tmp_path / "runs/mine"
    bucket.mkdir()
    (bucket / "metrics").write_text("1\n")
    program = f"trap 'echo 3 >> {folder}/metrics; exit 130' TERM; echo 2 >> {folder}/metrics; while :; do sleep 0.1; done"
    process = subprocess.Popen(
        ["bash", ROOT / "scripts/with_bucket.sh", "gs://b", folder, "--", "bash", "-c", program],
        env=os.environ
        | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "BUCKET": str(bucket), "COPY_SECONDS": "0.2"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while (bucket / "metrics").read_text() != "1\n2\n" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (bucket / "metrics").read_text() == "1\n2\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert (bucket / "metrics").read_text() == "1\n2\n3\n"
    assert "--delete-unmatched-destination-objects --exclude=.*(" in calls.read_text()


@pytest.mark.parametrize("broken", ["list", "fetch"])
def test_a_bucket_that_cannot_be_read_is_left_as_it_is(tmp_path, stubs, broken):
    """The first start fails half-way; the second, of the same command, has everything."""
    once = f"[[ -e {tmp_path}/failed ]] || {{ touch {tmp_path}/failed; %s; exit 1; }}"
    part = once % (
        f"cp {tmp_path}/bucket/a {tmp_path}/runs/mine.part/" if broken == "fetch" else "echo 503 >&2"
    )
    stubs("gcloud", f'case "$2" in {"rsync" if broken == "fetch" else "ls"}) {part} ;; esac\n' + BUCKET)
    bucket, folder = tmp_path / "bucket", tmp_path / "runs/mine"
    bucket.mkdir()
    for name in "ab":
        (bucket / name).write_text(name)
    command = ["scripts/with_bucket.sh", "gs://b", folder, "--", "touch", folder / "c"]
    first = bash(tmp_path, *command, env={"BUCKET": str(bucket)})
    assert first.returncode == 1 and not folder.exists(), first.stderr
    assert ("cannot be listed: 503" in first.stderr) == (broken == "list")
    assert bash(tmp_path, *command, env={"BUCKET": str(bucket)}).returncode == 0
    assert {path.name for path in bucket.iterdir()} == {path.name for path in folder.iterdir()} == {*"abc"}


def test_an_empty_bucket_is_filled(tmp_path, stubs):
    stubs(
        "gcloud",
        'if [[ $2 == ls ]]; then echo "ERROR: One or more URLs matched no objects." >&2; exit 1; fi' + BUCKET,
    )
    (tmp_path / "runs").mkdir()
    folder = tmp_path / "runs/mine"
    made = ["scripts/with_bucket.sh", "gs://b", folder, "--", "mkdir", folder]
    assert bash(tmp_path, *made, env={"BUCKET": str(tmp_path / "bucket")}).returncode == 0
    assert (tmp_path / "bucket").is_dir()


# Slurm, SkyPilot, Kubernetes


@pytest.mark.parametrize(("status", "again"), [(0, False), (130, True), (143, True), (1, False)])
def test_slurm_queues_a_stopped_run_again(tmp_path, stubs, status, again):
    calls = stubs("srun", f"exit {status}")
    stubs("scontrol")
    ran = bash(tmp_path, "jobs/slurm.sh", "--config", "x.yaml", env={"SLURM_JOB_ID": "7"})
    assert ran.returncode == status
    expected = ["srun --kill-on-bad-exit=0 python -m grpo_jax.train --config x.yaml"]
    assert calls.read_text().splitlines() == expected + ["scontrol requeue 7"] * again


def test_the_yaml_jobs_name_what_there_is():
    sky, jobset = (yaml.safe_load((ROOT / "jobs" / name).read_text()) for name in ("sky.yaml", "jobset.yaml"))
    (pods,) = jobset["spec"]["replicatedJobs"]
    job = pods["template"]["spec"]
    (train,) = job["template"]["spec"]["containers"]
    assert job["parallelism"] == job["completions"] == 4  # hosts of a 4x4 slice, four chips each
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert train["resources"]["limits"] == train["resources"]["requests"] == {"google.com/tpu": 4}
    assert (ROOT / train["args"][1]).exists()
    assert (ROOT / sky["envs"]["TRAIN"].removeprefix("--config ")).exists()
    assert (ROOT / re.search(r"bash (\S+)", sky["run"])[1]).exists()


# Several processes on one machine


def test_local_hosts_are_joined_and_the_one_that_failed_gives_the_status(tmp_path, stubs):
    stubs(
        "python",
        "[[ $1 != -c ]] || { echo 1234; exit; }\n"
        'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*"\n'
        "[[ $JAX_PROCESS_ID != 1 ]] || exit 3",
    )
    ran = bash(tmp_path, "scripts/run_local_multihost.sh", 3, "--config", "x.yaml")
    assert ran.stdout == "0 of 3 at 127.0.0.1:1234: -m grpo_jax.train --config x.yaml\n"
    assert ran.returncode == 3
    assert "Process 1 ended with status 3" in ran.stderr
    assert "1 of 3 at 127.0.0.1:1234: -m grpo_jax.train --config x.yaml" in ran.stderr
