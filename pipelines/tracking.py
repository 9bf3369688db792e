"""MLflow, written to by one thread, so that neither a training step nor a request ever waits for it.

The step axis is images seen, so that runs of different batch sizes compare. A run that goes on writes to the run
that it began, and only what is new.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ldm import storage
from ldm.config import Config, RequestError
from ldm.snapshot import Snapshot
from pipelines import lineage
from pipelines.progress import say

DEFAULT_URI = "sqlite:///mlflow.db"
PROGRESS_KEY = "progress/optimizer_step"


class TrackingConfig(Config):
    """Where a stage is tracked in MLflow."""

    enabled: bool = Field(True, description="whether the stage is written to MLflow")
    uri: str | None = Field(None, description=f"tracking server; null: MLFLOW_TRACKING_URI, else {DEFAULT_URI}")
    experiment: str | None = Field(None, description="experiment; null: MLFLOW_EXPERIMENT_NAME, else ldm")

    def resolved(self) -> "TrackingConfig":
        """With URI and experiment named, so that a worker in another folder writes to the same place."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        if uri.startswith("sqlite:///"):
            uri = f"sqlite:///{storage.absolute(uri.removeprefix('sqlite:///'))}"
        experiment = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "ldm"
        return TrackingConfig(enabled=self.enabled, uri=uri, experiment=experiment)


class Tracker:
    """One MLflow run. A context manager: the run ends FINISHED, KILLED (Ctrl-C) or FAILED.

    Args:
        name: of the run, `stage/NAME`.
        params: the stage's configuration, written as parameters.
        run_id: of a run that goes on.
        ends_run: False where another tracker (the driver's) ends it.
    """

    def __init__(
        self,
        config: TrackingConfig,
        name: str,
        params: Config | None = None,
        run_id: str | None = None,
        ends_run: bool = True,
    ) -> None:
        self.config, self.name, self.params = config.resolved(), name, params
        self.run_id, self.ends_run = run_id, ends_run
        self._queue: queue.Queue[Any] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._goes_on = run_id is not None
        self._held: dict[str, int] = {}
        self._lost: list[str] = []

    def __enter__(self) -> "Tracker":
        if not self.config.enabled:
            return self
        _quiet()
        from mlflow import MlflowClient

        self._client = MlflowClient(self.config.uri)
        try:
            if self.run_id is None or not self._reopen(self.run_id):
                self.run_id = self._create_run()
        except Exception as error:  # any client, server or network fault
            text = " ".join(str(error).split())[:200]
            if self.ends_run and self.run_id is None:  # nothing has begun yet
                raise RequestError(
                    f"tracking.uri={self.config.uri}: cannot be written to ({text}); "
                    "give another, or tracking.enabled=false"
                ) from None
            say(f"tracking: {self.config.uri} cannot be written to, goes on without ({text})")
            return self
        self._thread = threading.Thread(target=self._write, name="tracking", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
        if self.ends_run:
            self._queue.put(lambda: self._client.set_terminated(self.run_id, status))
        self._queue.put(None)
        self._thread.join(timeout=60)
        if self._thread.is_alive():
            self._lost.append("the tracking server did not answer within 60 s")
        if self._lost:
            say(f"tracking: {len(self._lost)} writes to {self.config.uri} failed; the first: {self._lost[0]}")

    def log(self, metrics: dict[str, float], images_seen: int) -> None:
        """Metrics at a number of images seen; what the run already holds from before a restart is left out."""
        values, now = {key: float(value) for key, value in metrics.items()}, int(time.time() * 1000)
        self._put(lambda: self._log(values, images_seen, now))

    def tag(self, tags: dict[str, str]) -> None:
        def write() -> None:
            from mlflow.entities import RunTag

            self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

        self._put(write)

    def image(self, name: str, pixels: npt.NDArray[np.uint8]) -> None:
        """One picture, uint8 (3, H, W), as the artifact `name` (a .png)."""
        array = np.ascontiguousarray(pixels.transpose(1, 2, 0))
        self._put(lambda: self._client.log_image(self.run_id, array, artifact_file=name))

    def document(self, name: str, value: Any) -> None:
        """A JSON document as the artifact `name`."""
        self._put(lambda: self._client.log_dict(self.run_id, value, name))

    def dataset(self, dataset: lineage.TrackedDataset, context: str) -> None:
        """A data set that the run reads or writes, in the role `context`, such as "training"."""
        self._put(lambda: lineage.write_dataset(self._client, str(self.run_id), dataset, context))

    def model(self, snapshot: Snapshot) -> None:
        """A snapshot that came of the run, as a logged model that points to it."""
        name = f"{storage.name(self.name)}-step-{snapshot.step}"
        self._put(lambda: lineage.write_model(self._client, str(self.run_id), name, snapshot))

    def used_model(self, snapshot: Snapshot) -> None:
        """The snapshot that the run measures, where a run of this experiment has logged it."""
        self._put(lambda: lineage.write_used_model(self._client, str(self.run_id), snapshot.weights_sha256))

    def _log(self, metrics: dict[str, float], images_seen: int, milliseconds: int) -> None:
        from mlflow.entities import Metric

        new = {key: value for key, value in metrics.items() if images_seen > self._last_held(key)}
        points = [Metric(key, value, milliseconds, images_seen) for key, value in new.items()]
        if points:
            self._client.log_batch(self.run_id, metrics=points)

    def _last_held(self, key: str) -> int:
        """The last step of `key` that the run held when this tracker first wrote to it; -1 where there is none."""
        if not self._goes_on:
            return -1
        if key not in self._held:
            history = self._client.get_metric_history(self.run_id, key)
            self._held[key] = max((point.step for point in history), default=-1)
        return self._held[key]

    def _put(self, write: Callable[[], Any]) -> None:
        if self.config.enabled:
            self._queue.put(write)

    def _reopen(self, run_id: str) -> bool:
        """Whether the run is there to go on. One that is gone is no reason not to train on: a new one is made."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            say(f"tracking: {self.config.uri} has no run {run_id}; a new one is made")
            return False
        return True

    def _create_run(self) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(self.config.experiment)
        experiment_id = experiment.experiment_id if experiment else self._create_experiment()
        tags = {"stage": self.name.split("/")[0], "mlflow.source.git.commit": _git_commit()}
        run = self._client.create_run(experiment_id, run_name=self.name, tags={k: v for k, v in tags.items() if v})
        run_id = str(run.info.run_id)
        if self.params is not None:
            flat = _flatten(self.params.model_dump(mode="json", exclude={"tracking"}))
            self._client.log_batch(run_id, params=[Param(k, str(v)[:6000]) for k, v in flat.items()])
        return run_id

    def _create_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        uri, location = str(self.config.uri), None
        if uri.startswith("sqlite:///"):  # beside the database, wherever the writer stands
            location = str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts")
        try:
            return str(self._client.create_experiment(self.config.experiment, artifact_location=location))
        except MlflowException:  # another stage made it in the meantime
            experiment = self._client.get_experiment_by_name(self.config.experiment)
            if experiment is None:
                raise
            return str(experiment.experiment_id)

    def _write(self) -> None:
        """The thread: does what is queued, in order. A failed write is reported at the end, and fails no stage."""
        while (write := self._queue.get()) is not None:
            try:
                write()
            except Exception as error:  # any client, server or network fault: training goes on without
                self._lost.append(" ".join(str(error).split())[:200])


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


def _quiet() -> None:
    """MLflow's own chatter (database migrations, run links) is not for the person at the terminal."""
    import logging

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default of 7 keeps a stage waiting for minutes
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
