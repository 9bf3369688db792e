"""What the readers of other formats give: a DiT in our layout, and what is known of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.config import RequestError
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import DiffusionConfig
from ldm.latents.manifest import Conditioning


@dataclass(frozen=True)
class ForeignModel:
    """weights: by our names, fp32. latent_shape: (C, h, w). notes: for the reader, a line each."""

    weights: dict[str, Tensor]
    denoiser: DenoiserConfig
    diffusion: DiffusionConfig
    conditioning: Conditioning
    latent_shape: tuple[int, int, int]
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, Any] | None = None  # the rules that its pictures were made by, where known
    step: int = 0
    images_seen: int = 0

    def check(self) -> None:
        """Raises RequestError where the weights are not those of `denoiser`, or are no numbers."""
        with torch.device("meta"):
            expected = build_denoiser(
                self.denoiser,
                in_channels=self.latent_shape[0],
                sample_size=self.latent_shape[1:],
                num_classes=self.conditioning.num_classes or None,
            ).state_dict()
        for name in sorted({*expected, *self.weights}):
            wanted, found = (list(s[name].shape) if name in s else None for s in (expected, self.weights))
            if wanted != found:
                raise RequestError(f"holds {name} of shape {found}, expected {wanted}: weights of another model")
            if not self.weights[name].isfinite().all():
                raise RequestError(f"holds {name} with values that are not finite; it is damaged")
