"""What is written to MLflow, as small records: plain values that can wait in a queue, or in a file as a line of JSON.

Writing a record twice is writing it once, so that what may or may not have arrived is simply sent again.
"""

import base64
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm import images, storage
from pipelines import lineage

_POINTS = 1000  # that MLflow takes at once


@dataclass(frozen=True)
class Points:
    """Metrics at one step. milliseconds: when they were measured, since 1970."""

    metrics: dict[str, float]
    step: int
    milliseconds: int


@dataclass(frozen=True)
class Tags:
    tags: dict[str, str]


@dataclass(frozen=True)
class Status:
    """RUNNING, or how the run ended."""

    status: str


@dataclass(frozen=True)
class UsedDataset:
    """A data set that the run reads or writes, in the role `context`."""

    dataset: lineage.TrackedDataset
    context: str


@dataclass(frozen=True)
class OutputModel:
    """A snapshot that came of the run."""

    model: lineage.TrackedModel


@dataclass(frozen=True)
class UsedModel:
    """The snapshot that the run measures."""

    weights_sha256: str


@dataclass(frozen=True)
class BestModel:
    """Of the snapshots of the run the one that is best by `metric`."""

    weights_sha256: str
    metric: str
    value: float


@dataclass(frozen=True)
class Artifact:
    """A file. content: its bytes, or the pixels of a picture, uint8 (3, H, W), which becomes a PNG when it is sent."""

    name: str
    content: bytes | npt.NDArray[np.uint8]

    def data(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else images.to_png(self.content)


@dataclass(frozen=True)
class Upload:
    """All files below a URL, as artifacts in `folder`: the small ones, which name the others, come last."""

    url: str
    folder: str


Record = Points | Tags | Status | UsedDataset | OutputModel | UsedModel | BestModel | Artifact | Upload
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in Record.__args__}
_NESTED: dict[str, Any] = {"dataset": lineage.TrackedDataset, "model": lineage.TrackedModel}


def to_values(record: Record) -> dict[str, Any]:
    """As plain JSON values: `kind` and the record's fields. Numbers that JSON has not are words, as in "nan"."""
    values = asdict(record)
    if isinstance(record, Artifact):
        values["content"] = base64.b64encode(record.data()).decode()
    if isinstance(record, Points):
        values["metrics"] = {k: v if math.isfinite(v) else str(v) for k, v in record.metrics.items()}
    return {"kind": type(record).__name__, **values}


def from_values(values: dict[str, Any]) -> Record:
    """Raises KeyError, TypeError or ValueError where the values are of no record."""
    kind = _KINDS[values["kind"]]
    found = {field.name: values[field.name] for field in fields(kind)}
    found |= {key: _NESTED[key](**found[key]) for key in _NESTED.keys() & found.keys()}
    if kind is Artifact:
        found["content"] = base64.b64decode(found["content"], validate=True)
    if kind is Points:
        found["metrics"] = {key: float(value) for key, value in found["metrics"].items()}
    record: Record = kind(**found)
    return record


def one_line(error: BaseException) -> str:
    return without_password(" ".join(str(error).split()))[:200] or type(error).__name__


def without_password(text: str) -> str:
    """Text in which no URL names who asks."""
    return re.sub(r"//[^/@\s]*@", "//", text)


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
        self._experiments: dict[str, str] = {}

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
                lineage.write_model(client, run_id, self._experiment(client, run_id), model)
            case UsedModel(weights):
                lineage.write_used_model(client, run_id, self._experiment(client, run_id), weights)
            case BestModel(weights, metric, value):
                lineage.write_best_model(client, run_id, self._experiment(client, run_id), weights, metric, value)
            case Artifact(name):
                _upload(client, run_id, name, lambda file: file.write_bytes(record.data()))
            case Upload(url, folder):
                for name in sorted(storage.list_tree(url), key=lambda name: (name.endswith(".json"), name)):
                    _upload(client, run_id, f"{folder}/{name}", partial(storage.fetch, storage.join(url, name)))

    def _write_points(self, run_id: str, records: Iterable[Points]) -> list[str]:
        from mlflow.entities import Metric

        new: dict[tuple[str, int], Any] = {}
        for record in records:
            for key, value in record.metrics.items():
                if record.step not in self._held(run_id, key):
                    new.setdefault((key, record.step), Metric(key, value, record.milliseconds, record.step))
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
            self._held(run_id, point.key).add(point.step)
        return []

    def _held(self, run_id: str, key: str) -> set[int]:
        """The steps at which the run has the metric: those of before a restart are asked for once."""
        if (run_id, key) not in self._steps:
            known = () if run_id == self._fresh else self._connect().get_metric_history(run_id, key)
            self._steps[run_id, key] = {point.step for point in known}
        return self._steps[run_id, key]

    def _experiment(self, client: Any, run_id: str) -> str:
        if run_id not in self._experiments:
            self._experiments[run_id] = client.get_run(run_id).info.experiment_id
        return self._experiments[run_id]


def _upload(client: Any, run_id: str, name: str, write: Callable[[Path], Any]) -> None:
    """Sends the file that `write` writes as the artifact `name`, which may stand in folders."""
    folder, _, base = name.rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary) / base)
        client.log_artifact(run_id, str(Path(temporary) / base), folder or None)
