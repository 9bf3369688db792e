"""The stage: reads the reference, draws from the deployment, measures, and writes report, grid and MLflow run."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from ldm import images, shards, storage
from ldm.classifier import Classifier, train_classifier
from ldm.config import Location, RequestError
from ldm.labels import check_guidance
from ldm.plan import SamplerConfig, make_plan
from ldm.snapshot import Snapshot, read_snapshot
from pipelines import lineage
from pipelines.evaluate import measures
from pipelines.evaluate.drawing import DrawingConfig, connect, draw
from pipelines.evaluate.reference import Pictures, Reference, read_reference
from pipelines.progress import Progress, say
from pipelines.tracking import Tracker, TrackingConfig

_GRID_COLUMNS, _GRID_ROWS, _GRID_BAND = 10, 4, 8


class EvaluateConfig(DrawingConfig):
    """Measures a snapshot against reference pictures."""

    reference: Location | tuple[Location, ...] = Field(
        description="image shards that the model was trained on: path, URL, glob, comma set or brace range"
    )
    features: Literal["classifier", "vae"] = Field(
        "classifier",
        description="what distances are taken in: a classifier trained on the reference, or the latents of the VAE",
    )
    holdout: float = Field(
        0.1, ge=0, lt=1, description="share of the reference, by a hash of the id, that training held out too"
    )
    max_reference: int = Field(20_000, gt=1, description="reference pictures read at most, the first ones")
    tracking: TrackingConfig = TrackingConfig()


@dataclass(frozen=True)
class EvaluateReport:
    """What scripts may rely on. features: with the hash of the weights; the Fréchet distance is `fd-FEATURES`."""

    metrics: dict[str, float]
    num_images: int
    features: str
    run_id: str | None
    grid: str
    report: str
    images_per_second: float


@dataclass(frozen=True)
class EvaluatePlan:
    """What will be measured. shards: names and URLs of the reference; sizes: their bytes, by URL."""

    snapshot: Snapshot
    shards: dict[str, str]
    sizes: dict[str, int]


def plan(config: EvaluateConfig) -> EvaluatePlan:
    """Checks the request without weights and without Ray. Raises RequestError."""
    storage.check_writable("output", config.output)
    snapshot = read_snapshot(config.snapshot)
    unconditional = snapshot.conditioning.type == "none"
    if unconditional and config.features == "classifier":
        raise RequestError("features=classifier: the model is unconditional; give features=vae")
    check_guidance(config.guidance_scale, snapshot)
    if config.features == "classifier" and config.holdout == 0:
        raise RequestError(
            "holdout=0.0: the classifier's own accuracy needs pictures that it never saw; give 0.1, or features=vae"
        )
    make_plan(snapshot.diffusion_config, config)
    try:
        urls = shards.shard_names(storage.expand(config.reference))
    except RequestError as error:
        raise RequestError(str(error).replace("source=", "reference=", 1)) from None
    sizes = {url: storage.size(url) for url in urls.values()}
    for url, size in sizes.items():
        if size == 0:
            raise RequestError(f"reference={url}: is empty; give a WebDataset tar that holds pictures")
    return EvaluatePlan(snapshot, urls, sizes)


def evaluate(config: EvaluateConfig, endpoint: str | None = None) -> EvaluateReport:
    """Measures the snapshot, drawing through the deployment at `endpoint` (else config.endpoint), or on Ray.

    The same figures for the same request, on one machine and number of threads. Raises RequestError.
    """
    todo = plan(config)
    client = connect(config, todo.snapshot, endpoint)
    reference = read_reference(todo.shards, todo.snapshot, config.holdout, config.max_reference)
    _check_reference(config, reference)
    name, folder = f"evaluate/{storage.name(config.snapshot)}", storage.join(config.output, "tracking")
    with Tracker(config.tracking, name, config, folder=folder) as tracker:
        tracker.used_model(todo.snapshot)
        tracker.dataset(lineage.image_dataset(todo.sizes), "reference")
        features = _features(config, todo.snapshot, reference)
        drawn = draw(config, todo.snapshot, client)
        samples, rate = drawn.pictures, drawn.images_per_second
        say(f"evaluate: measures {len(samples):,} samples against {len(reference.train):,} training pictures")
        figures = _measure(config, samples, reference, features)
        grid = _grid(samples, reference, todo.snapshot)
        document = _document(config, todo.snapshot, reference, features, figures)
        report_url, grid_url = storage.join(config.output, "report.json"), storage.join(config.output, "grid.png")
        storage.write_bytes(grid_url, images.to_png(grid))
        storage.write_json(report_url, document)
        tracked = {f"eval/{name}": value for name, value in figures.metrics.items()}
        tracker.log({**tracked, "perf/images_per_second": rate}, todo.snapshot.images_seen)
        tracker.tag({"snapshot": config.snapshot, "step": str(todo.snapshot.step), "features": features.name})
        tracker.image("grid.png", grid)
        tracker.document("report.json", document)
    return EvaluateReport(
        metrics=figures.metrics,
        num_images=len(samples),
        features=features.name,
        run_id=tracker.run_id,
        grid=grid_url,
        report=report_url,
        images_per_second=round(rate, 2),
    )


def _check_reference(config: EvaluateConfig, reference: Reference) -> None:
    """Raises RequestError where the reference cannot give the figures that are asked for."""
    found = f"{len(reference.train)} training and {len(reference.holdout)} held-out pictures"
    if len(reference.train) < 2:
        raise RequestError(f"reference={config.reference}: gives {found}; at least 2 training pictures are needed")
    if config.features == "classifier" and reference.train.labels is None:
        raise RequestError("features=classifier: the reference holds pictures without a label; give features=vae")
    if config.features == "classifier" and len(reference.holdout) == 0:
        raise RequestError(f"holdout={config.holdout}: gives {found}; give a larger share, or more pictures")


def _features(config: EvaluateConfig, snapshot: Snapshot, reference: Reference) -> measures.Features:
    """The VAE of the snapshot, or a classifier trained on the reference's training split."""
    if config.features == "vae":
        return measures.VaeFeatures(snapshot.load_autoencoder("cuda" if torch.cuda.is_available() else "cpu"))
    train, holdout = reference.train, reference.holdout
    assert train.labels is not None and holdout.labels is not None
    with Progress("evaluate: training the classifier", 100, "%") as progress:
        classifier = train_classifier(
            train.pixels,
            train.labels,
            snapshot.conditioning.num_classes,
            seed=config.seed,
            progress=lambda step, steps: progress.advance_to(100 * step // steps),
        )
    accuracy = classifier.accuracy(holdout.pixels, holdout.labels)
    say(f"evaluate: the classifier reads {accuracy:.1%} of {len(holdout):,} held-out pictures right")
    return classifier


def _measure(
    config: EvaluateConfig, samples: Pictures, reference: Reference, features: measures.Features
) -> measures.Figures:
    """All figures that the request and the reference allow."""
    figures = {
        **measures.frechet_distances(samples, reference, features, config.seed),
        **measures.nearest_distances(samples, reference),
    }
    by_class: dict[int, dict[str, Any]] = {}
    parts = []
    if isinstance(features, Classifier):
        parts.append(measures.conditional_accuracy(samples, reference, features, config.seed))
    if reference.train.labels is not None and len(reference.holdout):
        parts.append(measures.class_recall(samples, reference, config.seed))
    for part in parts:
        figures |= part.metrics
        for row in part.by_class:
            by_class.setdefault(row["class"], {}).update(row)
    return measures.Figures(figures, [by_class[label] for label in sorted(by_class)])


def _document(
    config: EvaluateConfig,
    snapshot: Snapshot,
    reference: Reference,
    features: measures.Features,
    figures: measures.Figures,
) -> dict[str, Any]:
    """report.json: the figures, and all that they depend on."""
    settings = {"num_images", "seed", "holdout", "max_reference", *SamplerConfig.model_fields}
    names = snapshot.conditioning.names
    return {
        "format": "ldm-evaluation",
        "version": 1,
        "snapshot": {
            "url": snapshot.url,
            "step": snapshot.step,
            "images_seen": snapshot.images_seen,
            "weights_sha256": snapshot.weights_sha256,
        },
        "settings": config.model_dump(include=settings),
        "reference": {
            "train": len(reference.train),
            "holdout": len(reference.holdout),
            "skipped": reference.skipped,
            "pictures": snapshot.fingerprint["pictures"],
        },
        "features": features.name,
        "recall": {"neighbours": measures.NEIGHBOURS, "pixels": measures.COMPARED_SIZE},
        "metrics": figures.metrics,
        "by_class": [{**row, "name": names[row["class"]]} if names else row for row in figures.by_class],
    }


def _grid(samples: Pictures, reference: Reference, snapshot: Snapshot) -> npt.NDArray[np.uint8]:
    """uint8 (3, H, W): real pictures on top, held out where there are enough, and sampled ones below."""
    real = reference.holdout if len(reference.holdout) >= _GRID_COLUMNS * _GRID_ROWS else reference.train
    columns = min(snapshot.conditioning.num_classes or _GRID_COLUMNS, _GRID_COLUMNS)
    top, below = (images.grid(_rows(pictures, columns).numpy(), columns) for pictures in (real, samples))
    band = np.full((3, _GRID_BAND, top.shape[2]), 255, np.uint8)
    return np.concatenate([top, band, below], axis=1)


def _rows(pictures: Pictures, columns: int) -> torch.Tensor:
    """uint8 (rows * columns, 3, H, W): a class in each column where there are labels; white where one has no more."""
    chosen = torch.full((_GRID_ROWS * columns, *pictures.pixels.shape[1:]), 255, dtype=torch.uint8)
    if pictures.labels is None:
        first = pictures.pixels[: len(chosen)]
        chosen[: len(first)] = first
        return chosen
    for label in range(columns):
        found = pictures.pixels[pictures.labels == label][:_GRID_ROWS]
        chosen[label : len(found) * columns : columns] = found
    return chosen
