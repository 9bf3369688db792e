"""Writes records to MLflow, each so that writing it twice is writing it once."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ldm.snapshot import read_snapshot
from pipelines import lineage, registry
from pipelines.tracking_files import model_files
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
)

_POINTS = 1000  # that MLflow takes at once
_TABLES = "mlflow.loggedArtifacts"


def is_final(error: Exception) -> bool:
    """Whether a write can never succeed: the server says that the request is wrong, or its values or file are none.

    Credentials that are refused (401, 403) may be renewed; all else is a fault of the server or of the way to it.
    """
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        wrong = (ValueError, TypeError, LookupError, AttributeError, AssertionError)
        return isinstance(error, FileNotFoundError) or (isinstance(error, wrong) and not isinstance(error, OSError))
    return status == 501 or (400 <= status < 500 and status not in (401, 403, 408, 429))


class Writer:
    """Writes records with an MLflow client. fresh: the run that this process began, in which nothing stands yet."""

    def __init__(self, connect: Callable[[], Any], fresh: str | None) -> None:
        self._connect, self._fresh = connect, fresh
        self._steps: dict[tuple[str, str], set[int]] = {}
        self._runs: dict[str, Any] = {}  # what never changes of them

    def write(self, run_id: str, records: Sequence[Record]) -> list[str]:
        """Writes one record, or many Points; returns what was refused for good. Raises what may pass."""
        try:
            if isinstance(records[0], Points):
                return self._write_points(run_id, [record for record in records if isinstance(record, Points)])
            (record,) = records
            self._write_one(self._connect(), run_id, record)
        except Exception as error:  # any client, server or network fault
            if not is_final(error):
                raise
            return [one_line(error)]
        return []

    def _write_one(self, client: Any, run_id: str, record: Record) -> None:
        from mlflow.entities import RunTag

        match record:
            case Tags(tags):
                client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
            case Status("RUNNING"):
                client.update_run(run_id, status="RUNNING")
            case Status(status):
                client.set_terminated(run_id, status)
            case UsedDataset(dataset, context):
                lineage.write_dataset(client, run_id, dataset, context)
            case OutputModel(model):
                lineage.write_model(client, run_id, self._experiment(run_id), model)
            case UsedModel(weights):
                lineage.write_used_model(client, run_id, self._experiment(run_id), weights)
            case BestModel(weights, metric, value):
                lineage.write_best_model(client, run_id, self._experiment(run_id), weights, metric, value)
            case Candidate():
                registry.write_candidate(client, run_id, self._experiment(run_id), **asdict(record))
            case Score():
                lineage.write_score(client, run_id, self._experiment(run_id), **asdict(record))
            case GoneModels(hashes):
                lineage.write_gone_models(client, run_id, self._experiment(run_id), hashes)
            case ShownTable(name):
                _show_table(client, run_id, name)
            case Artifact(name):
                _upload(partial(client.log_artifact, run_id), name, lambda file: file.write_bytes(record.data()))
            case Upload(url, weights):
                self._upload_model(client, run_id, url, weights)

    def _upload_model(self, client: Any, run_id: str, url: str, weights_sha256: str) -> None:
        model = lineage.model_of(client, run_id, self._experiment(run_id), weights_sha256)
        if model is None:
            raise ValueError(f"run {run_id} has no model with the weights {weights_sha256}")
        for name, write in model_files(read_snapshot(url), model.model_id, run_id).items():
            _upload(partial(client.log_model_artifact, model.model_id), name, write)
        lineage.mark_uploaded(client, model)

    def _write_points(self, run_id: str, records: Iterable[Points]) -> list[str]:
        from mlflow.entities import Metric

        new: dict[tuple[str, int], Any] = {}
        for record in records:
            for key, value in record.metrics.items():
                # What has no step of its own is the same point whenever it is sent, which the store holds once.
                step = self._seconds(run_id, record) if record.step is None else record.step
                if record.step is None or step not in self._held(run_id, key):
                    new.setdefault((key, step), Metric(key, value, record.milliseconds, step))
        points = list(new.values())
        parts = [points[at : at + _POINTS] for at in range(0, len(points), _POINTS)]
        return [text for part in parts for text in self._log(run_id, part)]

    def _log(self, run_id: str, points: list[Any]) -> list[str]:
        """Of points among which some are refused the others are written: each half by itself."""
        try:
            self._connect().log_batch(run_id, metrics=points)
        except Exception as error:
            if not is_final(error):
                raise
            if len(points) == 1:
                return [one_line(error)]
            half = len(points) // 2
            return self._log(run_id, points[:half]) + self._log(run_id, points[half:])
        for point in points:
            if (run_id, point.key) in self._steps:
                self._steps[run_id, point.key].add(point.step)
        return []

    def _held(self, run_id: str, key: str) -> set[int]:
        """The steps at which the run has the metric: those of before a restart are asked for once."""
        if (run_id, key) not in self._steps:
            known = () if run_id == self._fresh else self._connect().get_metric_history(run_id, key)
            self._steps[run_id, key] = {point.step for point in known}
        return self._steps[run_id, key]

    def _seconds(self, run_id: str, record: Points) -> int:
        """From the run's first start to the record."""
        return max(0, (record.milliseconds - int(self._run(run_id).start_time)) // 1000)

    def _experiment(self, run_id: str) -> str:
        return str(self._run(run_id).experiment_id)

    def _run(self, run_id: str) -> Any:
        if run_id not in self._runs:
            self._runs[run_id] = self._connect().get_run(run_id).info
        return self._runs[run_id]


def _show_table(client: Any, run_id: str, name: str) -> None:
    """Names the artifact among those that MLflow's page shows as tables."""
    shown = json.loads(client.get_run(run_id).data.tags.get(_TABLES, "[]"))
    if (entry := {"path": name, "type": "table"}) not in shown:
        client.set_tag(run_id, _TABLES, json.dumps([*shown, entry]))


def _upload(send: Callable[[str, str | None], Any], name: str, write: Callable[[Path], Any]) -> None:
    """Sends the file that `write` writes as `name`, which may stand in folders."""
    folder, _, base = name.rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary) / base)
        send(str(Path(temporary) / base), folder or None)
