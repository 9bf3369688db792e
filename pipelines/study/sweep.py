"""`ldm study sweep`: one model, drawn with every combination of steps, η, guidance and sampler.

The question of the DDIM paper's table 1 (arXiv 2010.02502), on the user's own model: what does a step more buy?
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from ldm import storage
from ldm.config import Location, RequestError, validate
from ldm.denoiser import BUILT_IN, DenoiserConfig, build_denoiser
from ldm.labels import check_guidance
from ldm.plan import Sampler, SamplerConfig, SamplingPlan, Spacing, make_plan
from ldm.snapshot import Snapshot, read_snapshot
from ldm.sources import InputShard
from ldm.steps import Eta
from pipelines import cluster, lineage, plots
from pipelines.evaluate.reference import find_reference
from pipelines.progress import Progress, counted, say
from pipelines.study.arms import Arms
from pipelines.study.config import StudyConfig, Values
from pipelines.study.drawing import check_workers, draw_all
from pipelines.study.forecast import drawing_seconds
from pipelines.study.outcome import StudyPlan, StudyReport, save_strip, strips_grid, study_run, write_outcome
from pipelines.study.quality import make_quality, stands
from pipelines.study.reference import check_features, check_labels
from pipelines.study.table import Row

STUDY = "sweep"
_AXES = {"sampler": "sampler", "eta": "eta", "guidance_scale": "guidance_scale", "steps": "num_inference_steps"}
"""Keys of the study, and of a `SamplerConfig`; the last one varies fastest."""
_ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")
_REQUEST = ("num_images", "features", "holdout", "max_reference", "seed", "batch_size", "spacing", "precision")


class SweepConfig(StudyConfig):
    """Sweeps the sampler's settings on one snapshot: quality against steps and against seconds."""

    snapshot: Location = Field(description="what `ldm train` wrote: a snapshot directory or URL")
    reference: Location | tuple[Location, ...] = Field(
        description="image shards that the model was trained on: path, URL, glob, comma set or brace range"
    )
    output: Location = Field(
        "study-sweep", description="directory or URL; run again, what is done there is not done again"
    )
    steps: Values[int] = Field((10, 25, 50), description="sampling steps, several")
    eta: Values[Eta] = Field((0.0,), description="of ddim, several: 0 to 1, or sigma_hat")
    guidance_scale: Values[float] = Field((1.0,), description="classifier-free guidance, several; 1: none")
    sampler: Values[Sampler] | None = Field(
        None, description="several of ddim, ddpm, dpmpp_2m; of a flow euler, heun. null: ddim, or euler"
    )
    spacing: Spacing | None = Field(None, description="of the timesteps, of all; null: as `ldm sample` has it")
    num_workers: int = Field(1, gt=0, description="Ray workers; one combination at a time on each, which is timed")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="what the denoiser computes in")
    denoiser_type: str | None = Field(None, description="package:Class, for a snapshot of your own denoiser class")


@dataclass(frozen=True)
class SweepPlan:
    """What will be drawn. left_out: combinations that cannot be, or are the same as others, with the reason."""

    snapshot: Snapshot
    shards: dict[str, InputShard]
    sizes: dict[str, int]
    cells: dict[str, SamplerConfig]
    left_out: list[str]
    arms: Arms

    @property
    def done(self) -> list[str]:
        return [name for name in self.cells if self.arms.done(name)]


def plan(config: SweepConfig) -> SweepPlan:
    """Checks the whole request without weights, and asks a cluster what it has. Raises RequestError."""
    snapshot = read_snapshot(config.snapshot)
    _check_denoiser(config, snapshot)
    check_features(config, snapshot.conditioning.num_classes)
    inputs, sizes = find_reference(config.reference)
    check_labels(config, inputs, "reference")
    cells, left_out = combinations(config, snapshot)
    request = {
        "weights_sha256": snapshot.weights_sha256,
        "reference": lineage.image_dataset(sizes).digest,
        **config.model_dump(mode="json", include=set(_REQUEST)),
    }
    todo = SweepPlan(snapshot, inputs, sizes, cells, left_out, Arms(config.output, STUDY, request))
    if missing := len(cells) - len(todo.done):
        check_workers(config.device, min(config.num_workers, missing))
    return todo


def _check_denoiser(config: SweepConfig, snapshot: Snapshot) -> None:
    """Raises RequestError where workers could not build the snapshot's own class of denoiser."""
    if snapshot.denoiser["type"] in BUILT_IN:
        return
    if config.denoiser_type is None:
        raise RequestError(
            f"denoiser_type=null: {snapshot.url} was trained with a class of its own; "
            "give denoiser_type=package.module:Class"
        )
    channels, height, width = snapshot.latent_shape
    try:
        own = validate(DenoiserConfig, {**snapshot.denoiser, "type": config.denoiser_type})
        with torch.device("meta"):
            build_denoiser(
                own,
                in_channels=channels,
                sample_size=(height, width),
                num_classes=snapshot.conditioning.num_classes or None,
            )
    except RequestError as error:
        raise RequestError(re.sub("^(denoiser[.])?type=", "denoiser_type=", str(error))) from None


def dry_run(config: SweepConfig) -> StudyPlan:
    """Checks the request; the combinations, and about how long they take."""
    todo = plan(config)
    missing = [settings for name, settings in todo.cells.items() if name not in todo.done]
    seconds, note = drawing_seconds(todo.snapshot, missing, config.num_images, config.num_workers)
    return StudyPlan(STUDY, list(todo.cells), todo.done, seconds, [*todo.left_out, note])


def run(config: SweepConfig) -> StudyReport:
    """Draws and measures what is missing; then the table, the plots and the grid of all. Raises RequestError."""
    todo = plan(config)
    for line in todo.left_out:
        say(f"study: {line}")
    arms, before = todo.arms, len(todo.done)
    with study_run(config, arms) as tracker:
        tracker.used_model(todo.snapshot)
        tracker.dataset(lineage.image_dataset(todo.sizes), "reference")
        if before < len(todo.cells):
            before = _draw_missing(config, todo)
        rows = _rows(todo)
        figures = {**_plots(rows), "grid.png": strips_grid(arms, [row["name"] for row in rows])}
        return write_outcome(arms, tracker, rows, _summary(rows), figures, list(todo.cells), before)


def _draw_missing(config: SweepConfig, todo: SweepPlan) -> int:
    """Returns the number of combinations that were there before, and stay."""
    quality = make_quality(config, todo.shards, todo.snapshot, todo.snapshot.load_autoencoder)
    cells = {name: settings for name, settings in todo.cells.items() if not stands(todo.arms.done(name), quality)}
    cells = dict(sorted(cells.items(), key=lambda cell: cell[1].num_inference_steps))  # first what is soon done
    before = len(todo.cells) - len(cells)
    if before < len(todo.done):
        say(f"study: {len(todo.done) - before} combinations were measured in other features, and are done again")
    options = {"denoiser_type": config.denoiser_type, "precision": config.precision}
    config = config.model_copy(update={"snapshot": storage.absolute(config.snapshot)})
    with (
        cluster.ray_session(),
        Progress("study", len(todo.cells), "combinations", before) as progress,
    ):
        for name, drawn in draw_all(cells, config.snapshot, config, quality, config.num_workers, **options):
            save_strip(todo.arms, name, drawn.first)
            todo.arms.finish(name, {**_settings(todo.cells[name]), **drawn.row(config, quality)})
            progress.advance(1, f"{name}: {quality.name} {drawn.figures['fd']:.4g}")
    return before


def combinations(config: SweepConfig, snapshot: Snapshot) -> tuple[dict[str, SamplerConfig], list[str]]:
    """(settings by name, a line for each combination that is left out).

    η is of ddim alone, say: a combination that cannot be is left out, and one that would draw the very pictures of
    another. Raises RequestError, all in one line, for values that no combination can have.
    """
    axes: dict[str, Sequence[Any]] = {
        "sampler": config.sampler or ("euler" if snapshot.diffusion_config.is_flow else "ddim",),
        "eta": config.eta,
        "guidance_scale": config.guidance_scale,
        "steps": config.steps,
    }
    cells: dict[str, SamplerConfig] = {}
    known: dict[tuple[SamplingPlan, float], str] = {}
    refused: dict[tuple[Any, ...], str] = {}
    for values in itertools.product(*(dict.fromkeys(axis) for axis in axes.values())):
        asked = {_AXES[axis]: value for axis, value in zip(axes, values, strict=True)}
        try:
            settings = validate(SamplerConfig, {**asked, "spacing": config.spacing})
            check_guidance(settings.guidance_scale, snapshot)
            same = (make_plan(snapshot.diffusion_config, settings), settings.guidance_scale)
        except RequestError as error:
            refused[values] = str(error)
            continue
        if same in known:
            refused[values] = f"draws what {known[same]} draws"
            continue
        known[same] = name = _name(settings)
        cells[name] = settings
    _check_values(axes, refused)
    return cells, [f"left out: {_shown(axes, values)}: {why}" for values, why in refused.items()]


def _check_values(axes: dict[str, Sequence[Any]], refused: dict[tuple[Any, ...], str]) -> None:
    """Raises RequestError where all combinations of some value are refused: nothing would come of what was asked."""
    reasons = []
    for place, (axis, values) in enumerate(axes.items()):
        others = math.prod(len(set(other)) for name, other in axes.items() if name != axis)
        for value in dict.fromkeys(values):
            why = [reason for combination, reason in refused.items() if combination[place] == value]
            if len(why) == others:
                reasons.append(f"{axis}={value}: {why[0]}" if why[0].startswith("draws") else why[0])
    if reasons:
        named = (reason.replace(f"{_AXES['steps']}=", "steps=", 1) for reason in dict.fromkeys(reasons))
        raise RequestError("; ".join(named))


def _name(settings: SamplerConfig) -> str:
    eta = _eta(settings)
    noise = [] if eta is None else [eta if isinstance(eta, str) else f"eta{eta:g}"]
    parts = [settings.sampler, *noise, f"g{settings.guidance_scale:g}", f"s{settings.num_inference_steps}"]
    return "-".join(map(str, parts))


def _eta(settings: SamplerConfig) -> float | str | None:
    """The η of the pictures, whatever was asked: DDPM is DDIM's η of 1 (DDIM, section 4.1); the others have none."""
    if settings.sampler == "ddpm" and settings.eta != "sigma_hat":
        return 1.0
    return settings.eta if settings.sampler in ("ddim", "ddpm") else None


def _shown(axes: dict[str, Sequence[Any]], values: tuple[Any, ...]) -> str:
    return " ".join(f"{axis}={value}" for axis, value in zip(axes, values, strict=True))


def _settings(settings: SamplerConfig) -> Row:
    return {axis: getattr(settings, key) for axis, key in _AXES.items()} | {"eta": _eta(settings)}


def _rows(todo: SweepPlan) -> list[Row]:
    """The table of all combinations that are there, also of earlier commands, by settings; those are marked that no
    other of those timed alike beats in both seconds and distance."""
    found = {name: todo.arms.done(name) or {} for name in [*todo.cells, *todo.arms.names()]}
    features = found[next(iter(todo.cells))]["features"]
    rows = [{"name": name, **row} for name, row in found.items() if row.get("features") == features]
    rows.sort(key=lambda row: (row["sampler"], str(row["eta"]), row["guidance_scale"], row["steps"]))
    for alike in _timed_alike(rows).values():
        front = plots.pareto_front([row["seconds_per_picture"] for row in alike], [row["fd"] for row in alike])
        for number, row in enumerate(alike):
            row["pareto"] = number in front
    return rows


def _timed_alike(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by what they were timed on: seconds of another device, or of more threads, say nothing of a setting."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["device"], row["threads"]), []).append(row)
    return {f"{device}, {counted(threads, 'thread')}": found[device, threads] for device, threads in sorted(found)}


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    best = min(rows, key=lambda row: float(row["fd"]))
    groups = _timed_alike(rows)
    fronts = {
        "front" if len(groups) == 1 else f"front ({where})": ", ".join(row["name"] for row in alike if row["pareto"])
        for where, alike in groups.items()
    }
    return {"features": best["features"], "floor": best["floor"], "best": best["name"], **fronts}


def _plots(rows: Sequence[Row]) -> dict[str, bytes]:
    """The distance against steps, with the floor, and against seconds, with the front, for each way of timing; accuracy
    where there is one."""
    lines = _lines(rows)
    features, steps = rows[0]["features"], sorted({row["steps"] for row in rows})
    curves = {name: _columns(found, "steps", "fd", "fd_low", "fd_high") for name, found in lines.items()}
    curves["floor (held-out pictures)"] = (steps, [rows[0]["floor"]] * len(steps))
    figures = {"steps.png": plots.line(curves, "sampling steps", features, "Quality against steps", log_x=True)}
    groups = _timed_alike(rows)
    for number, (where, alike) in enumerate(groups.items(), start=1):
        clouds = {
            name: (*_columns(found, "seconds_per_picture", "fd"), [f"{row['steps']} steps" for row in found])
            for name, found in _lines(alike).items()
        }
        file = "seconds.png" if number == 1 else f"seconds-{number}.png"
        title = "Quality against time" + (f" ({where})" if len(groups) > 1 else "")
        figures[file] = plots.scatter_front(clouds, "seconds a picture", features, title, log_x=True)
    if all("accuracy" in row for row in rows):
        shares = {name: _columns(found, "steps", *_ACCURACY) for name, found in lines.items()}
        title = "Pictures read as asked (95% interval)"
        figures["accuracy.png"] = plots.line(shares, "sampling steps", "accuracy", title, log_x=True)
    return figures


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """A curve for each way to sample, over the steps."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        eta = "" if row["eta"] is None else f" η={row['eta']}"
        lines.setdefault(f"{row['sampler']}{eta} g={row['guidance_scale']:g}", []).append(row)
    return lines


def _columns(rows: Sequence[Row], *keys: str) -> Any:
    return tuple([row[key] for row in rows] for key in keys)
