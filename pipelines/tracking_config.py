"""Where a stage is tracked in MLflow, and how its run begins there."""

import contextlib
import os
from pathlib import Path
from typing import Any

from pydantic import Field

from ldm import storage
from ldm.config import Config
from pipelines.lineage import plain_name

DEFAULT_URI = "sqlite:///mlflow.db"


class TrackingConfig(Config):
    """Where a stage is tracked in MLflow."""

    enabled: bool = Field(True, description="whether the stage is written to MLflow")
    uri: str | None = Field(None, description=f"tracking server; null: MLFLOW_TRACKING_URI, else {DEFAULT_URI}")
    experiment: str | None = Field(None, description="experiment; null: MLFLOW_EXPERIMENT_NAME, else ldm")
    model_name: str | None = Field(
        None, min_length=1, description="registered model of the best snapshots; null: named as the experiment"
    )
    system_metrics_s: float | None = Field(
        10.0, gt=0, description="seconds between samples of each node's CPU, memory, network, disk and GPUs; null: none"
    )

    def resolved(self) -> "TrackingConfig":
        """With URI and experiment named, so that a worker in another folder writes to the same place."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        if uri.startswith("sqlite:///"):
            uri = f"sqlite:///{storage.absolute(uri.removeprefix('sqlite:///'))}"
        experiment = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "ldm"
        return self.model_copy(update={"uri": uri, "experiment": experiment})

    @property
    def registered_name(self) -> str:
        """Of the registered model."""
        return plain_name(self.model_name or self.resolved().experiment or "")


def create_run(client: Any, config: TrackingConfig, name: str, params: Config | None) -> str:
    """Begins a run with parameters; returns its id. config: resolved. Raises what the client raises."""
    from mlflow.entities import Param

    experiment = client.get_experiment_by_name(config.experiment)
    experiment_id = experiment.experiment_id if experiment else _create_experiment(client, config)
    tags = {"stage": name.split("/")[0], "mlflow.source.git.commit": _git_commit()}
    run = client.create_run(experiment_id, run_name=name, tags={k: v for k, v in tags.items() if v})
    run_id = str(run.info.run_id)
    if params is not None:
        flat = _flatten(params.model_dump(mode="json", exclude={"tracking"}))
        client.log_batch(run_id, params=[Param(k, str(v)[:6000]) for k, v in flat.items()])
    return run_id


def _create_experiment(client: Any, config: TrackingConfig) -> str:
    from mlflow.exceptions import MlflowException

    uri, location = str(config.uri), None
    if uri.startswith("sqlite:///"):  # beside the database, wherever the writer stands
        location = str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts")
    try:
        return str(client.create_experiment(config.experiment, artifact_location=location))
    except MlflowException:  # another stage made it in the meantime
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _git_commit() -> str:
    """Of the folder that the program is run in, or nothing where that is no git checkout."""
    import subprocess

    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["git", "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""
    return ""
