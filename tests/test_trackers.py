"""Metrics at Weights & Biases and MLflow, read back from what their own packages wrote."""

import dataclasses
import json
import time

import pytest

from grpo_jax.run.log import Records
from grpo_jax.run.trackers import RUN_FILE

pytestmark = pytest.mark.slow  # both packages take seconds to import, MLflow some more to make its database
FIRST = {"reward": 0.25, "rewards/accuracy/mean": 0.5, "note": "text is no number", "bad": float("nan")}


@dataclasses.dataclass
class Options:
    output_dir: str
    report_to: str
    learning_rate: float = 5e-7
    reward_fn: None = None


def two_steps_and_a_resume(folder, report_to):
    """Steps 1 and 2, then a run that continues after step 1."""
    options = Options(str(folder), report_to)
    with Records(options) as records:
        records.write_metrics(1, FIRST)
        records.write_metrics(2, {"reward": 0.75})
    run = json.loads((folder / RUN_FILE).read_text())["run"]
    with Records(options, resume_step=1) as records:
        records.write_metrics(2, {"reward": 0.75})
        records.write_metrics(3, {"reward": 1.0})
    assert json.loads((folder / RUN_FILE).read_text()) == {"report_to": report_to, "run": run}
    return run


def test_mlflow_holds_every_step_in_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "first"
    run = two_steps_and_a_resume(folder, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    seen = client.get_run(run)
    assert seen.info.status == "FINISHED" and seen.info.run_name == "first"
    options = {"output_dir": str(folder), "report_to": "mlflow"}
    assert seen.data.params == options | {"learning_rate": "5e-07", "reward_fn": "None"}
    assert set(seen.data.metrics) == {"reward", "rewards/accuracy/mean"}
    history = {metric.step: metric.value for metric in client.get_metric_history(run, "reward")}
    assert history == {1: 0.25, 2: 0.75, 3: 1.0}
    (experiment,) = [e for e in client.search_experiments() if e.name == "grpo_jax"]
    assert [one.info.run_id for one in client.search_runs([experiment.experiment_id])] == [run]
    with Records(Options(str(folder), "mlflow")):  # a new run in the same folder is a new run there
        pass
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_wandb_holds_every_step(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "first"
    run = two_steps_and_a_resume(folder, "wandb")
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and all(run in file.name for file in files)
    content = files[0].read_bytes()
    for name in (b"rewards/accuracy/mean", b"learning_rate", b"0.75"):
        assert name in content
    for name in (b"note", b"bad"):
        assert b'"%s"' % name not in content
    deadline = (
        time.monotonic() + 60
    )  # a process of wandb's own writes the file, now and then after the run has ended
    while b"1.0" not in files[1].read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"1.0" in files[1].read_bytes()
