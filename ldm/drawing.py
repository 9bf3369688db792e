"""The networks of a snapshot, ready to draw. A picture depends on its seed, its label and the settings, not on its
neighbours: every call of a network has one padded batch shape.

Shapes: labels, seeds int64 (N,); raw pixels uint8 (N, 3, H, W); latents (N, C, h, w), normalised.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.autoencoder import Autoencoder
from ldm.denoiser import compile_denoiser
from ldm.diffusion import DiffusionConfig
from ldm.editing import invert, keep_known, noised, paste, slerp, to_latent_mask
from ldm.latents.batch import channels
from ldm.latents.manifest import Conditioning
from ldm.latents.receipt import Statistics
from ldm.plan import SamplerConfig, SamplingPlan, make_plan
from ldm.sampler import DenoiserFn, guided, initial_noise, sample_latents, step_noise
from ldm.snapshot import read_snapshot


@dataclass(frozen=True)
class Blend:
    """Start from noise between two ends, each the noise of seeds (N,) or of pictures (N, 3, H, W), which are inverted.

    weights (N,): 0 is the start, 1 the end. One picture with weight 0 is its reconstruction.
    """

    start: Tensor
    end: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Edit:
    """Start from pictures (N, 3, H, W), noised to the share `strength` of the steps.

    mask: float (1, 1, H, W), 1 where something new comes; elsewhere the pictures stay, to the last bit.
    """

    pictures: Tensor
    strength: float
    mask: Tensor | None = None


class PictureSampler:
    """A denoiser, in whatever dtype its weights have, and the autoencoder around it; the sampler computes in float32.

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
        self.conditioning, self.latent_shape, self.batch_size = conditioning, latent_shape, batch_size
        self.device = autoencoder.device
        self.dtype = next(denoiser.parameters()).dtype
        # Pictures in a call of the autoencoder: whatever the batch, so that a picture has one way in and out. A CPU is
        # as fast with one, and one picture does not pay for seven.
        self.at_once = 1 if self.device.type == "cpu" else 8
        self.mean, self.std = channels(statistics.mean, self.device), channels(statistics.std, self.device)

    def draw(
        self,
        labels: Tensor | None,
        seeds: Tensor,
        settings: SamplerConfig,
        source: Blend | Edit | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """=> raw pixels. labels None for an unconditional model; source None: from the seeds' noise.

        progress: called with the number of pictures done. Raises RequestError for settings that cannot work.
        """
        plan = make_plan(self.diffusion, settings, source.strength if isinstance(source, Edit) else 1.0)
        pictures = []
        for first in range(0, len(seeds), self.batch_size):
            part = slice(first, first + self.batch_size)
            count = len(seeds[part])
            denoise = self._denoise(labels, part, settings)
            if isinstance(source, Edit):
                drawn = self._edit(denoise, plan, seeds, part, source)
            else:
                noise = self._start(denoise, plan, seeds if source is None else source.start, part)
                if source is not None:
                    end = self._start(denoise, plan, source.end, part)
                    noise = slerp(noise, end, self._padded(source.weights, part))
                drawn = self.decode(sample_latents(denoise, noise, plan, noise_fn=self._fresh(seeds, part))[:count])
            pictures.append(drawn)
            if progress is not None:
                progress(first + count)
        return torch.cat(pictures)

    def denoise(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The denoiser's answer, unguided, in float32."""
        return self.denoiser(x.to(self.dtype), t, labels).float()

    def start(self, plan: SamplingPlan, seeds: Tensor, source: Blend | Edit, index: int) -> Tensor:
        """Where picture number `index` starts, (C, h, w): of a blend of seeds, or of an edit without a mask."""
        one = slice(index, index + 1)
        if isinstance(source, Edit):
            noise = initial_noise(seeds[one].to(self.device), self.latent_shape)
            return noised(self.encode(source.pictures[one]), noise, plan)[0]
        start, end = (
            initial_noise(ends[one].to(self.device), self.latent_shape) for ends in (source.start, source.end)
        )
        return slerp(start, end, source.weights[one].to(self.device))[0]

    def encode(self, pixels: Tensor) -> Tensor:
        """Raw pixels => normalised latents, the mean of the posterior."""
        parts = [self.autoencoder.encode(part)[:, : self.latent_shape[0]] for part in self._shaped(pixels)]
        return (torch.cat(parts)[: len(pixels)] - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents => raw pixels, on the CPU."""
        raw = latents * self.std + self.mean
        return torch.cat([self.autoencoder.decode(part) for part in self._shaped(raw)])[: len(latents)]

    def _shaped(self, rows: Tensor) -> tuple[Tensor, ...]:
        """(N, ...) => parts of `at_once` rows, the last one padded."""
        missing = -len(rows) % self.at_once
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]).split(self.at_once)

    def _denoise(self, labels: Tensor | None, part: slice, settings: SamplerConfig) -> DenoiserFn:
        null = self.conditioning.num_classes if self.conditioning.type == "class" else None
        rows = None if labels is None or null is None else self._padded(labels, part)
        total = self.diffusion.num_train_timesteps
        low, high = (total * share for share in settings.guidance_interval)
        rescale = settings.guidance_rescale

        return guided(self.denoise, rows, settings.guidance_scale, null, interval=(low, high), rescale=rescale)

    def _start(self, denoise: DenoiserFn, plan: SamplingPlan, end: Tensor, part: slice) -> Tensor:
        """An end of a `Blend` => noise (batch_size, C, h, w)."""
        rows = self._padded(end, part)
        if end.ndim == 1:
            return initial_noise(rows, self.latent_shape)
        return invert(denoise, self.encode(rows), plan)

    def _edit(self, denoise: DenoiserFn, plan: SamplingPlan, seeds: Tensor, part: slice, edit: Edit) -> Tensor:
        pictures, count = self._padded(edit.pictures, part), len(seeds[part])
        latents, noise = self.encode(pictures), initial_noise(self._padded(seeds, part), self.latent_shape)
        start, fresh = noised(latents, noise, plan), self._fresh(seeds, part)
        if edit.mask is None:
            return self.decode(sample_latents(denoise, start, plan, noise_fn=fresh)[:count])
        mask = to_latent_mask(edit.mask.to(self.device), self.autoencoder.factor)
        keep = keep_known(latents, noise, mask)
        drawn = self.decode(sample_latents(denoise, start, plan, noise_fn=fresh, after_step=keep)[:count])
        return paste(drawn, pictures[:count].cpu(), edit.mask)

    def _fresh(self, seeds: Tensor, part: slice) -> Callable[[int], Tensor]:
        return step_noise(self._padded(seeds, part), self.latent_shape)

    def _padded(self, values: Tensor, part: slice) -> Tensor:
        """The rows of a part (n, ...) => (batch_size, ...) on the device."""
        rows = values[part]
        return torch.cat([rows, rows.new_zeros(self.batch_size - len(rows), *rows.shape[1:])]).to(self.device)


def resolve_device(device: str) -> str:
    """`auto` => "cuda" where this machine has a GPU, else "cpu"."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def load_sampler(
    url: str,
    batch_size: int,
    device: str = "auto",
    denoiser_type: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    compile: bool = False,
) -> PictureSampler:
    """A sampler from a snapshot. Raises RequestError where it is none.

    precision: of the denoiser's weights. compile: the denoiser by torch.compile, which on a CPU needs a C++ compiler;
    the same function, other last bits.
    """
    device, snapshot = resolve_device(device), read_snapshot(url)
    denoiser = snapshot.load_denoiser(device, denoiser_type)
    if precision == "bf16":
        denoiser = denoiser.bfloat16()
    if compile:
        compile_denoiser(denoiser)
    return PictureSampler(
        denoiser,
        snapshot.load_autoencoder(device),
        snapshot.diffusion_config,
        snapshot.statistics,
        snapshot.conditioning,
        snapshot.latent_shape,
        batch_size,
    )
