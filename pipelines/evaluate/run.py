"""The stage: reads the reference, draws from the deployment, measures, and writes report, grid and MLflow run."""

import hashlib
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from pydantic import Field

from ldm import images, storage
from ldm.autoencoder import Autoencoder
from ldm.config import Location, RequestError, canonical_json
from ldm.features import Features
from ldm.labels import check_guidance
from ldm.metrics import SavedStatistics, read_statistics, write_statistics
from ldm.plan import SamplerConfig, make_plan
from ldm.snapshot import Snapshot, read_snapshot
from ldm.sources import InputShard
from pipelines import lineage
from pipelines.evaluate import asked, networks, report
from pipelines.evaluate.drawing import DrawingConfig, connect, draw
from pipelines.evaluate.figures import Measured, measure, measure_by_statistics
from pipelines.evaluate.kept import FOLDER, Kept
from pipelines.evaluate.memory import pairs_grid
from pipelines.evaluate.reference import Pictures, Reference, find_reference, read_reference
from pipelines.progress import say
from pipelines.tracking import Tracker, TrackingConfig

_SAVED = ".safetensors"
_GRID, _NEAREST, _REPORT = "grid.png", "nearest.png", "report.json"
_SETTINGS = {"num_images", "seed", "holdout", "max_reference", "label", *SamplerConfig.model_fields}


class EvaluateConfig(DrawingConfig):
    """Measures a snapshot against reference pictures."""

    reference: Location | tuple[Location, ...] = Field(
        description="what the model was trained on: image shards (path, URL, glob, comma set, brace range) or a folder "
        "of pictures; or a .safetensors that save_statistics wrote"
    )
    features: Location | None = Field(
        None,
        description="what distances are taken in: classifier (trained on the reference), vae, or the path or URL of a "
        "network from pictures uint8 (N, 3, H, W) to features (N, D), which is code and is RUN: TorchScript (.pt, .ts) "
        "or torch.export (.pt2); null: classifier, or vae where there are no classes",
    )
    save_statistics: Location | None = Field(
        None,
        description=".safetensors to write: mean and covariance of the training pictures' features, for reference=",
    )
    holdout: float = Field(
        0.1, ge=0, lt=1, description="share of the reference, by a hash of the id, that training held out too"
    )
    max_reference: int = Field(20_000, gt=1, description="reference pictures read at most, the first ones")
    label: str = Field(
        "cls", description="what holds the reference's class number: a member's extension, or json.FIELD, as of encode"
    )
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
    """What will be measured. shards: the reference, by name, or none and `statistics`; sizes: their bytes, by URL."""

    snapshot: Snapshot
    shards: dict[str, InputShard]
    sizes: dict[str, int]
    statistics: SavedStatistics | None
    features: str


def plan(config: EvaluateConfig) -> EvaluatePlan:
    """Checks the request without weights and without Ray. Raises RequestError."""
    storage.check_writable("output", config.output)
    snapshot = read_snapshot(config.snapshot)
    saved = config.reference if isinstance(config.reference, str) and config.reference.endswith(_SAVED) else None
    features = networks.choose(config.features, snapshot, config.holdout, by_statistics=saved is not None)
    check_guidance(config.guidance_scale, snapshot)
    make_plan(snapshot.diffusion_config, config)
    _check_saving(config, features, saved)
    if saved is not None:
        statistics = read_statistics(f"reference={saved}", saved)
        return EvaluatePlan(snapshot, {}, {storage.absolute(saved): storage.size(saved)}, statistics, features)
    found, sizes = find_reference(config.reference)
    return EvaluatePlan(snapshot, found, sizes, None, features)


def _check_saving(config: EvaluateConfig, features: str, saved: str | None) -> None:
    target = config.save_statistics
    if target is None:
        return
    if saved is not None or features == networks.CLASSIFIER or not target.endswith(_SAVED):
        raise RequestError(
            f"save_statistics={target}: takes a {_SAVED}, features that stay the same (vae, or a network of yours) and "
            "pictures as the reference"
        )
    storage.check_writable("save_statistics", storage.absolute(target).rpartition("/")[0] or "/")


def evaluate(config: EvaluateConfig, endpoint: str | None = None) -> EvaluateReport:
    """Measures the snapshot, drawing through the deployment at `endpoint` (else config.endpoint), or on Ray.

    The same figures for the same request, on one machine and number of threads. Raises RequestError.
    """
    todo = plan(config)
    client = connect(config, todo.snapshot, endpoint)
    request = _request(config, todo)
    reference = _read_reference(config, todo)
    name, folder = f"evaluate/{storage.name(config.snapshot)}", storage.join(config.output, "tracking")
    asked.forget(config.output, request, (_REPORT, _GRID, _NEAREST))
    with Tracker(config.tracking, name, config, folder=folder) as tracker:
        tracker.used_model(todo.snapshot)
        tracker.dataset(lineage.image_dataset(todo.sizes), "reference")
        autoencoder = todo.snapshot.load_autoencoder("cuda" if torch.cuda.is_available() else "cpu")
        kept = Kept(storage.join(config.output, FOLDER))
        features = networks.make(todo.features, todo.snapshot, reference, autoencoder, config.seed, kept)
        if todo.statistics:
            pictures = todo.snapshot.fingerprint["pictures"]
            todo.statistics.check(f"reference={config.reference}", features.name, pictures)
        drawn = draw(config, todo.snapshot, client)
        samples, rate = drawn.pictures, drawn.images_per_second
        measured = _measure(config, todo, samples, reference, features, autoencoder, kept)
        kept.forget_others()
        say(report.table(measured))
        pages = {_GRID: report.grid(samples, reference, todo.snapshot)}
        if measured.nearest:
            pages[_NEAREST] = pairs_grid(measured.nearest, samples, reference)
        settings = config.model_dump(include=_SETTINGS)
        document = report.document(settings, todo.snapshot, reference, features, measured)
        for page, picture in pages.items():
            storage.write_bytes(storage.join(config.output, page), images.to_png(picture))
            tracker.image(page, picture)
        storage.write_json(storage.join(config.output, _REPORT), document)
        tracked = {f"eval/{name}": value for name, value in measured.metrics.items()}
        tracker.log({**tracked, "perf/images_per_second": rate}, todo.snapshot.images_seen)
        tracker.tag({"snapshot": config.snapshot, "step": str(todo.snapshot.step), "features": features.name})
        tracker.document(_REPORT, document)
    done = EvaluateReport(
        metrics=measured.metrics,
        num_images=len(samples),
        features=features.name,
        run_id=tracker.run_id,
        grid=storage.join(config.output, _GRID),
        report=storage.join(config.output, _REPORT),
        images_per_second=round(rate, 2),
    )
    asked.keep(config.output, request, asdict(done))
    return done


def finished(config: EvaluateConfig) -> EvaluateReport | None:
    """The report of an evaluation of the same snapshot, pictures and settings; None where there is work left.

    Writes nothing. Raises RequestError.
    """
    todo = plan(config)
    kept = asked.kept(config.output, _request(config, todo), needs=(_GRID, _REPORT))
    if kept is None or kept.keys() != {field.name for field in fields(EvaluateReport)}:
        return None
    if config.tracking.enabled and kept["run_id"] is None:
        return None
    if config.save_statistics is not None and not _are_saved(config, todo, kept["features"]):
        return None
    places = {name: storage.join(config.output, file) for name, file in [("grid", _GRID), ("report", _REPORT)]}
    return EvaluateReport(**{**kept, **places, "images_per_second": 0.0})


def _are_saved(config: EvaluateConfig, todo: EvaluatePlan, features: str) -> bool:
    """Whether statistics of this reference in these features, prepared as the snapshot's pictures are, lie there."""
    url = str(config.save_statistics)
    try:
        found = read_statistics(url, url)
        found.check(url, features, todo.snapshot.fingerprint["pictures"])
    except RequestError:  # nothing, or something else
        return False
    return found.reference == _which_pictures(config, todo)


def _request(config: EvaluateConfig, todo: EvaluatePlan) -> dict[str, Any] | None:
    """All that figures depend on; None where a file of somebody else's takes part, which may have changed since."""
    if todo.statistics or config.endpoint is not None or todo.features not in (networks.CLASSIFIER, networks.VAE):
        return None
    return {
        "snapshot": storage.read_json(storage.join(config.snapshot, "snapshot.json")),
        "reference": _shards(todo),
        "features": todo.features,
        "settings": config.model_dump(mode="json", include={*_SETTINGS, "through", "batch_size", "denoiser_type"}),
    }


def _which_pictures(config: EvaluateConfig, todo: EvaluatePlan) -> str:
    """A hash of all that says which pictures of the reference count as training pictures."""
    which = [_shards(todo), config.holdout, config.max_reference]
    return hashlib.sha256(canonical_json(which).encode()).hexdigest()[:16]


def _shards(todo: EvaluatePlan) -> dict[str, list[Any]]:
    return {name: [shard.bytes, shard.etag, _changed(shard)] for name, shard in todo.shards.items()}


def _changed(shard: InputShard) -> int:
    """Moves when a local file is written anew, be it as large as before: ns, the sum over a folder's files."""
    if not storage.is_local(shard.url):
        return 0  # its ETag tells
    files = [storage.join(shard.url, name) for name in shard.files] or [shard.url]
    return sum(storage.local_path(file).stat().st_mtime_ns for file in files)


def _read_reference(config: EvaluateConfig, todo: EvaluatePlan) -> Reference:
    """Raises RequestError where the reference cannot give the figures that are asked for; empty for statistics."""
    if todo.statistics:
        nothing = Pictures(torch.empty(0, 3, *todo.snapshot.picture_shape(), dtype=torch.uint8), None)
        return Reference(nothing, nothing, 0)
    reference = read_reference(todo.shards, todo.snapshot, config.holdout, config.max_reference, config.label)
    found = f"{len(reference.train)} training and {len(reference.holdout)} held-out pictures"
    if len(reference.train) < 2:
        raise RequestError(f"reference={config.reference}: gives {found}; at least 2 training pictures are needed")
    if reference.unlabelled:
        _say_without_labels(config, todo, reference)
    elif todo.features == networks.CLASSIFIER and len(reference.holdout) == 0:
        raise RequestError(f"holdout={config.holdout}: gives {found}; give a larger share, or more pictures")
    return reference


def _say_without_labels(config: EvaluateConfig, todo: EvaluatePlan, reference: Reference) -> None:
    """Raises RequestError where labels are needed."""
    every = len(reference.train) + len(reference.holdout)
    lack = f"{reference.unlabelled:,} of {every:,} reference pictures have no label (label={config.label})"
    if config.features == networks.CLASSIFIER:
        raise RequestError(f"features=classifier: {lack}; give features=vae, or the label that ldm encode was given")
    instead = "in vae, without accuracy" if todo.features == networks.CLASSIFIER else "without recall by class"
    say(f"evaluate: {lack}: measured {instead}")


def _measure(
    config: EvaluateConfig,
    todo: EvaluatePlan,
    samples: Pictures,
    reference: Reference,
    features: Features,
    autoencoder: Autoencoder,
    kept: Kept,
) -> Measured:
    """All figures; and the reference's statistics, where they are to be kept."""
    if todo.statistics:
        gaussian = todo.statistics.gaussian
        say(f"evaluate: measures {len(samples):,} samples against the statistics of {gaussian.count:,} pictures")
        return measure_by_statistics(samples, gaussian, features, config.seed)
    say(f"evaluate: measures {len(samples):,} samples against {len(reference.train):,} training pictures")
    names = todo.snapshot.conditioning.names
    measured = measure(samples, reference, features, autoencoder, names=names, seed=config.seed, kept=kept)
    if config.save_statistics is not None:
        rules, pictures = todo.snapshot.fingerprint["pictures"], _which_pictures(config, todo)
        write_statistics(config.save_statistics, SavedStatistics(measured.gaussian, features.name, rules, pictures))
    return measured
