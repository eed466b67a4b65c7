"""Where metrics go in addition to metrics.jsonl: TensorBoard files, Weights & Biases, MLflow.

Each package is imported on demand: that takes a second or more, and only tensorboardX is always installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

from grpo_jax.files import write_text_atomic

# by the names of `report_to`
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
RUN_FILE = "tracker.json"  # which of a server's runs the folder belongs to


def is_installed(name: str) -> bool:
    """Whether a tracker's package is installed; nothing is imported."""
    return importlib.util.find_spec(PACKAGES[name]) is not None


def open_tracker(
    name: str, output_dir: str | os.PathLike, resume_step: int | None, config: dict[str, Any]
) -> _TensorBoard | _WeightsAndBiases | _MLflow | None:
    """The tracker of a run, or None for "none".

    Args:
        resume_step: updates done at the checkpoint that the run continues from: the service's run is then
            continued as well. None for a new one.
    """
    if name == "none":
        return None
    tracker = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases, "mlflow": _MLflow}[name]
    return tracker(Path(output_dir).absolute(), resume_step, config)


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int | None, config: dict[str, Any]):
        from tensorboardX import SummaryWriter

        purge = None if resume_step is None else resume_step + 1  # these steps are repeated
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """WANDB_PROJECT, WANDB_MODE and the like are wandb's own; the project is grpo_jax unless named.

    wandb accepts no step twice: steps repeated after a resume keep their first values, which are the same.
    """

    def __init__(self, folder: Path, resume_step: int | None, config: dict[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "grpo_jax"),
            name=folder.name,
            dir=str(folder),
            id=_known_run(folder, "wandb", resume_step),  # None: wandb chooses
            resume="allow",
            config=config,
            settings=wandb.Settings(console="off"),  # the terminal belongs to our bars
        )
        _remember_run(folder, "wandb", self._run.id)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """MLFLOW_TRACKING_URI, else a database in the folder; MLFLOW_EXPERIMENT_NAME, else grpo_jax."""

    def __init__(self, folder: Path, resume_step: int | None, config: dict[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        self._client = MlflowClient(uri)
        run = _known_run(folder, "mlflow", resume_step)
        if run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "grpo_jax")
            known = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if known is None else known.experiment_id
            run = self._client.create_run(experiment, run_name=folder.name).info.run_id
            params = [Param(name, str(value)) for name, value in config.items()]
            for i in range(0, len(params), 100):  # as many as MLflow takes at once
                self._client.log_batch(run, params=params[i : i + 100])
            _remember_run(folder, "mlflow", run)
        self._run = run

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _known_run(folder: Path, name: str, resume_step: int | None) -> str | None:
    """The service's run that this one continues; None for a new run."""
    path = folder / RUN_FILE
    if resume_step is None or not path.exists():
        return None
    known = json.loads(path.read_text(encoding="utf-8"))
    return known["run"] if known["report_to"] == name else None


def _remember_run(folder: Path, name: str, run: str) -> None:
    write_text_atomic(folder / RUN_FILE, json.dumps({"report_to": name, "run": run}) + "\n")
