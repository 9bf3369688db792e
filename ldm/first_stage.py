"""A first stage of one's own: a small AutoencoderKL (diffusers) trained on raw pictures, in minutes on a CPU.

It serves data that is far from photographs, where a pretrained autoencoder has nothing to say: the digits of
the demonstration. The losses are those of Rombach et al. 2022, appendix G, less the adversarial and
perceptual terms.

    train_autoencoder   raw pictures => a folder that diffusers and `ldm encode` read
    measure             what an autoencoder keeps of pictures that it has not seen

    N  pictures      C  latent channels      h, w  latent height, width
"""

from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ldm import random
from ldm.config import Config

if TYPE_CHECKING:  # slow to import, and needed only where a first stage is trained
    from diffusers import AutoencoderKL


class FirstStageConfig(Config):
    """An AutoencoderKL and its training."""

    block_out_channels: tuple[int, ...] = Field(
        (8, 16, 32, 32), description="channels at each resolution; all but the first halve the sides"
    )
    latent_channels: int = Field(4, ge=1, description="channels of a latent")
    layers_per_block: int = Field(1, ge=1, description="residual blocks at each resolution")
    kl_weight: float = Field(1e-3, ge=0, description="weight of the KL divergence, nats per latent number")
    epochs: int = Field(12, ge=1, description="passes over the pictures")
    batch_size: int = Field(32, ge=1, description="pictures in an optimizer step")
    learning_rate: float = Field(2e-3, gt=0, description="peak of the one-cycle schedule")
    seed: int = Field(0, description="of the weights, the order and the posterior noise")


def train_autoencoder(
    pictures: Tensor,
    folder: str | Path,
    config: FirstStageConfig,
    *,
    held_out: Tensor | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Trains on pictures uint8 (N, 3, H, W) and saves a diffusers folder (config.json, safetensors).

    The same weights for the same arguments on one machine and thread count. `progress(step, steps, loss)` is
    called after each step. Returns `measure` of the held-out pictures (of the training ones where none are
    given) and {pictures, steps, seconds}.
    """
    started = monotonic()
    model = _new_autoencoder(config, pictures.shape[-1]).train()
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=1e-4)
    batch_size = min(config.batch_size, len(pictures))
    steps_per_epoch = len(pictures) // batch_size
    steps = config.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps)
    ids = torch.arange(len(pictures))
    for epoch in range(config.epochs):
        order = random.uniform(config.seed, "first-stage-order", ids, epoch).argsort(stable=True)
        for i in range(steps_per_epoch):
            rows = order[i * batch_size : (i + 1) * batch_size]
            loss = _loss(model, _model_input(pictures[rows]), rows, epoch, config)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(epoch * steps_per_epoch + i + 1, steps, loss.item())
    report = measure(model.eval(), pictures if held_out is None else held_out)
    # What diffusers' own pipelines multiply latents with; `ldm` keeps statistics for each channel instead.
    model.register_to_config(scaling_factor=1 / report["latent_rms"])
    model.save_pretrained(folder)
    return {**report, "pictures": len(pictures), "steps": steps, "seconds": monotonic() - started}


@torch.no_grad()
def measure(model: "AutoencoderKL", pictures: Tensor, batch_size: int = 64) -> dict[str, Any]:
    """What an AutoencoderKL keeps of pictures uint8 (N, 3, H, W).

    Returns {psnr: dB, of decoded posterior means, the mean over pictures; kl: nats per latent number;
    latent_std: of each channel; latent_rms: over all}.
    """
    means, kls, psnrs = [], [], []
    for batch in pictures.split(batch_size):
        inputs = _model_input(batch)
        mean, logvar = _posterior(model, inputs)
        decoded = model.decode(mean).sample.clamp(-1, 1)
        squared_error = ((decoded - inputs) / 2).square().flatten(1).mean(1)  # of pixels in [0, 1]
        psnrs.append(-10 * squared_error.log10())
        kls.append(_kl(mean, logvar).flatten(1).mean(1))
        means.append(mean)
    latents = torch.cat(means)
    return {
        "psnr": float(torch.cat(psnrs).mean()),
        "kl": float(torch.cat(kls).mean()),
        "latent_std": latents.std((0, 2, 3)).tolist(),
        "latent_rms": float(latents.square().mean().sqrt()),
    }


def _new_autoencoder(config: FirstStageConfig, picture_size: int) -> "AutoencoderKL":
    from diffusers import AutoencoderKL

    blocks = len(config.block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=min(8, min(config.block_out_channels) // 2),
            sample_size=picture_size,
        )
    return model.to(memory_format=torch.channels_last)  # a fifth faster on a CPU


def _loss(model: "AutoencoderKL", inputs: Tensor, ids: Tensor, epoch: int, config: FirstStageConfig) -> Tensor:
    mean, logvar = _posterior(model, inputs)
    noise = random.normal(config.seed, "first-stage-posterior", ids, epoch, tuple(mean.shape[1:]))
    decoded = model.decode(mean + noise * (logvar / 2).exp()).sample
    reconstruction = F.mse_loss(decoded, inputs) + F.l1_loss(decoded, inputs)
    return reconstruction + config.kl_weight * _kl(mean, logvar).mean()


def _posterior(model: "AutoencoderKL", inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in [-1, 1] (N, 3, H, W) => mean and logvar, (N, C, h, w) each."""
    posterior = model.encode(inputs).latent_dist
    return posterior.mean, posterior.logvar


def _kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), in nats, for each number."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def _model_input(pictures: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) => float32 in [-1, 1], channels last."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
