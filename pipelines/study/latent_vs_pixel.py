"""`ldm study latent-vs-pixel`: what the latent space buys, at several resolutions.

The same pictures, denoiser family, batch, optimizer and seconds of training, in the latents of an autoencoder and in
pixels (the first stage `identity`), as Rombach et al. 2022 (arXiv 2112.10752) compared LDM-1 with LDM-4 and LDM-8: the
configuration of the denoiser is held, and pixels cost what they cost.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from ldm import storage
from ldm.autoencoder import IDENTITY, load_autoencoder
from ldm.config import Location, RequestError
from ldm.denoiser import DenoiserConfig
from ldm.snapshot import read_snapshot
from ldm.sources import InputShard
from ldm.unet import UNetConfig
from pipelines import cluster, lineage, plots
from pipelines.encode import EncodeConfig, encode
from pipelines.encode import plan as plan_encode
from pipelines.evaluate.reference import find_reference
from pipelines.progress import say
from pipelines.study.arms import Arms
from pipelines.study.config import Values
from pipelines.study.drawing import check_workers, draw_all
from pipelines.study.forecast import denoiser_cost
from pipelines.study.outcome import StudyPlan, StudyReport, save_strip, strips_grid, study_run, write_outcome
from pipelines.study.quality import Quality, make_quality, stands
from pipelines.study.reference import check_features, check_labels
from pipelines.study.table import Row
from pipelines.study.training import TrainedConfig, check_sampler, train_config, train_for

STUDY = "latent-vs-pixel"
Space = Literal["latent", "pixel"]
_STARTS_S = 40
SPACES: tuple[Space, Space] = ("latent", "pixel")
PUBLISHED = {
    "training, V100 days, pixel against latent (LDM, table 18)": "916 / 271 = 3.4",
    "sampling, pictures a second, latent against pixel at 256 px (LDM, table 6)": "0.97 / 0.26 = 3.7; at least 2.7",
}
PUBLISHED_TRAINING, PUBLISHED_SAMPLING = 916 / 271, 2.7
"""Ratios of Rombach et al. 2022: V100-days of ADM over those of LDM-4 (table 18), and the least gain in throughput that
the text of table 6 claims. Other models, other data and other machines than the ones measured here."""


class SmallUNetConfig(UNetConfig):
    """LDM's U-Net, narrow enough for a CPU."""

    model_channels: int = Field(32, ge=1, description="channels of the first level")
    num_res_blocks: int = Field(1, ge=1, description="residual blocks of a level, going down; one more going up")
    attention_resolutions: tuple[int, ...] = Field((4,), description="downsampling factors of the levels that attend")


class StudyDenoiserConfig(DenoiserConfig):
    """A small U-Net, which LDM compared, unless another is asked for."""

    type: str = Field("unet", description="dit, unet, or your own class as package.module:Class; of both spaces")
    unet: SmallUNetConfig = SmallUNetConfig()


class LatentVsPixelConfig(TrainedConfig):
    """Compares latent with pixel diffusion: training and sampling speed, memory, and quality after equal seconds."""

    source: Location | tuple[Location, ...] = Field(
        description="image shards (WebDataset tars): path, URL, glob, comma set or brace range; also the reference"
    )
    autoencoder: Location = Field(description="of the latent arms: diffusers folder, URL or hub id")
    image_size: Values[int] = Field((64, 128, 256), description="sides of the pictures, pixels, several")
    output: Location = Field(
        "study-latent-vs-pixel", description="directory or URL; run again, what is done there is not done again"
    )
    train_seconds: float = Field(120.0, gt=0, description="seconds of steady training of each arm")
    pixel_patch_size: int | None = Field(
        None, ge=1, description="patch_size of a DiT in pixels; null: as in the latents, so factor² as many tokens"
    )
    denoiser: StudyDenoiserConfig = StudyDenoiserConfig()


@dataclass(frozen=True)
class Arm:
    """One space at one resolution."""

    space: Space
    image_size: int

    @property
    def name(self) -> str:
        return f"{self.space}-{self.image_size}"


@dataclass(frozen=True)
class Plan:
    """config: on the device that is there. latent_shapes: (C, h, w) by the arm's name."""

    config: LatentVsPixelConfig
    shards: dict[str, InputShard]
    sizes: dict[str, int]
    todo: list[Arm]
    latent_shapes: dict[str, tuple[int, int, int]]
    arms: Arms

    @property
    def done(self) -> list[str]:
        sizes = dict.fromkeys(arm.image_size for arm in self.todo)
        names = ([arm.name for arm in self.todo if arm.image_size == size] for size in sizes)
        return [name for of_size in names for name in self.arms.alike(of_size)]


def plan(config: LatentVsPixelConfig) -> Plan:
    """Checks the whole request, and asks a cluster what it has. Raises RequestError."""
    check_features(config)
    inputs, sizes = find_reference(config.source, "source")
    check_labels(config, inputs, "source")
    check_sampler(config)
    todo = [Arm(space, size) for size in dict.fromkeys(config.image_size) for space in SPACES]
    autoencoder = load_autoencoder(config.autoencoder)
    if autoencoder.factor == 1:
        raise RequestError(f"autoencoder={config.autoencoder}: has a factor of 1; give one that makes latents smaller")
    shapes: dict[str, tuple[int, int, int]] = {}
    for arm in todo:
        plan_encode(encode_config(config, arm))
        factor, channels = (autoencoder.factor, autoencoder.latent_channels) if arm.space == "latent" else (1, 3)
        shapes[arm.name] = channels, arm.image_size // factor, arm.image_size // factor
        denoiser_cost(denoiser_of(config, arm), shapes[arm.name], 0, config.diffusion)
    # The arms are timed: they compare on one kind of device.
    config = config.model_copy(update={"device": check_workers(config.device, config.num_workers)})
    apart = {"output", "source", "autoencoder", "image_size", "tracking"}
    request = {
        **config.model_dump(mode="json", exclude=apart),
        "autoencoder": autoencoder.weights_sha256,
        "source": lineage.image_dataset(sizes).digest,
    }
    return Plan(config, inputs, sizes, todo, shapes, Arms(config.output, STUDY, request))


def dry_run(config: LatentVsPixelConfig) -> StudyPlan:
    """Checks the request; the arms, and about how long they take."""
    todo = plan(config)
    seconds = (len(todo.todo) - len(todo.done)) * (config.train_seconds + _STARTS_S)
    notes = [
        f"{config.train_seconds:g} s of training an arm, and about {_STARTS_S} s in which workers start, assumed",
        "encoding, measuring the speed of training, and drawing come on top",
        *(f"{arm.name}: denoiser of {_work(config, todo, arm)}" for arm in todo.todo),
    ]
    return StudyPlan(STUDY, [arm.name for arm in todo.todo], todo.done, seconds, notes)


def run(config: LatentVsPixelConfig) -> StudyReport:
    """Encodes, trains, draws and measures what is missing, arm by arm. Raises RequestError."""
    todo = plan(config)
    config, before = todo.config, todo.done
    with study_run(config, todo.arms) as tracker:
        tracker.dataset(lineage.image_dataset(todo.sizes), "source")
        missing = [arm for arm in todo.todo if arm.name not in before]
        with cluster.ray_session() if missing else contextlib.nullcontext():
            qualities: dict[int, Quality] = {}
            for arm in missing:
                _do(config, todo, arm, qualities)
            others = [a for a in todo.todo if not stands(todo.arms.done(a.name), qualities.get(a.image_size))]
            for arm in others:  # such as of the classifier that another machine trained
                say(f"study: {arm.name} was measured in other features, and is again")
                _do(config, todo, arm, qualities)
        rows = [{"name": arm.name, **(todo.arms.done(arm.name) or {})} for arm in todo.todo]
        ratios = _ratios(rows)
        names = [arm.name for arm in todo.todo]
        figures = {**_plots(rows, ratios), "grid.png": strips_grid(todo.arms, names)}
        return write_outcome(todo.arms, tracker, rows, _summary(ratios), figures, names, len(before) - len(others))


def encode_config(config: LatentVsPixelConfig, arm: Arm) -> EncodeConfig:
    """Of an arm's latents, or pixels."""
    return EncodeConfig(
        source=config.source,
        destination=storage.join(config.output, "latents", arm.name),
        autoencoder=config.autoencoder if arm.space == "latent" else IDENTITY,
        image_size=arm.image_size,
        device=config.device,
        tracking=config.tracking,
    )


def denoiser_of(config: LatentVsPixelConfig, arm: Arm) -> DenoiserConfig:
    """The same in both spaces, but for a patch size that was asked for."""
    values = config.denoiser.model_dump()
    if arm.space == "pixel" and config.pixel_patch_size is not None:
        values["patch_size"] = config.pixel_patch_size
    return DenoiserConfig.model_validate(values)


def _do(config: LatentVsPixelConfig, todo: Plan, arm: Arm, qualities: dict[int, Quality]) -> None:
    """One arm from the pictures to its row. qualities: what pictures of a size are measured with, made once."""
    say(f"study: {arm.name}, arm {todo.todo.index(arm) + 1} of {len(todo.todo)}")
    latents = encode(encode_config(config, arm)).destination
    output, speed = (storage.join(config.output, folder, arm.name) for folder in ("runs", "speed"))
    asked = train_config(config, latents, output, denoiser_of(config, arm), 2)
    found = train_for(config.train_seconds, asked, speed)
    snapshot = read_snapshot(found.snapshot)
    if (quality := qualities.get(arm.image_size)) is None:
        quality = make_quality(
            config, todo.shards, snapshot, lambda device: load_autoencoder(config.autoencoder, device)
        )
        qualities[arm.image_size] = quality
    ((_, drawn),) = draw_all({arm.name: config.sampler}, found.snapshot, config, quality)
    save_strip(todo.arms, arm.name, drawn.first)
    denoiser = denoiser_cost(asked.denoiser, snapshot.latent_shape, snapshot.conditioning.num_classes, config.diffusion)
    row = {
        "space": arm.space,
        "image_size": arm.image_size,
        "latent_shape": "x".join(map(str, snapshot.latent_shape)),
        "parameters": denoiser.parameters,
        "forward_gflops": denoiser.forward_flops / 1e9,
        "activation_mb_per_image": denoiser.activation_bytes / 1e6,
        "train_images_per_second": found.images_per_second,
        "peak_memory_gb": found.peak_memory_gb,
        "steps": found.steps,
        "images_seen": found.images_seen,
        "train_seconds": found.images_seen / found.images_per_second,
        **drawn.row(config, quality),
    }
    todo.arms.finish(arm.name, row)


def _ratios(rows: Sequence[Row]) -> list[Row]:
    """How many times better the latents are, at each resolution."""
    ratios = []
    for latent in (row for row in rows if row["space"] == "latent"):
        pixel = next(r for r in rows if r["space"] == "pixel" and r["image_size"] == latent["image_size"])
        ratios.append(
            {
                "image_size": latent["image_size"],
                "training": latent["train_images_per_second"] / pixel["train_images_per_second"],
                "sampling": pixel["seconds_per_picture"] / latent["seconds_per_picture"],
                "memory": pixel["peak_memory_gb"] / latent["peak_memory_gb"],
                "activations": pixel["activation_mb_per_image"] / latent["activation_mb_per_image"],
                "fd": pixel["fd"] / latent["fd"],
            }
        )
    return ratios


def _summary(ratios: Sequence[Row]) -> dict[str, Any]:
    """The ratios, beside the published ones."""
    measured = {
        f"{row['image_size']} px, latent over pixel": ", ".join(
            f"{key} {row[key]:.3g}x" for key in row if key != "image_size"
        )
        for row in ratios
    }
    return {"ratios": list(ratios), **measured, **PUBLISHED}


def _plots(rows: Sequence[Row], ratios: Sequence[Row]) -> dict[str, bytes]:
    def curves(key: str) -> dict[str, tuple[list[float], list[float]]]:
        of = {space: [row for row in rows if row["space"] == space] for space in SPACES}
        return {space: ([r["image_size"] for r in found], [r[key] for r in found]) for space, found in of.items()}

    size, sizes = "side of the pictures, pixels", [row["image_size"] for row in ratios]
    floor = {"floor (held-out pictures)": (sizes, [r["floor"] for r in rows if r["space"] == "latent"])}
    gains = {key: (sizes, [row[key] for row in ratios]) for key in ("training", "sampling", "memory", "activations")}
    published = {
        "LDM table 18, training: 3.4": (sizes, [PUBLISHED_TRAINING] * len(sizes)),
        "LDM table 6, sampling: at least 2.7": (sizes, [PUBLISHED_SAMPLING] * len(sizes)),
    }
    log = {"log_x": True, "log_y": True}
    seconds, features = "seconds of training of each arm", {row["features"] for row in rows}
    # A classifier of each resolution: distances compare between the spaces of one, and not between resolutions.
    distance = features.pop() if len(features) == 1 else "Fréchet distance, features of each size"
    return {
        "training.png": plots.line(
            curves("train_images_per_second"), size, "pictures a second", "Training speed", **log
        ),
        "sampling.png": plots.line(curves("seconds_per_picture"), size, "seconds a picture", "Sampling time", **log),
        "memory.png": plots.line(curves("peak_memory_gb"), size, "peak of a worker, GB", "Memory of training", **log),
        "quality.png": plots.line(curves("fd") | floor, size, distance, f"Quality after equal {seconds}", log_x=True),
        "ratios.png": plots.line(gains | published, size, "times, latent over pixel", "What latents buy", **log),
    }


def _work(config: LatentVsPixelConfig, todo: Plan, arm: Arm) -> str:
    found = denoiser_cost(denoiser_of(config, arm), todo.latent_shapes[arm.name], 0, config.diffusion)
    return f"{found.parameters / 1e6:.1f} M parameters, {found.forward_flops / 1e9:.3g} GFLOP a picture and call"
