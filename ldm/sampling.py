"""Snapshot => pictures. A picture depends on its seed, its label and the settings, not on its neighbours: every call of
the networks has one padded batch shape."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ldm import images, storage
from ldm.autoencoder import Autoencoder
from ldm.config import Config, Location, RequestError
from ldm.diffusion import DiffusionConfig
from ldm.latents.batch import channels
from ldm.latents.manifest import Conditioning
from ldm.latents.receipt import Statistics
from ldm.sampler import ddim, guided, initial_noise, make_plan, step_noise
from ldm.snapshot import Snapshot, read_snapshot

GRID_PICTURES = 256
"""Pictures in the grid at most."""


class SampleConfig(Config):
    """Draws pictures from a snapshot, on this machine."""

    snapshot: Location = Field(description="what `ldm train` wrote: a snapshot directory or URL")
    output: Location = Field("samples", description="directory or URL of the pictures")
    num_images: int = Field(16, gt=0, description="number of pictures")
    labels: tuple[str, ...] | None = Field(
        None, description="class numbers or names, taken in turn; null: all classes in turn"
    )
    seed: int = Field(0, ge=0, le=2**53 - 1, description="seed of the first picture; picture i has seed + i")
    num_inference_steps: int = Field(50, gt=0, description="sampling steps S")
    eta: float = Field(0.0, ge=0, le=1, description="0: deterministic DDIM; 1: as much noise as DDPM")
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance; 1: none")
    sampler: Literal["ddim"] = Field("ddim", description="sampler")
    format: Literal["png"] = Field("png", description="one PNG a picture")
    batch_size: int = Field(32, gt=0, description="pictures in one call; a part of what a picture depends on")
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


class PictureSampler:
    """A denoiser and the decoder behind it, ready to draw.

    Args:
        latent_shape: (C, h, w).
        batch_size: of every call; smaller requests are padded to it.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        autoencoder: Autoencoder,
        diffusion: DiffusionConfig,
        statistics: Statistics,
        conditioning: Conditioning,
        latent_shape: tuple[int, int, int],
        batch_size: int,
    ) -> None:
        self.denoiser, self.autoencoder, self.diffusion = denoiser, autoencoder, diffusion
        self.statistics, self.conditioning = statistics, conditioning
        self.latent_shape, self.batch_size = latent_shape, batch_size
        self.device = autoencoder.device

    def draw(
        self,
        labels: Tensor | None,
        seeds: Tensor,
        *,
        num_inference_steps: int,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """labels, seeds: int64 (N,); labels None for an unconditional model => raw pixels uint8 (N, 3, H, W).

        progress: called with the number of pictures done. Raises RequestError for settings that cannot work.
        """
        plan = make_plan(self.diffusion, num_inference_steps, eta)
        null = self.conditioning.num_classes if self.conditioning.type == "class" else None
        mean, std = channels(self.statistics.mean, self.device), channels(self.statistics.std, self.device)
        pictures = []
        for first in range(0, len(seeds), self.batch_size):
            part = slice(first, first + self.batch_size)
            batch_seeds, count = self._padded(seeds[part])
            batch_labels = None if labels is None or null is None else self._padded(labels[part])[0]
            noise = initial_noise(batch_seeds, self.latent_shape)
            fresh = step_noise(batch_seeds, self.latent_shape)
            denoise = guided(self.denoiser, batch_labels, guidance_scale, null)
            latents = ddim(denoise, noise, plan, noise_fn=fresh)
            pictures.append(self.autoencoder.decode(latents * std + mean)[:count])
            if progress is not None:
                progress(first + count)
        return torch.cat(pictures)

    def _padded(self, values: Tensor) -> tuple[Tensor, int]:
        """(n,) => (batch_size,) on the device, and n."""
        missing = self.batch_size - len(values)
        return torch.cat([values, values.new_zeros(missing)]).to(self.device), len(values)


def load_sampler(url: str, batch_size: int, device: str = "auto", denoiser_type: str | None = None) -> PictureSampler:
    """A sampler from a snapshot. Raises RequestError where it is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    snapshot = read_snapshot(url)
    return PictureSampler(
        snapshot.load_denoiser(device, denoiser_type),
        snapshot.load_autoencoder(device),
        snapshot.diffusion_config,
        snapshot.statistics,
        snapshot.conditioning,
        snapshot.latent_shape,
        batch_size,
    )


def resolve_labels(labels: Sequence[str] | None, conditioning: Conditioning, count: int) -> Tensor | None:
    """Class numbers or names, taken in turn => int64 (count,); None for an unconditional model. Raises RequestError."""
    if conditioning.type == "none":
        if labels:
            raise RequestError(f"labels={','.join(labels)}: the model is unconditional; leave it out")
        return None
    numbers = range(conditioning.num_classes) if not labels else [_class_number(x, conditioning) for x in labels]
    return torch.tensor([numbers[i % len(numbers)] for i in range(count)], dtype=torch.int64)


def check(config: SampleConfig) -> Snapshot:
    """Checks the whole request without loading weights. Raises RequestError."""
    storage.check_writable("output", config.output)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("device=cuda: this machine has no GPU that torch can use; give device=cpu or device=auto")
    snapshot = read_snapshot(config.snapshot)
    resolve_labels(config.labels, snapshot.conditioning, config.num_images)
    make_plan(snapshot.diffusion_config, config.num_inference_steps, config.eta)
    return snapshot


def sample(config: SampleConfig, progress: Callable[[int], None] | None = None) -> SampleReport:
    """Draws `num_images` pictures: one PNG each in `output`, written as they are drawn, and a grid of the first.

    progress: called with the number of pictures done. Raises RequestError.
    """
    labels = resolve_labels(config.labels, check(config).conditioning, config.num_images)
    sampler = load_sampler(config.snapshot, config.batch_size, config.device, config.denoiser_type)
    seeds = torch.arange(config.seed, config.seed + config.num_images)
    shown: list[Tensor] = []
    started = time.monotonic()
    for first in range(0, config.num_images, config.batch_size):
        part = slice(first, first + config.batch_size)
        pictures = sampler.draw(
            None if labels is None else labels[part],
            seeds[part],
            num_inference_steps=config.num_inference_steps,
            eta=config.eta,
            guidance_scale=config.guidance_scale,
        )
        for i, picture in enumerate(pictures.numpy(), start=first):
            storage.write_bytes(storage.join(config.output, f"{i:06d}.png"), images.to_png(picture))
        shown += list(pictures[: max(0, GRID_PICTURES - first)])
        if progress is not None:
            progress(first + len(pictures))
    rate = config.num_images / (time.monotonic() - started)
    grid_url = storage.join(config.output, "grid.png")
    columns = min(len(shown), max(10, int(len(shown) ** 0.5)))
    storage.write_bytes(grid_url, images.to_png(images.grid(torch.stack(shown).numpy(), columns)))
    return SampleReport(config.num_images, round(rate, 2), config.output, grid_url)


def _class_number(label: str, conditioning: Conditioning) -> int:
    if label in conditioning.names:
        return conditioning.names.index(label)
    if label.isdecimal() and int(label) < conditioning.num_classes:
        return int(label)
    known = f"0 to {conditioning.num_classes - 1}" + (
        f", or {', '.join(conditioning.names)}"[:200] if conditioning.names else ""
    )
    raise RequestError(f"labels={label}: is no class of this model; give {known}")
