"""A batch of stored latents, and what a training step makes of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm import random
from ldm.latents.receipt import Statistics


@dataclass(frozen=True)
class LatentBatch:
    """moments: fp16 (B, 2C or C, h, w), raw. labels: int64 (B,), the null class where there is none.
    ids, epochs: int64 (B,): what the random numbers of a sample are keyed by. captions: (B,) texts, where asked for."""

    moments: Tensor
    labels: Tensor
    ids: Tensor
    epochs: Tensor
    captions: tuple[str | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def pinned(self) -> "LatentBatch":
        """The same in page-locked memory."""
        each = (self.moments, self.labels, self.ids, self.epochs)
        moments, labels, ids, epochs = (part if part.is_pinned() else part.pin_memory() for part in each)
        return LatentBatch(moments, labels, ids, epochs, self.captions)

    def __getitem__(self, part: slice) -> "LatentBatch":
        captions = None if self.captions is None else self.captions[part]
        return LatentBatch(self.moments[part], self.labels[part], self.ids[part], self.epochs[part], captions)


def draw_latents(batch: LatentBatch, statistics: Statistics, seed: int, device: str | torch.device = "cpu") -> Tensor:
    """Raw moments => normalised latents float32 (B, C, h, w): a posterior sample, keyed by (seed, epoch, id)."""
    moments = batch.moments.to(device, non_blocking=True).float()
    mean, std = channels(statistics.mean, device), channels(statistics.std, device)
    num_channels = len(statistics.mean)
    latents = moments[:, :num_channels]
    if moments.shape[1] == 2 * num_channels:
        ids, epochs = batch.ids.to(device), batch.epochs.to(device)
        noise = random.normal(seed, "posterior", ids, epochs, tuple(latents.shape[1:]))
        latents = latents + (0.5 * moments[:, num_channels:]).exp() * noise
    return (latents - mean) / std


def channels(values: tuple[float, ...], device: str | torch.device = "cpu") -> Tensor:
    """(C,) => float32 (1, C, 1, 1)"""
    return torch.tensor(values, dtype=torch.float32, device=device)[None, :, None, None]
