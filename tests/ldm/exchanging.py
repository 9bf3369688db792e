"""Snapshots and folders of diffusers, small and random, for the tests of what goes from one to the other."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from ldm.autoencoder import Autoencoder
from ldm.denoiser import DenoiserConfig, build_denoiser
from ldm.diffusion import DiffusionConfig
from ldm.exchange import ExportConfig, ImportConfig, ImportReport, export, import_model
from ldm.latents.manifest import Conditioning
from ldm.latents.receipt import Statistics
from ldm.snapshot import Snapshot, read_snapshot, write_snapshot
from tests.pictures import some_fingerprint

TINY = DenoiserConfig(hidden_size=32, depth=2, num_heads=2, patch_size=2, timestep_frequencies="diffusers")
UNEVEN = Statistics((0.1, -0.2, 0.3, 0.4), (1.0, 2.0, 0.5, 1.5))
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def filled(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Weights that are nowhere zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_(std=std, generator=generator)
    return module.eval()


def write(url: Path, autoencoder: Autoencoder, autoencoder_url: str, **changes: Any) -> str:
    """A snapshot with latents (4, 4, 4), pictures of 8 pixels."""
    values: dict[str, Any] = {
        "denoiser_config": TINY,
        "diffusion_config": DiffusionConfig(),
        "statistics": UNEVEN,
        "conditioning": Conditioning("class", 3, ("apple", "pear", "plum")),
        "latent_shape": (4, 4, 4),
        "fingerprint": some_fingerprint(autoencoder, 8),
        "step": 7,
        "images_seen": 700,
        "autoencoder_url": autoencoder_url,
        **changes,
    }
    channels, *size = values["latent_shape"]
    classes = values["conditioning"].num_classes or None
    denoiser = build_denoiser(
        values["denoiser_config"], in_channels=channels, sample_size=tuple(size), num_classes=classes
    )
    write_snapshot(str(url), filled(denoiser).state_dict(), **values)
    return str(url)


def exported(snapshot: str) -> Path:
    folder = Path(snapshot).parent / "diffusers"
    export(ExportConfig(snapshot=snapshot, to="diffusers", output=str(folder)))
    return folder


def imported(source: Path, output: Path | None = None, **options: Any) -> tuple[Snapshot, ImportReport]:
    output = output or source.parent / "imported"
    report = import_model(ImportConfig(source=str(source), output=str(output), **options))
    return read_snapshot(str(output)), report


def inputs(count: int = 4, size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(count, 4, size, size, generator=torch.Generator().manual_seed(2))
    return x, torch.arange(count) * 333, torch.arange(count)


def their_folder(folder: Path, vae: nn.Module, changes: dict[str, Any] | None = None, **config: Any) -> Path:
    """A DiTPipeline of theirs with random weights, its blocks sharing one embedding as published ones do."""
    transformer = filled(
        DiTTransformer2DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 2,
                "sample_size": 4,
                "num_embeds_ada_norm": 1000,
                **config,
            }
        ),
        std=0.2,
    )
    first, *others = transformer.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    scheduler = DDIMScheduler(clip_sample=False, **(changes or {}))
    DiTPipeline(transformer, vae, scheduler).save_pretrained(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def replace_weights(folder: Path, change: Any) -> None:
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    change(weights)
    safetensors.torch.save_file(weights, folder / WEIGHTS)
