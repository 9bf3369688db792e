"""The loss of a batch. What is random is a function of (seed, epoch, sample id), not of rank, world or micro-batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm import random
from ldm.diffusion import Denoiser, Diffusion
from ldm.latents.batch import LatentBatch, draw_latents
from ldm.latents.dataset import LatentDataset
from pipelines.train.config import TrainConfig

VALIDATION_TIMES = 8


class Objective:
    """The training loss, and the validation loss at fixed timesteps; each of every sample, (B,) float32."""

    def __init__(self, config: TrainConfig, dataset: LatentDataset, device: torch.device) -> None:
        self.config, self.device = config, device
        self.statistics, self.num_classes = dataset.statistics, dataset.num_classes
        self.diffusion = Diffusion(config.diffusion, device)

    def training_losses(self, denoiser: Denoiser, batch: LatentBatch) -> Tensor:
        """Posterior sample, noise, timestep and dropped label are keyed by (seed, epoch, id)."""
        seed, ids, epochs = self.config.seed, batch.ids.to(self.device), batch.epochs.to(self.device)
        latents = draw_latents(batch, self.statistics, seed, self.device)
        noise = random.normal(seed, "noise", ids, epochs, tuple(latents.shape[1:]))
        t = self.diffusion.draw_timesteps(seed, ids, epochs)
        labels = None
        if self.num_classes:
            dropped = random.uniform(seed, "label-dropout", ids, epochs) < self.config.denoiser.label_dropout
            labels = torch.where(dropped, self.num_classes, batch.labels.to(self.device))
        return self.diffusion.loss(denoiser, latents, noise, t, labels)

    def validation_losses(self, denoiser: Denoiser, batch: LatentBatch, t: int) -> Tensor:
        """With labels, and noise keyed by (seed, id, t): the same at every validation of a run."""
        seed, ids = self.config.seed, batch.ids.to(self.device)
        once = LatentBatch(batch.moments, batch.labels, batch.ids, torch.zeros_like(batch.epochs))
        latents = draw_latents(once, self.statistics, seed, self.device)
        noise = random.normal(seed, "validation-noise", ids, t, tuple(latents.shape[1:]))
        times = torch.full_like(ids, t, dtype=torch.float32 if self.config.diffusion.is_flow else torch.int64)
        labels = batch.labels.to(self.device) if self.num_classes else None
        return self.diffusion.loss(denoiser, latents, noise, times, labels)

    def validation_times(self) -> Sequence[int]:
        """T/8, 2T/8 … T; without a flow, whose last step is T - 1, that."""
        total = self.config.diffusion.num_train_timesteps
        last = total if self.config.diffusion.is_flow else total - 1
        return [min(last, total * k // VALIDATION_TIMES) for k in range(1, VALIDATION_TIMES + 1)]
