"""A flow model of a picture set, trained in seconds in one process: enough to draw something like them."""

import torch
from torch import Tensor

from ldm import random
from ldm.autoencoder import Autoencoder
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.drawing import PictureSampler
from ldm.latents.manifest import Conditioning
from ldm.latents.receipt import Statistics
from ldm.plan import SamplerConfig

FLOW = DiffusionConfig(schedule="flow", prediction_type="velocity")


def draw_from_quick_model(pixels: Tensor, autoencoder: Autoencoder, steps: int, count: int) -> Tensor:
    """pixels uint8 (N, 3, H, W) to train on => drawn ones, uint8 (count, 3, H, W)."""
    latents = torch.cat([autoencoder.encode(part) for part in pixels.split(32)])[:, : autoencoder.latent_channels]
    latents = latents.clone()  # out of inference mode
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    normal = (latents - mean[:, None, None]) / std[:, None, None]
    shape = (normal.shape[1], normal.shape[2], normal.shape[3])
    config = DenoiserConfig(hidden_size=64, depth=2, num_heads=4, patch_size=2)
    denoiser = build_denoiser(config, in_channels=shape[0], sample_size=shape[1:], num_classes=None)
    optimizer = torch.optim.AdamW(denoiser.parameters(), 2e-3)
    diffusion, places = Diffusion(FLOW), torch.arange(48)
    for step in range(steps):
        ids = random.uniform_integers(0, "rows", places, step, len(normal))
        noise = random.normal(0, "noise", places, step, shape)
        t = diffusion.draw_timesteps(0, places, step)
        loss = diffusion.loss(denoiser, normal[ids], noise, t, None).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    statistics = Statistics(tuple(mean.tolist()), tuple(std.tolist()))
    sampler = PictureSampler(
        denoiser.eval().requires_grad_(False), autoencoder, FLOW, statistics, Conditioning(), shape, batch_size=64
    )
    with torch.inference_mode():
        return sampler.draw(None, torch.arange(count), SamplerConfig(num_inference_steps=12))
