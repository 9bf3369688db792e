"""`ldm study scaling`: the loss on held-out latents against model size, compute and data, and the power laws in it.

A grid of DiTs and of nested shares of the data; one recipe for all. As Kaplan et al. 2020 (arXiv 2001.08361) did for
language, and Peebles & Xie 2022 (arXiv 2212.09748, figures 8 and 9) for DiTs by FLOPs.
"""

import contextlib
import re
from dataclasses import dataclass

from pydantic import Field, field_validator

from ldm import storage
from ldm.config import Location, RequestError, validate
from ldm.denoiser import DenoiserConfig
from ldm.latents.choice import hashed_between
from ldm.latents.manifest import Manifest, read_manifest
from ldm.plan import make_plan
from ldm.snapshot import read_snapshot
from ldm.sources import InputShard
from pipelines import cluster, lineage
from pipelines.evaluate.reference import find_reference
from pipelines.progress import say
from pipelines.study.arms import Arms
from pipelines.study.config import Values
from pipelines.study.drawing import draw_all
from pipelines.study.forecast import NOTE, denoiser_cost, flops_per_second
from pipelines.study.laws import fits_of, plots_of
from pipelines.study.outcome import StudyPlan, StudyReport, save_strip, strips_grid, study_run, write_outcome
from pipelines.study.quality import Quality, make_quality, stands
from pipelines.study.reference import check_features, check_labels
from pipelines.study.table import Row
from pipelines.study.training import TrainedConfig, check_sampler, train_anew, train_config
from pipelines.tracking import Tracker
from pipelines.train import TrainConfig
from pipelines.train import plan as plan_train
from pipelines.train.config import ValidationConfig
from pipelines.train.record import validations

STUDY = "scaling"
_VALIDATIONS = 8
_HEAD_WIDTH = 64


class ScalingConfig(TrainedConfig):
    """Fits power laws of the validation loss in model size, compute and data."""

    latents: Location = Field(description="latent dataset: what `ldm encode` wrote")
    reference: Location | tuple[Location, ...] | None = Field(
        None, description="image shards, to measure pictures too; null: the loss alone"
    )
    output: Location = Field(
        "study-scaling", description="directory or URL; run again, what is done there is not done again"
    )
    sizes: Values[str] = Field(
        ("64x2", "128x4", "256x6"), description="DiTs as WIDTHxDEPTH, several; heads of 64, as in the paper"
    )
    fractions: Values[float] = Field(
        (0.25, 0.5, 1.0), description="shares of the training data, several; the smaller ones lie in the larger ones"
    )
    max_steps: int = Field(
        400, ge=_VALIDATIONS, description=f"optimizer steps of each arm, a multiple of {_VALIDATIONS}"
    )
    validation_images: int = Field(256, gt=0, description="held-out samples that the loss is of, at most")
    denoiser: DenoiserConfig = DenoiserConfig()

    @field_validator("sizes")
    @classmethod
    def _are_sizes(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", value):
                raise ValueError(f"{value} is no WIDTHxDEPTH; give such as 128x4")
        return values

    @field_validator("fractions")
    @classmethod
    def _are_shares(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < value <= 1 for value in values):
            raise ValueError("must be above 0 and at most 1")
        return values

    @field_validator("max_steps")
    @classmethod
    def _divides(cls, value: int) -> int:
        if value % _VALIDATIONS:
            raise ValueError(f"must be a multiple of {_VALIDATIONS}, so often the loss is taken; give {value // 8 * 8}")
        return value


@dataclass(frozen=True)
class Arm:
    """One model on one share of the data."""

    size: str
    fraction: float

    @property
    def name(self) -> str:
        return f"{self.size}-data{self.fraction:g}"


@dataclass(frozen=True)
class Plan:
    """What will be trained. runs: by the arm's name."""

    manifest: Manifest
    shards: dict[str, InputShard]
    todo: list[Arm]
    runs: dict[str, TrainConfig]
    arms: Arms

    @property
    def done(self) -> list[str]:
        return self.arms.alike([arm.name for arm in self.todo])


def plan(config: ScalingConfig) -> Plan:
    """Checks the whole request without Ray. Raises RequestError."""
    manifest = read_manifest(config.latents)
    if config.denoiser.type != "dit":
        raise RequestError(f"denoiser.type={config.denoiser.type}: sizes are widths and depths of a DiT; leave it out")
    check_sampler(config)
    inputs: dict[str, InputShard] = {}
    digest = None
    if config.reference is not None:
        check_features(config, manifest.conditioning.num_classes)
        inputs, sizes = find_reference(config.reference)
        check_labels(config, inputs, "reference")
        digest = lineage.image_dataset(sizes).digest
    apart = {"output", "latents", "sizes", "fractions", "device", "tracking"}
    request = {
        **config.model_dump(mode="json", exclude=apart),
        "generation": manifest.generation,
        "reference": digest,
    }
    arms = Arms(config.output, STUDY, request)
    todo = [Arm(size, share) for size in dict.fromkeys(config.sizes) for share in dict.fromkeys(config.fractions)]
    runs = {arm.name: _run_config(config, arm) for arm in todo}
    for run in runs.values():
        plan_train(run)
    return Plan(manifest, inputs, todo, runs, arms)


def dry_run(config: ScalingConfig) -> StudyPlan:
    """Checks the request; the arms, and about how long they take."""
    todo = plan(config)
    calls = len(make_plan(config.diffusion, config.sampler).steps) * config.num_images if todo.shards else 0
    flops = sum(
        _flops(todo, arm) * (3 * config.max_steps * config.global_batch_size + calls)
        for arm in todo.todo
        if arm.name not in todo.done
    )
    return StudyPlan(STUDY, [arm.name for arm in todo.todo], todo.done, flops / flops_per_second(), [NOTE])


def run(config: ScalingConfig) -> StudyReport:
    """Trains and measures what is missing, arm by arm, and fits. Raises RequestError."""
    todo = plan(config)
    before = todo.done
    with study_run(config, todo.arms) as tracker:
        tracker.dataset(lineage.latent_dataset(todo.manifest), "training")
        missing = [arm for arm in todo.todo if arm.name not in before]
        quality: Quality | None = None
        with cluster.ray_session() if missing else contextlib.nullcontext():
            for arm in missing:
                quality = _do(config, todo, arm, quality)
            others = [arm for arm in todo.todo if not stands(todo.arms.done(arm.name), quality)]
            for arm in others:  # such as of the classifier that another machine trained
                say(f"study: {arm.name} was measured in other features, and is again")
                _do(config, todo, arm, quality)
        return _outcome(config, todo, tracker, len(before) - len(others))


def _outcome(config: ScalingConfig, todo: Plan, tracker: Tracker, skipped: int) -> StudyReport:
    found: list[Row] = [{"name": arm.name, **(todo.arms.done(arm.name) or {})} for arm in todo.todo]
    if len({row["validated_on"] for row in found}) > 1:
        raise RuntimeError(f"{config.output}: its arms were validated on different samples; give another output")
    laws = fits_of(found, config.seed)
    names = [arm.name for arm in todo.todo]
    figures = plots_of(found, laws) | ({"grid.png": strips_grid(todo.arms, names)} if todo.shards else {})
    rows = [{key: value for key, value in row.items() if key not in ("curve", "validated_on")} for row in found]
    summary = {**{key: str(law) for key, law in laws.items()}, "laws": {key: law.about for key, law in laws.items()}}
    return write_outcome(todo.arms, tracker, rows, summary, figures, names, skipped)


def _run_config(config: ScalingConfig, arm: Arm) -> TrainConfig:
    width, depth = map(int, arm.size.split("x"))
    heads = max(count for count in range(1, max(1, width // _HEAD_WIDTH) + 1) if width % count == 0)
    size = {"hidden_size": width, "depth": depth, "num_heads": heads}
    denoiser = validate(DenoiserConfig, config.denoiser.model_dump() | size)
    output = storage.join(config.output, "runs", arm.name)
    return train_config(
        config,
        config.latents,
        output,
        denoiser,
        config.max_steps,
        validation=ValidationConfig(every=config.max_steps // _VALIDATIONS, images=config.validation_images, grid=0),
    )


def _do(config: ScalingConfig, todo: Plan, arm: Arm, quality: Quality | None) -> Quality | None:
    """One arm to its row; what pictures are measured with is made once."""
    say(f"study: {arm.name}, arm {todo.todo.index(arm) + 1} of {len(todo.todo)}")
    asked = todo.runs[arm.name]
    rest = 1 - config.holdout
    if arm.fraction < 1:
        left_out = hashed_between(todo.manifest, config.holdout, config.holdout + (1 - arm.fraction) * rest)
        exclude = storage.join(config.output, f"left-out-{arm.fraction:g}.txt")
        storage.write_bytes(exclude, "".join(f"{identity}\n" for identity in left_out.tolist()).encode())
        asked = asked.model_copy(update={"exclude": exclude})
    planned = plan_train(asked)
    samples = planned.dataset.num_samples
    found = train_anew(asked)
    losses = validations(asked.output)
    flops = 3 * _flops(todo, arm)
    curve = [
        {"images_seen": images, "flops": float(flops * images), "loss": losses[step].loss}
        for step, images in ((step, step * config.global_batch_size) for step in sorted(losses))
        if losses[step].loss is not None
    ]
    if not curve or losses[found.steps].loss is None:
        raise RuntimeError(f"{arm.name}: its validation loss is not finite; give a smaller learning_rate")
    row: Row = {
        "size": arm.size,
        "fraction": arm.fraction,
        "samples": samples,
        "parameters": planned.parameters,
        "loss": losses[found.steps].loss,
        "images_seen": found.images_seen,
        "epochs": found.images_seen / samples,
        "training_flops": float(flops * found.images_seen),
        "train_images_per_second": found.images_per_second,
        "curve": curve,
        "validated_on": losses[found.steps].samples,
    }
    if todo.shards:
        snapshot = read_snapshot(found.snapshot)
        quality = quality or make_quality(config, todo.shards, snapshot, snapshot.load_autoencoder)
        ((_, drawn),) = draw_all({arm.name: config.sampler}, found.snapshot, config, quality)
        save_strip(todo.arms, arm.name, drawn.first)
        row |= drawn.row(config, quality)
    todo.arms.finish(arm.name, row)
    return quality


def _flops(todo: Plan, arm: Arm) -> int:
    """Forward, of one image."""
    run, manifest = todo.runs[arm.name], todo.manifest
    _, height, width = next(iter(manifest.shapes))
    shape = (manifest.channels, height, width)
    return denoiser_cost(run.denoiser, shape, manifest.conditioning.num_classes, run.diffusion).forward_flops
