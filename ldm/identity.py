"""The first stage that does nothing: pixels in [-1, 1] are the latents. Pixel diffusion is then the same pipeline."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn


class IdentityAutoencoder(nn.Module):
    """x (N, 3, H, W) in [-1, 1] => the same, with the interface of a diffusers autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"latent_channels": 3, "block_out_channels": [3]}  # one stage: factor 1
        self.encoder = nn.Identity()
        self.place = nn.Parameter(torch.empty(0))  # holds nothing, but says on which device this is

    def encode(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=self.encoder(x))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)

    def save_pretrained(self, folder: str | Path) -> None:
        """The two files of a diffusers folder."""
        config = {"_class_name": type(self).__name__, **self.config}
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        safetensors.torch.save_file(self.state_dict(), Path(folder) / "diffusion_pytorch_model.safetensors")
