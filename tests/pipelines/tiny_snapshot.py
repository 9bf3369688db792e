"""A whole snapshot with random weights, small enough to sample from in a moment."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ldm.autoencoder import load_autoencoder
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import DiffusionConfig
from ldm.latents.manifest import Conditioning
from ldm.latents.receipt import Statistics
from ldm.snapshot import write_snapshot
from tests.pictures import some_fingerprint

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = Conditioning("class", 10, NAMES)


TINY = DenoiserConfig(hidden_size=32, depth=1, num_heads=2, patch_size=2)


def write_tiny_snapshot(
    url: Path, conditioning: Conditioning = DIGITS, seed: int = 0, image_size: int = 32, config: DenoiserConfig = TINY
) -> str:
    """Writes it and returns its path. The denoiser's weights are all random: a fresh DiT would answer 0.

    image_size: in pixels; latents are (4, image_size / 8, image_size / 8).
    """
    side = image_size // 8
    torch.manual_seed(seed)
    autoencoder_url = str(url.parent / f"{url.name}-autoencoder")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=image_size,
    ).save_pretrained(autoencoder_url)
    num_classes = conditioning.num_classes or None
    denoiser = build_denoiser(config, in_channels=4, sample_size=(side, side), num_classes=num_classes)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    write_snapshot(
        str(url),
        denoiser.state_dict(),
        denoiser_config=config,
        diffusion_config=DiffusionConfig(),
        statistics=Statistics((0.1, 0.0, -0.1, 0.2), (1.0, 0.9, 1.1, 1.0)),
        conditioning=conditioning,
        latent_shape=(4, side, side),
        fingerprint=some_fingerprint(load_autoencoder(autoencoder_url), image_size),
        step=30,
        images_seen=960,
        autoencoder_url=autoencoder_url,
    )
    return str(url)
