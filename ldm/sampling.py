"""The stage `ldm sample`: a snapshot to pictures, from noise or from pictures, on this machine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from ldm import images, storage
from ldm.config import Location, RequestError
from ldm.drawing import Blend, Edit, load_sampler
from ldm.editing import soften
from ldm.latents.manifest import Conditioning
from ldm.plan import SamplerConfig, make_plan
from ldm.shards import PICTURE_EXTENSIONS
from ldm.snapshot import Snapshot, read_snapshot

GRID = "grid.png"
GRID_PICTURES = 256
"""Pictures in the grid at most."""
DEFAULT_IMAGES = 16

Task = Literal["generate", "reconstruct", "interpolate", "variations", "image_to_image", "inpaint"]
NEED_PICTURES = ("reconstruct", "image_to_image", "inpaint")
EDITS = ("image_to_image", "inpaint")


class SampleConfig(SamplerConfig):
    """Draws pictures from a snapshot, on this machine."""

    snapshot: Location = Field(description="what `ldm train` wrote: a snapshot directory or URL")
    output: Location = Field("samples", description="directory or URL of the pictures")
    num_images: int | None = Field(
        None, gt=0, description=f"number of pictures; null: {DEFAULT_IMAGES}, or for reconstruct one for each given"
    )
    labels: tuple[str, ...] | None = Field(
        None,
        description="class numbers or names, taken in turn; null: all classes in turn, but for a task with "
        "pictures and for interpolate no class",
    )
    seed: int = Field(0, ge=0, le=2**53 - 1, description="seed of the first picture; picture i has seed + i")
    task: Task = Field(
        "generate",
        description="reconstruct: pictures inverted to noise and back; interpolate: between two pictures, or from seed "
        "to seed + 1; variations: of pictures, or of the picture of seed; image_to_image; inpaint",
    )
    pictures: Location | tuple[Location, ...] | None = Field(
        None, description="pictures to start from, taken in turn: files, a folder, a glob or a comma set"
    )
    mask: Location | None = Field(
        None, description="picture that is white where inpaint paints; grey mixes, black keeps the picture exactly"
    )
    mask_blur: int = Field(0, ge=0, description="width of a soft edge inside the mask, pixels")
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="how far from the pictures: share of the steps (image_to_image, inpaint) or way to fresh noise "
        "(variations); null: 0.6, for inpaint 1",
    )
    format: Literal["png"] = Field("png", description="one PNG a picture")
    batch_size: int = Field(32, gt=0, description="pictures in one call; a part of what a picture depends on")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="what the denoiser computes in")
    compile: bool = Field(
        False,
        description="whether the denoiser is compiled (torch.compile): faster after half a minute; other last bits",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where it runs")
    denoiser_type: str | None = Field(None, description="package:Class, for a snapshot of your own denoiser class")

    @field_validator("labels", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """`apple,3`, 3 and [apple, 3] are all read."""
        if isinstance(value, str):
            value = [label.strip() for label in value.split(",")]
        elif isinstance(value, int):
            value = [value]
        return tuple(str(label) for label in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class SampleReport:
    """What scripts may rely on."""

    images: int
    images_per_second: float
    output: str
    grid: str


@dataclass(frozen=True)
class SamplePlan:
    """What will be drawn.

    labels: int64 (num_images,), None for an unconditional model. given: pictures uint8 (N, 3, H, W), N may be 0.
    mask: float (1, 1, H, W), see `Edit`.
    """

    snapshot: Snapshot
    num_images: int
    labels: Tensor | None
    given: Tensor
    mask: Tensor | None
    strength: float


def check(config: SampleConfig) -> SamplePlan:
    """Checks the whole request without loading weights. Raises RequestError."""
    storage.check_writable("output", config.output)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("device=cuda: this machine has no GPU that torch can use; give device=cpu or device=auto")
    snapshot = read_snapshot(config.snapshot)
    pictures = _find_pictures(config)
    _check_task(config, pictures)
    count = config.num_images or (len(pictures) if config.task == "reconstruct" else DEFAULT_IMAGES)
    strength = config.strength or (1.0 if config.task == "inpaint" else 0.6)
    plan = make_plan(snapshot.diffusion_config, config)
    check_guidance(config.guidance_scale, snapshot)
    if config.task not in ("generate", *EDITS) and pictures and (any(plan.sigmas) or config.sampler == "dpmpp_2m"):
        raise RequestError(
            f"task={config.task}: inverts pictures, which needs steps that can be taken back: use eta=0 and "
            "sampler=ddim, or euler or heun for a flow"
        )
    labels, shape = _labels(config, snapshot, count), snapshot.picture_shape()
    given = _read_pictures(pictures, shape, snapshot, "pictures")
    return SamplePlan(snapshot, count, labels, given, _read_mask(config, shape, snapshot), strength)


def sample(config: SampleConfig, progress: Callable[[int], None] | None = None) -> SampleReport:
    """Draws `num_images` pictures: one PNG each in `output`, written as they are drawn, and a grid of the first.

    progress: called with the number of pictures done. Raises RequestError.
    """
    todo = check(config)
    sampler = load_sampler(
        config.snapshot, config.batch_size, config.device, config.denoiser_type, config.precision, config.compile
    )
    seeds = torch.arange(config.seed, config.seed + todo.num_images)
    shown: list[Tensor] = []
    started = time.monotonic()
    for first in range(0, todo.num_images, config.batch_size):
        rows = torch.arange(first, min(first + config.batch_size, todo.num_images))
        labels = None if todo.labels is None else todo.labels[rows]
        drawn = sampler.draw(labels, seeds[rows], config, _source(config, todo, rows))
        for i, picture in zip(rows.tolist(), drawn.numpy(), strict=True):
            storage.write_bytes(storage.join(config.output, f"{i:06d}.png"), images.to_png(picture))
        shown += list(drawn[: max(0, GRID_PICTURES - first)])
        if progress is not None:
            progress(first + len(rows))
    rate = todo.num_images / (time.monotonic() - started)
    grid_url = storage.join(config.output, GRID)
    columns = min(len(shown), max(10, int(len(shown) ** 0.5)))
    storage.write_bytes(grid_url, images.to_png(images.grid(torch.stack(shown).numpy(), columns)))
    return SampleReport(todo.num_images, round(rate, 2), config.output, grid_url)


def resolve_labels(
    labels: Sequence[str] | None, conditioning: Conditioning, count: int, first: int = 0
) -> Tensor | None:
    """Class numbers or names, taken in turn, of `count` pictures from number `first` => int64 (count,).

    None for an unconditional model. Raises RequestError.
    """
    if conditioning.type == "none":
        if labels:
            raise RequestError(f"labels={','.join(labels)}: the model is unconditional; leave it out")
        return None
    numbers = range(conditioning.num_classes) if not labels else [_class_number(x, conditioning) for x in labels]
    return torch.tensor([numbers[i % len(numbers)] for i in range(first, first + count)], dtype=torch.int64)


def check_guidance(guidance_scale: float, snapshot: Snapshot) -> None:
    """Raises RequestError where the model cannot be guided."""
    if guidance_scale == 1:
        return
    if snapshot.conditioning.type == "none":
        raise RequestError(f"guidance_scale={guidance_scale}: the model is unconditional; must be 1")
    if snapshot.denoiser.get("label_dropout") == 0:
        raise RequestError(
            f"guidance_scale={guidance_scale}: the model was trained without the null class "
            "(denoiser.label_dropout=0); must be 1"
        )


def _source(config: SampleConfig, todo: SamplePlan, rows: Tensor) -> Blend | Edit | None:
    """Where the pictures number `rows` of the whole request start from."""
    given = todo.given
    seeds, ones = config.seed + rows, torch.ones(len(rows))
    if config.task == "generate":
        return None
    if config.task == "interpolate":
        ends = given if len(given) else torch.tensor([config.seed, config.seed + 1])
        start, end = (ends[i].expand(len(rows), *ends.shape[1:]) for i in (0, 1))
        return Blend(start, end, rows / max(1, todo.num_images - 1))
    start = given[rows % len(given)] if len(given) else torch.full_like(seeds, config.seed)
    if config.task in EDITS:
        return Edit(start, todo.strength, todo.mask)
    return Blend(start, seeds + 1, 0 * ones if config.task == "reconstruct" else todo.strength * ones)


def _check_task(config: SampleConfig, pictures: Sequence[str]) -> None:
    """Raises RequestError where a task has not what it needs, or a key is given that it does not use."""
    task = config.task
    if task in NEED_PICTURES and not pictures:
        raise RequestError(f"task={task}: starts from pictures; give pictures=FILES")
    if task == "generate" and pictures:
        raise RequestError("task=generate: starts from noise alone; leave pictures out, or give another task")
    if task == "interpolate" and pictures and len(pictures) != 2:
        raise RequestError(f"pictures={config.pictures}: are {len(pictures)}; interpolate needs exactly 2")
    if (task == "inpaint") != (config.mask is not None):
        wrong = (
            "inpaint paints where it is white; give mask=FILE" if task == "inpaint" else f"is no part of task={task}"
        )
        raise RequestError(f"mask={config.mask or 'null'}: {wrong}")
    if config.mask_blur and config.mask is None:
        raise RequestError(f"mask_blur={config.mask_blur}: is of a mask; leave it out, or give task=inpaint mask=FILE")
    if config.clip_x0 is not None and pictures and task not in EDITS:
        raise RequestError(f"clip_x0={config.clip_x0}: inversion knows no clipping; leave it out for task={task}")
    if config.strength is not None and task not in ("variations", *EDITS):
        raise RequestError(f"strength={config.strength}: is no part of task={task}; leave it out")


def _labels(config: SampleConfig, snapshot: Snapshot, count: int) -> Tensor | None:
    conditioning = snapshot.conditioning
    if config.labels or conditioning.type == "none" or (config.task != "interpolate" and config.pictures is None):
        return resolve_labels(config.labels, conditioning, count)
    if snapshot.denoiser.get("label_dropout") == 0:
        raise RequestError("labels=null: the model was trained without the null class; name the pictures' classes")
    return torch.full((count,), conditioning.num_classes, dtype=torch.int64)


def _find_pictures(config: SampleConfig) -> tuple[str, ...]:
    """URLs in the order in which they are given; of a folder its pictures, but for the grid of `ldm sample`."""
    given = (config.pictures,) if isinstance(config.pictures, str) else config.pictures or ()
    found: list[str] = []
    for text in (part for location in given for part in storage.split_commas(location)):
        if storage.is_directory(text):
            names = [name for name in storage.list_dir(text) if _is_picture(name)]
            if not names:
                raise RequestError(f"pictures={text}: holds no pictures; give pictures, or a folder of them")
            found += [storage.join(text, name) for name in names]
        else:
            try:
                found += storage.expand(text, "pictures")
            except RequestError as error:  # which advises a tar
                raise RequestError(f"{str(error).split('; give')[0]}; give pictures, or a folder of them") from None
    return tuple(found)


def _is_picture(name: str) -> bool:
    return name != GRID and name.lower().rpartition(".")[2] in PICTURE_EXTENSIONS


def _read_mask(config: SampleConfig, shape: tuple[int, int], snapshot: Snapshot) -> Tensor | None:
    if config.mask is None:
        return None
    grey = _read_pictures((config.mask,), shape, snapshot, "mask").float().mean(dim=1, keepdim=True) / 255
    mask = soften(grey, config.mask_blur)
    if not mask.any():
        raise RequestError(f"mask={config.mask}: is black, or fades out at mask_blur={config.mask_blur}")
    return mask


def _read_pictures(urls: Sequence[str], shape: tuple[int, int], snapshot: Snapshot, key: str) -> Tensor:
    """uint8 (N, 3, H, W), cut as training cut its pictures. Raises RequestError."""
    background = tuple(snapshot.fingerprint["pictures"]["background"])
    pixels = []
    for url in urls:
        try:
            pixels.append(images.decode(storage.read_bytes(url), shape, background)[0])
        except (FileNotFoundError, IsADirectoryError):
            raise RequestError(f"{key}={url}: is no file; give a picture") from None
        except images.BadPicture as error:
            raise RequestError(f"{key}={url}: cannot be read as a picture ({error})") from None
    return torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0)


def _class_number(label: str, conditioning: Conditioning) -> int:
    if label in conditioning.names:
        return conditioning.names.index(label)
    if label.isdecimal() and int(label) < conditioning.num_classes:
        return int(label)
    known = f"0 to {conditioning.num_classes - 1}" + (
        f", or {', '.join(conditioning.names)}"[:200] if conditioning.names else ""
    )
    raise RequestError(f"labels={label}: is no class of this model; give {known}")
