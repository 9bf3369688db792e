"""Small made inputs: pictures, image shards, random models, latent datasets, snapshots."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm import images
from ldm.autoencoder import Autoencoder
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import DiffusionConfig
from ldm.images import PictureRules
from ldm.latents.manifest import Conditioning, Store, commit_generation, fingerprint_hash, make_fingerprint
from ldm.latents.receipt import ShardReceipt, Statistics
from ldm.latents.writer import ShardWriter
from ldm.shards import RawSample, write_shard
from ldm.snapshot import write_snapshot


def picture(number: int, width: int = 20, height: int = 16) -> Image.Image:
    """A smooth RGB picture of its own for each number."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(2 * np.pi * (x * (1 + number % 3) + y * (1 + c) + number / 7 + c / 3)) for c in range(3)]
    return Image.fromarray((127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def samples(count: int, start: int = 0, classes: int = 3) -> list[RawSample]:
    """Labelled pictures with captions; keys `00000`, `00001`, ..."""
    return [
        RawSample(
            f"{n:05d}",
            {"png": encoded(picture(n)), "cls": str(n % classes).encode(), "txt": f"picture {n}".encode()},
        )
        for n in range(start, start + count)
    ]


def image_shard(path: Path | str, content: list[RawSample]) -> str:
    write_shard(str(path), content)
    return str(path)


def kl_model(seed: int = 0, latent_channels: int = 4) -> torch.nn.Module:
    """A random AutoencoderKL, factor 2, of 40,000 weights."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=latent_channels,
            sample_size=16,
        )


def tiny_model(seed: int = 0) -> torch.nn.Module:
    """A random AutoencoderTiny, factor 4, deterministic."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )


def dc_model() -> torch.nn.Module:
    """A random AutoencoderDC, factor 4, deterministic."""
    import diffusers

    sides = [f"{side}_{key}" for side in ("encoder", "decoder") for key in ("block_out_channels", "layers_per_block")]
    sizes = dict(zip(sides, [(8, 16, 16), (1, 1, 1)] * 2, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.AutoencoderDC(
            latent_channels=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            attention_head_dim=8,
            **sizes,
        )


def records(count: int, seed: int = 0, shape: tuple[int, ...] = (8, 2, 2)) -> np.ndarray:
    """Random fp16 moments (count, 2C, h, w) with log variances around -2."""
    values = np.random.default_rng(seed).normal(size=(count, *shape))
    values[:, shape[0] // 2 :] -= 2
    return values.astype(np.float16)


def write_latent_shard(
    url: str,
    name: str,
    moments: np.ndarray,
    *,
    fingerprint: str,
    keys: Sequence[str] | None = None,
    classes: int = 3,
    quarantined: int = 0,
    channels: int = 4,
) -> ShardReceipt:
    keys = keys or [f"{n:05d}" for n in range(len(moments))]
    with ShardWriter(url, name, fingerprint, channels) as writer:
        for number, (key, record) in enumerate(zip(keys, moments, strict=True)):
            label = number % classes if classes else None
            writer.add(key, record, label=label, caption=f"caption {number}", width=20, height=16)
        for number in range(quarantined):
            writer.refuse("quarantined", f"bad-{number}", "planted", len(moments) + number)
        return writer.commit(len(moments) + quarantined, 1000, "0" * 64)


def some_fingerprint(autoencoder: Autoencoder, size: int, store: Store = "moments") -> dict[str, Any]:
    return make_fingerprint(autoencoder, PictureRules((size,)).fingerprint(), store, "float32")


COUNTS = (7, 13, 1, 5)
TOTAL = sum(COUNTS)


def latent_dataset(
    url: str, autoencoder: Autoencoder, counts: Sequence[int] = COUNTS, **options: Any
) -> tuple[str, dict[str, np.ndarray]]:
    """A committed latent dataset of random moments. Returns (generation, moments by shard name)."""
    fingerprint = some_fingerprint(autoencoder, 4)
    content = {f"shard-{i}": records(count, seed=i) for i, count in enumerate(counts)}
    receipts = [
        write_latent_shard(url, name, moments, fingerprint=fingerprint_hash(fingerprint), **options)
        for name, moments in content.items()
    ]
    return commit_generation(url, receipts, fingerprint, autoencoder.latent_channels, autoencoder.factor), content


COSINE_V = DiffusionConfig(schedule="cosine", prediction_type="v_prediction")
TINY_DIT = DenoiserConfig(hidden_size=16, depth=1, num_heads=2, patch_size=2)
FRUIT = Conditioning("class", 3, ("apple", "pear", "plum"))


def write_tiny_snapshot(
    url: str,
    autoencoder: Autoencoder,
    autoencoder_url: str,
    *,
    denoiser_config: DenoiserConfig = TINY_DIT,
    conditioning: Conditioning = FRUIT,
    diffusion_config: DiffusionConfig = COSINE_V,
    latent_shape: tuple[int, int, int] = (4, 4, 4),
    fingerprint: dict[str, Any] | None = None,
) -> None:
    """A snapshot of a random denoiser for pictures of 8 pixels, by default through latents and a factor of 2."""
    channels, *size = latent_shape
    denoiser = build_denoiser(
        denoiser_config, in_channels=channels, sample_size=tuple(size), num_classes=conditioning.num_classes or None
    )
    generator = torch.Generator().manual_seed(0)  # a fresh DiT answers 0
    weights = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in denoiser.state_dict().items()}
    write_snapshot(
        url,
        weights,
        denoiser_config=denoiser_config,
        diffusion_config=diffusion_config,
        statistics=Statistics((0.1, 0.2, 0.3, 0.4)[:channels], (1.0, 2.0, 0.5, 1.5)[:channels]),
        conditioning=conditioning,
        latent_shape=latent_shape,
        fingerprint=fingerprint or some_fingerprint(autoencoder, 8),
        step=7,
        images_seen=700,
        autoencoder_url=autoencoder_url,
    )


def write_pictures(path: Path, labels: list[int | None]) -> str:
    """A shard of small pictures of noise, with a label or none."""
    generator = np.random.default_rng(0)
    content = []
    for i, label in enumerate(labels):
        png = images.to_png(generator.integers(0, 256, (3, 32, 32), dtype=np.uint8))
        members = {"png": png} if label is None else {"png": png, "cls": str(label).encode()}
        content.append(RawSample(f"{i:03d}", members))
    write_shard(str(path), content)
    return str(path)
