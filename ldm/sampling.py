"""The stage `ldm sample`: a snapshot to pictures, from noise or from pictures, on this machine."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ldm import images, storage
from ldm.config import RequestError
from ldm.drawing import Blend, Edit, load_sampler, resolve_device
from ldm.given import EDITS, GRID, check_task, find_pictures, read_mask, read_pictures
from ldm.labels import check_guidance, resolve_labels
from ldm.plan import SamplerConfig, make_plan
from ldm.provenance import DrawnPicture, known_label, make_provenance
from ldm.sample_config import DEFAULT_IMAGES, SAMPLES_PER_SHARD, SampleConfig
from ldm.sample_formats import array_bytes, write_npz, write_pngs
from ldm.sample_shards import SampleShards
from ldm.snapshot import Snapshot, read_snapshot

GRID_PICTURES = 256
"""Pictures in the grid at most."""
Pixels = npt.NDArray[np.uint8]


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

    def settings(self, config: SampleConfig) -> dict[str, Any]:
        """All that a picture depends on beside the snapshot, its seed and its label: JSON values.

        A picture that does not start from the noise of its own seed depends on the whole request.
        """
        keys = {*SamplerConfig.model_fields, "batch_size", "precision", "compile", "task", "denoiser_type"}
        values = config.model_dump(mode="json", include=keys, exclude_none=True)
        values["device"] = resolve_device(config.device)
        if config.task != "generate":
            values |= {"first_seed": config.seed, "num_images": self.num_images, "strength": self.strength}
            values["pictures_sha256"] = _sha256(self.given)
        if self.mask is not None:
            values["mask_sha256"] = _sha256(self.mask)
        return values

    def shards(self, config: SampleConfig) -> SampleShards:
        """Where the pictures of format=webdataset lie."""
        return SampleShards(
            config.output,
            self.snapshot.weights_sha256,
            config.seed,
            self.num_images,
            config.samples_per_shard or SAMPLES_PER_SHARD,
            None if config.labels is None else list(config.labels),
            self.settings(config),
        )


def check(config: SampleConfig) -> SamplePlan:
    """Checks the whole request without loading weights. Raises RequestError."""
    storage.check_writable("output", config.output)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("device=cuda: this machine has no GPU that torch can use; give device=cpu or device=auto")
    todo = plan(config)
    if config.format == "adm-npz":
        needed = array_bytes(todo.num_images, todo.snapshot.picture_shape())
        storage.check_space("output", config.output, needed, "give another disk, or fewer pictures (num_images)")
    elif config.format == "webdataset":
        todo.shards(config).check()
    return todo


def plan(config: SampleConfig) -> SamplePlan:
    """What is asked of the model, checked, wherever it will be drawn. Raises RequestError."""
    snapshot = read_snapshot(config.snapshot)
    pictures = find_pictures(config.pictures)
    check_task(config, pictures)
    count = config.num_images or (len(pictures) if config.task == "reconstruct" else DEFAULT_IMAGES)
    strength = config.strength or (1.0 if config.task == "inpaint" else 0.6)
    steps = make_plan(snapshot.diffusion_config, config)
    check_guidance(config.guidance_scale, snapshot)
    if config.task not in ("generate", *EDITS) and pictures and (any(steps.sigmas) or config.sampler == "dpmpp_2m"):
        raise RequestError(
            f"task={config.task}: inverts pictures, which needs steps that can be taken back: use eta=0 and "
            "sampler=ddim, or euler or heun for a flow"
        )
    labels, shape = _labels(config, snapshot, count), snapshot.picture_shape()
    given = read_pictures(pictures, shape, snapshot, "pictures")
    mask = read_mask(config.mask, config.mask_blur, shape, snapshot)
    return SamplePlan(snapshot, count, labels, given, mask, strength)


class RequestSampler:
    """Draws any pictures of a request by their numbers. Loads the weights; raises RequestError where it cannot."""

    def __init__(self, config: SampleConfig, todo: SamplePlan) -> None:
        self.config, self.todo = config, todo
        self._settings = todo.settings(config)
        self._sampler = load_sampler(
            config.snapshot, config.batch_size, config.device, config.denoiser_type, config.precision, config.compile
        )

    def draw(self, numbers: range) -> Iterator[list[DrawnPicture]]:
        """Batches in order. A picture's bits depend neither on the others nor on where the batches are cut."""
        for first in range(numbers.start, numbers.stop, self.config.batch_size):
            rows = torch.arange(first, min(first + self.config.batch_size, numbers.stop))
            seeds = self.config.seed + rows
            labels = None if self.todo.labels is None else self.todo.labels[rows]
            drawn = self._sampler.draw(labels, seeds, self.config, self._source(rows))
            told = [None] * len(rows) if labels is None else labels.tolist()
            yield [
                self._signed(*picture)
                for picture in zip(rows.tolist(), seeds.tolist(), told, drawn.numpy(), strict=True)
            ]

    def _signed(self, number: int, seed: int, label: int | None, pixels: Pixels) -> DrawnPicture:
        snapshot = self.todo.snapshot
        about = make_provenance(snapshot, self._settings, seed, label)
        return DrawnPicture(number, seed, known_label(label, snapshot), pixels, about)

    def _source(self, rows: Tensor) -> Blend | Edit | None:
        """Where the pictures number `rows` of the whole request start from."""
        config, todo, given = self.config, self.todo, self.todo.given
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


def sample(config: SampleConfig, progress: Callable[[int], None] = lambda done: None) -> SampleReport:
    """Draws `num_images` pictures into `output`, in the format asked for and written as they are drawn, and a grid of
    the first. Shards that are there already are left.

    progress: called with the number of pictures done. Raises RequestError.
    """
    todo = check(config)
    shards = todo.shards(config) if config.format == "webdataset" else None
    parts = [range(todo.num_images)]
    if shards is not None:
        shards.claim()
        parts = shards.missing()
    left = sum(map(len, parts))
    if parts:
        sampler = RequestSampler(config, todo)
    watch = _Watch(progress, todo.num_images - left)
    started = time.monotonic()
    for part in parts:
        batches = watch.over(sampler.draw(part))
        if shards is not None:
            shards.write(part, batches)
        elif config.format == "adm-npz":
            write_npz(storage.join(config.output, "samples.npz"), len(part), todo.snapshot.picture_shape(), batches)
        else:
            write_pngs(config.output, batches)
    rate = left / (time.monotonic() - started)
    shown = watch.shown
    if shards is not None:  # also those of an earlier run
        shown = [picture.pixels for picture in shards.first(GRID_PICTURES, todo.snapshot.picture_shape())]
    grid_url = storage.join(config.output, GRID)
    columns = min(len(shown), max(10, int(len(shown) ** 0.5)))
    storage.write_bytes(grid_url, images.to_png(images.grid(np.stack(shown), columns)))
    return SampleReport(todo.num_images, round(rate, 2), config.output, grid_url)


class _Watch:
    """Tells how far a drawing is, and keeps the first pictures for the grid."""

    def __init__(self, progress: Callable[[int], None], done: int) -> None:
        self.progress, self.done = progress, done
        self.shown: list[Pixels] = []
        progress(done)

    def over(self, batches: Iterable[list[DrawnPicture]]) -> Iterator[list[DrawnPicture]]:
        for batch in batches:
            self.shown += [picture.pixels for picture in batch[: GRID_PICTURES - len(self.shown)]]
            yield batch
            self.done += len(batch)
            self.progress(self.done)


def _labels(config: SampleConfig, snapshot: Snapshot, count: int) -> Tensor | None:
    conditioning = snapshot.conditioning
    if config.labels or conditioning.type == "none" or (config.task != "interpolate" and config.pictures is None):
        return resolve_labels(config.labels, conditioning, count)
    if snapshot.denoiser.get("label_dropout") == 0:
        raise RequestError("labels=null: the model was trained without the null class; name the pictures' classes")
    return torch.full((count,), conditioning.num_classes, dtype=torch.int64)


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
