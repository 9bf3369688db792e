"""What is written to MLflow, as small records: plain values that can wait in a queue, or in a file as a line of JSON.

Writing a record twice is writing it once, so that what may or may not have arrived is simply sent again.
"""

import base64
import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines import lineage
from pipelines.tracking_files import encode_picture


@dataclass(frozen=True)
class Points:
    """Metrics at one step; None: the seconds since the run began. milliseconds: when they were measured, since 1970."""

    metrics: dict[str, float]
    step: int | None
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
class Candidate:
    """That best snapshot for the registered model `name`. measured_on: values of other samples do not compare."""

    weights_sha256: str
    name: str
    metric: str
    value: float
    measured_on: str


@dataclass(frozen=True)
class Score:
    """The run's metrics of a group at a step are those of the model with these weights, measured on a data set."""

    weights_sha256: str
    step: int
    group: str
    dataset_name: str | None
    dataset_digest: str | None

    @classmethod
    def of(cls, weights_sha256: str, step: int, group: str, dataset: lineage.TrackedDataset | None) -> "Score":
        named = (None, None) if dataset is None else (dataset.name, dataset.digest)
        return cls(weights_sha256, step, group, *named)


@dataclass(frozen=True)
class GoneModels:
    """Snapshots of the run that are there no more."""

    weights_sha256: list[str]


@dataclass(frozen=True)
class ShownTable:
    """An artifact that is a table."""

    name: str


@dataclass(frozen=True)
class Artifact:
    """A file. content: its bytes, or the pixels of a picture, uint8 (3, H, W), which is encoded when it is sent."""

    name: str
    content: bytes | npt.NDArray[np.uint8]

    def data(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else encode_picture(self.name, self.content)


@dataclass(frozen=True)
class Upload:
    """A snapshot, whole, into its logged model, from which MLflow then loads it."""

    url: str
    weights_sha256: str


Record = (
    Points
    | Tags
    | Status
    | UsedDataset
    | OutputModel
    | UsedModel
    | BestModel
    | Candidate
    | Score
    | GoneModels
    | ShownTable
    | Artifact
    | Upload
)
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
