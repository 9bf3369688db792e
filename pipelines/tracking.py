"""MLflow, written to by threads of its own, so that neither a training step nor a request ever waits for it.

The step axis is images seen, so that runs of different batch sizes compare. A run that goes on writes to the run
that it began, and only what is new.
"""

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm import storage
from ldm.config import Config, RequestError
from ldm.snapshot import Snapshot
from pipelines import lineage
from pipelines.outbox import Outbox
from pipelines.progress import say
from pipelines.tracking_config import TrackingConfig, create_run
from pipelines.tracking_files import grid_names, table_file
from pipelines.tracking_records import (
    Artifact,
    BestModel,
    Candidate,
    GoneModels,
    OutputModel,
    Points,
    Record,
    Score,
    ShownTable,
    Status,
    Tags,
    Upload,
    UsedDataset,
    UsedModel,
    one_line,
    without_password,
)
from pipelines.tracking_writer import Writer

PROGRESS_KEY = "progress/optimizer_step"
START_WAIT_S = 15.0
"""How long a run that goes on waits to hear that MLflow has it."""
EXIT_WAIT_S = 30.0
"""How long a finished stage waits for what is not sent yet."""
SECURE_WAIT_S = 2.0
WORKER_EXIT_WAIT_S = 5.0


class Tracker:
    """One MLflow run. A context manager: the run ends FINISHED, KILLED (Ctrl-C) or FAILED.

    Once it has begun no caller waits for MLflow. While MLflow is down all is kept, and sent when it is back.

    Args:
        name: of the run, `stage/NAME`.
        params: the stage's configuration, written as parameters.
        run_id: of a run that goes on.
        ends_run: False where another tracker (the driver's) begins and ends it.
        folder: URL of the folder of what is not sent when the stage ends, for the next tracker; None: it is lost.
    """

    def __init__(
        self,
        config: TrackingConfig,
        name: str,
        params: Config | None = None,
        run_id: str | None = None,
        ends_run: bool = True,
        folder: str | None = None,
    ) -> None:
        self.config, self.name, self.params = config.resolved(), name, params
        self.run_id, self.ends_run, self.folder = run_id, ends_run, folder
        self._uri = without_password(str(self.config.uri))
        self._client: Any = None
        self._connecting = threading.Lock()
        self._outbox: Outbox | None = None
        self._measured: str | None = None  # the hash of the weights that the run measures
        self._data: lineage.TrackedDataset | None = None  # that it named last

    def __enter__(self) -> "Tracker":
        if not self.config.enabled:
            return self
        _quiet()
        import mlflow  # noqa: F401  here, and not in a thread while this one imports other things

        fresh = self._begin() if self.ends_run else None
        if self.run_id is None:
            raise ValueError("a tracker that does not begin a run needs its run_id")
        self._outbox = Outbox(Writer(self._connect, fresh), self._uri, self.run_id, self.folder)
        if fresh is None and self.ends_run:
            self._put(Status("RUNNING"))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._outbox is None:
            return
        status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
        if self.ends_run:
            self._put(Status(status))
        # What a worker keeps its driver sends.
        kept, lost = self._outbox.close(EXIT_WAIT_S if self.ends_run else WORKER_EXIT_WAIT_S, load=self.ends_run)
        if refused := self._outbox.refused:
            say(f"tracking: {len(refused)} writes to {self._uri} failed; the first: {refused[0]}")
        if kept:
            say(f"tracking: {kept} writes to {self._uri} wait in {self.folder}; the same command sends them later")
        if lost:
            say(f"tracking: {lost} writes to {self._uri} are lost: it did not answer in time")

    def log(self, metrics: dict[str, float], images_seen: int) -> None:
        """Metrics at a number of images seen; what the run already holds from before a restart is left out."""
        values = {key: float(value) for key, value in metrics.items()}
        self._put(Points(values, images_seen, int(time.time() * 1000)))
        if self._measured is not None and any(key.startswith("eval/") for key in values):
            self._put(Score.of(self._measured, images_seen, "eval/", self._data))

    def system(self, metrics: dict[str, float]) -> None:
        """`system/…` metrics of this moment; their step is the seconds since the run began."""
        self._put(Points(metrics, None, int(time.time() * 1000)))

    def secure(self) -> None:
        """What was given until now outlives a SIGKILL: it is in MLflow, or in a file of `folder`. Takes at most about
        two seconds; with an MLflow that answers, one request."""
        if self._outbox is not None:
            self._outbox.secure(SECURE_WAIT_S)

    def tag(self, tags: dict[str, str]) -> None:
        self._put(Tags({key: str(value) for key, value in tags.items()}))

    def image(self, name: str, pixels: npt.NDArray[np.uint8]) -> None:
        """One picture, uint8 (3, H, W), as the artifact `name` (a .png)."""
        _check_picture(name, pixels)
        self._put(Artifact(name, pixels))

    def grid(self, key: str, pixels: npt.NDArray[np.uint8], images_seen: int) -> None:
        """A grid of pictures, uint8 (3, H, W), that MLflow shows under `key` with a slider over the images seen."""
        _check_picture(key, pixels)
        for name in grid_names(key, pixels, images_seen, int(time.time() * 1000)):
            self._put(Artifact(name, pixels))
        self.tag({"mlflow.loggedImages": "True"})  # by which its page knows that there are any

    def figure(self, name: str, png: bytes) -> None:
        """A plot of `pipelines.plots` as the artifact `name` (a .png)."""
        self._put(Artifact(name, png))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of plain values by column as the artifact `name` (a .json), which MLflow shows as a table."""
        self._put(Artifact(name, table_file(rows)))
        self._put(ShownTable(name))

    def document(self, name: str, value: Any) -> None:
        """A JSON document as the artifact `name`."""
        self._put(Artifact(name, json.dumps(value, indent=2).encode()))

    def dataset(self, dataset: lineage.TrackedDataset, context: str) -> None:
        """A data set that the run reads or writes, in the role `context`, such as "training"."""
        self._data = dataset
        self._put(UsedDataset(dataset, context))

    def model(self, snapshot: Snapshot) -> None:
        """A snapshot that came of the run, as a logged model that points to it."""
        self._put(OutputModel(lineage.snapshot_model(storage.name(self.name), snapshot)))

    def validated(self, snapshot: Snapshot, dataset: lineage.TrackedDataset) -> None:
        """The `val/…` metrics that the run has at the snapshot's images seen become metrics of its logged model too."""
        self._put(Score.of(snapshot.weights_sha256, snapshot.images_seen, "val/", dataset))

    def best_model(self, snapshot: Snapshot, metric: str, value: float, measured_on: str) -> None:
        """The snapshot is the best one of the run by `metric`, of which less is better.

        It is tagged, its model holds it whole (`mlflow.pyfunc.load_model`), and it becomes a version of the registered
        model, whose champion it is unless that one is better on the same; measured_on names what was measured on.
        """
        self.model(snapshot)
        self._put(BestModel(snapshot.weights_sha256, metric, float(value)))
        self._put(Candidate(snapshot.weights_sha256, self.config.registered_name, metric, float(value), measured_on))
        self._put(Upload(snapshot.url, snapshot.weights_sha256))

    def gone_models(self, weights_sha256: Sequence[str]) -> None:
        """Snapshots of the run that were removed: their models, by the hash of the weights, are tagged so."""
        if weights_sha256:
            self._put(GoneModels(list(weights_sha256)))

    def used_model(self, snapshot: Snapshot) -> None:
        """The snapshot that the run measures, where a run of this experiment has logged it: the `eval/…` metrics that
        are logged from now on are the model's too."""
        self._measured = snapshot.weights_sha256
        self._put(UsedModel(snapshot.weights_sha256))

    def _put(self, record: Record) -> None:
        if self._outbox is not None:
            self._outbox.put(record)

    def _connect(self) -> Any:
        from mlflow import MlflowClient

        with self._connecting:
            if self._client is None:
                self._client = MlflowClient(self.config.uri)
            return self._client

    def _begin(self) -> str | None:
        """Makes a run where there is none to go on; its id, or None where one goes on. Raises RequestError."""
        if self.run_id is not None and not self._is_gone(self.run_id):
            return None
        try:
            self.run_id = create_run(self._connect(), self.config, self.name, self.params)
        except Exception as error:  # any client, server or network fault: nothing has begun yet
            raise RequestError(
                f"tracking.uri={self._uri}: cannot be written to ({one_line(error)}); "
                "give another, or tracking.enabled=false"
            ) from None
        return self.run_id

    def _is_gone(self, run_id: str) -> bool:
        """Whether MLflow says that there is no such run, which is no reason not to train on: a new one is made.

        Without an answer the run goes on: all that MLflow misses is sent later.
        """
        from mlflow.exceptions import MlflowException

        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(self._connect().get_run(run_id))
            except Exception as error:  # any client, server or network fault
                answers.append(error)

        thread = threading.Thread(target=ask, name="tracking", daemon=True)
        thread.start()
        thread.join(START_WAIT_S)
        answer = answers[0] if answers else TimeoutError(f"no answer in {START_WAIT_S:.0f} s")
        gone = isinstance(answer, MlflowException) and answer.error_code == "RESOURCE_DOES_NOT_EXIST"
        if gone:
            say(f"tracking: {self._uri} has no run {run_id}; a new one is made")
        elif isinstance(answer, Exception):
            say(f"tracking: {self._uri} does not answer, goes on and sends later ({one_line(answer)})")
        return gone


def _check_picture(name: str, pixels: npt.NDArray[np.uint8]) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) != 3:
        raise ValueError(f"{name}: is {pixels.dtype} {pixels.shape}, not uint8 (3, H, W)")


def _quiet() -> None:
    """MLflow's own chatter (database migrations, run links) is not for the person at the terminal."""
    import logging

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of its own; the outbox tries on
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
