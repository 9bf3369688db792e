"""The pictures that are measured: drawn through a deployment or on Ray, kept in OUTPUT/samples, and read from there.

They are the shards of `ldm sample format=webdataset`, so an evaluation that was interrupted goes on with those that are
missing, and the figures are of what lies on the disk.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator

from ldm import storage
from ldm.config import Location, RequestError
from ldm.labels import resolve_labels
from ldm.plan import SamplerConfig
from ldm.provenance import DrawnPicture, make_provenance
from ldm.sample_config import SampleConfig
from ldm.sample_shards import SampleShards
from ldm.sampling import plan
from ldm.snapshot import Snapshot
from pipelines import cluster
from pipelines.evaluate.client import SamplesClient
from pipelines.evaluate.reference import Pictures
from pipelines.evaluate.workers import draw_on_workers
from pipelines.progress import Progress, say

SAMPLES = "samples"
_BATCHES_PER_SHARD = 8  # what a kill costs; enough shards for many workers to end at about the same time


class DrawingConfig(SamplerConfig):
    """What is drawn, and by whom."""

    snapshot: Location = Field(description="what `ldm train` wrote: a snapshot directory or URL")
    output: Location = Field(
        "evaluation", description="directory or URL of report.json, grid.png and the pictures drawn (samples/)"
    )
    num_images: int = Field(500, gt=1, description="number of pictures drawn, the classes in turn")
    seed: int = Field(
        0, ge=0, le=2**53 - 1, description="picture i has seed + i; also of the classifier and the intervals"
    )
    through: Literal["serve", "ray"] = Field(
        "serve",
        description="serve: drawn through a deployment; ray: by workers on Ray, without one, the same pictures for any "
        "number of them",
    )
    endpoint: str | None = Field(
        None, description="of through=serve: URL of a running deployment; null: one is started and stopped"
    )
    batch_size: int = Field(
        32,
        gt=0,
        description="of a worker: pictures in one call; of the deployment that is started: rows in one call, two for a "
        "guided picture. A part of what a picture depends on",
    )
    num_replicas: int = Field(1, gt=0, description="of the deployment that is started: replicas")
    num_workers: int | None = Field(
        None, gt=0, description="of through=ray: workers; null: one for each CPU core, or GPU, of the cluster"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where replicas or workers run")
    denoiser_type: str | None = Field(None, description="package:Class, for a snapshot of your own denoiser class")

    @field_validator("endpoint")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("is no URL of a deployment; give one such as http://127.0.0.1:8000")
        return value

    @model_validator(mode="after")
    def _is_of_its_way(self) -> "DrawingConfig":
        if self.through == "ray" and self.endpoint is not None:
            raise ValueError(f"endpoint={self.endpoint}: is of through=serve; leave one of them out")
        if self.through == "ray" and self.num_replicas != 1:
            raise ValueError(f"num_replicas={self.num_replicas}: is of through=serve; give num_workers")
        if self.through == "serve" and self.num_workers is not None:
            raise ValueError(f"num_workers={self.num_workers}: is of through=ray; give it, or num_replicas")
        return self


@dataclass(frozen=True)
class Drawn:
    """images_per_second: of what was drawn now; 0 where all was there."""

    pictures: Pictures
    images_per_second: float


def connect(config: DrawingConfig, snapshot: Snapshot, endpoint: str | None) -> SamplesClient | None:
    """A client of a deployment that serves this very snapshot, at `endpoint` (else config.endpoint); None for
    through=ray. Raises RequestError."""
    if config.through == "ray":
        return None
    endpoint = endpoint or config.endpoint
    if endpoint is None:
        raise RequestError("endpoint=null: nothing is drawn from; give the URL that `ldm serve` prints")
    client = SamplesClient(endpoint, snapshot.weights_sha256)
    if client.model["weights_sha256"] != snapshot.weights_sha256:
        other = f"{client.model['snapshot']} (step {client.model['step']})"
        raise RequestError(f"endpoint={endpoint}: serves {other}, not snapshot={snapshot.url} (step {snapshot.step})")
    return client


def draw(config: DrawingConfig, snapshot: Snapshot, client: SamplesClient | None) -> Drawn:
    """Exactly `num_images` pictures: those that are missing in OUTPUT/samples are drawn, then all are read.

    Memory: N pictures, uint8 (50,000 of 256 px: 10 GB). Raises RequestError; DamagedError where a shard is not what was
    drawn.
    """
    with cluster.ray_session() if client is None else contextlib.nullcontext():
        request = _request(config, client)
        shards = _shards(request, snapshot, client)
        _claim(shards)
        missing = shards.missing()
        left, started = sum(map(len, missing)), time.monotonic()
        with Progress("evaluate: sampling", config.num_images, "pictures", config.num_images - left) as progress:
            if missing and client is None:
                draw_on_workers(request, shards, missing, config.num_workers, progress.advance)
            elif missing and client is not None:
                _draw_through(client, request, snapshot, shards, missing, progress.advance)
        rate = left / (time.monotonic() - started)
        storage.sweep(shards.url)  # what a killed worker left
    return Drawn(_read(shards, snapshot), rate)


def _request(config: DrawingConfig, client: SamplesClient | None) -> SampleConfig:
    """What `ldm sample` would be asked for. The partition does not depend on who draws."""
    return SampleConfig(
        **config.model_dump(include={*SamplerConfig.model_fields, "num_images", "seed", "denoiser_type"}),
        snapshot=storage.absolute(config.snapshot),  # workers may stand in another folder
        output=storage.join(storage.absolute(config.output), SAMPLES),
        format="webdataset",
        samples_per_shard=_BATCHES_PER_SHARD * config.batch_size,
        batch_size=config.batch_size,
        device="auto" if client is not None else cluster.resolve_device(config.device),
    )


def _shards(request: SampleConfig, snapshot: Snapshot, client: SamplesClient | None) -> SampleShards:
    shards = replace(plan(request).shards(request), stage="evaluate")
    if client is None:
        return shards
    keys = {*SamplerConfig.model_fields, "denoiser_type"}
    settings = request.model_dump(mode="json", include=keys, exclude_none=True)
    return replace(shards, settings={**settings, "through": "serve", **client.settings})


def _claim(shards: SampleShards) -> None:
    """Makes the folder that of this request. What another evaluation drew there goes, as its report does."""
    if (other := shards.other()) is not None and other.get("stage") == shards.stage:
        say(f"evaluate: draws anew, for {shards.url} holds those of another request ({shards.difference(other)})")
        storage.remove(shards.url)
    shards.claim()


def _draw_through(
    client: SamplesClient,
    request: SampleConfig,
    snapshot: Snapshot,
    shards: SampleShards,
    missing: list[range],
    advance: Callable[[int], None],
) -> None:
    """One stream of all pictures that are missing, cut into shards."""
    numbers = torch.tensor([number for part in missing for number in part])
    labels = resolve_labels(None, snapshot.conditioning, shards.num_images)
    asked = None if labels is None else labels[numbers]
    settings = request.model_dump(mode="json", include={*SamplerConfig.model_fields})
    stream = client.draw(asked, request.seed + numbers, **settings)

    def batches(part: range) -> Iterator[list[DrawnPicture]]:
        for number, pixels in zip(part, stream, strict=False):
            seed, label = request.seed + number, None if labels is None else int(labels[number])
            about = make_provenance(snapshot, shards.settings, seed, label)
            yield [DrawnPicture(number, seed, label, pixels.numpy(), about)]
            advance(1)

    for part in missing:
        shards.write(part, batches(part))


def _read(shards: SampleShards, snapshot: Snapshot) -> Pictures:
    shape = snapshot.picture_shape()
    pixels = torch.empty((shards.num_images, 3, *shape), dtype=torch.uint8)
    labels = torch.empty(shards.num_images, dtype=torch.int64)
    for part in shards.parts:
        for picture in shards.read(part, shape):
            pixels[picture.number] = torch.from_numpy(picture.pixels.copy())
            labels[picture.number] = -1 if picture.label is None else picture.label
    return Pictures(pixels, None if snapshot.conditioning.type == "none" else labels)
