"""A small DiT on a real latent dataset, trained step by step as the trainer does: under ZeRO, or in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm import random
from ldm.activations import checkpoint_activations
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.latents.batch import LatentBatch, draw_latents
from ldm.latents.dataset import LatentDataset
from pipelines.train import zero
from pipelines.train.ema import Ema, EmaProfile
from tests.pipelines import tiny

GLOBAL_BATCH, ACCUMULATION, SEED = 16, 2, 3
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.01, 0.5
DIT = DenoiserConfig(hidden_size=32, depth=2, num_heads=2, patch_size=1)
PROFILES = (EmaProfile("main", 0.9999), EmaProfile("short", 0.9))


def open_latents(url: str) -> LatentDataset:
    return LatentDataset(url, global_batch_size=GLOBAL_BATCH, seed=SEED)


def denoiser(dataset: LatentDataset, config: DenoiserConfig = DIT) -> nn.Module:
    channels, *size = dataset.latent_shape
    return build_denoiser(
        config,
        in_channels=channels,
        sample_size=(size[0], size[1]),
        num_classes=dataset.num_classes or None,
        seed=SEED,
    )


def loss(model: Any, dataset: LatentDataset, batch: LatentBatch) -> Tensor:
    """Mean over the batch; all that is random is keyed by the sample."""
    diffusion = Diffusion(DiffusionConfig())
    latents = draw_latents(batch, dataset.statistics, SEED)
    noise = random.normal(SEED, "noise", batch.ids, batch.epochs, tuple(latents.shape[1:]))
    t = diffusion.draw_timesteps(SEED, batch.ids, batch.epochs)
    labels = batch.labels if dataset.num_classes else None
    return diffusion.loss(model, latents, noise, t, labels).mean()


@dataclass
class Sharded:
    """One rank's engine, average and data. ids: of the rank's samples, by step; losses: means of its shares."""

    engine: zero.Engine
    ema: Ema
    dataset: LatentDataset
    ids: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def train(self, first: int, last: int) -> None:
        rank, world = self.engine.state.rank, self.engine.state.world
        for step in range(first, last):
            batch = self.dataset.batch(step, rank, world)
            micro = len(batch) // ACCUMULATION
            total, done = 0.0, None
            for start in range(0, len(batch), micro):
                mean = loss(self.engine, self.dataset, batch[start : start + micro])
                self.engine.backward(mean)
                done = self.engine.step(LEARNING_RATE)
                total += mean.item() / ACCUMULATION
            assert done is not None
            assert done.applied
            self.ema.update()
            self.ids.append(batch.ids)
            self.losses.append(total)

    def state(self) -> list[tuple[str, str, int, Tensor]]:
        return tiny.snapshot(self.engine, self.ema)


def sharded(
    url: str,
    world: int,
    stage: int,
    precision: str = "fp32",
    options: dict[str, Any] | None = None,
    checkpointing: bool = False,
) -> Sharded:
    dataset = open_latents(url)
    model = denoiser(dataset)
    if checkpointing:
        checkpoint_activations(model)
    settings = zero.deepspeed_config(
        stage=stage,
        precision=precision,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=GLOBAL_BATCH // world // ACCUMULATION,
        world=world,
        gradient_clipping=CLIP,
        options=options,
    )
    engine = zero.initialize(model, settings, weight_decay=WEIGHT_DECAY)
    return Sharded(engine, Ema(engine.state, PROFILES), dataset)


def plain(url: str, steps: int, precision: str = "fp32") -> list[float]:
    """Plain PyTorch in this process, the global batch at once; returns the loss of each step."""
    dataset = open_latents(url)
    model = denoiser(dataset)
    adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(steps):

        def forward(*inputs: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return model(*inputs)

        mean = loss(forward, dataset, dataset.batch(step))
        mean.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad()
        losses.append(mean.item())
    return losses
