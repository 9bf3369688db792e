"""Small networks from pictures to features, as files: what a user would name in `features=`."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Means(nn.Module):
    """uint8 (N, 3, H, W) => (features (N, 48), logits (N, 5)): colours of the cells of a 4 x 4 grid, mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(48, 48)
        self.head = nn.Linear(48, 5)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 7

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cells = F.adaptive_avg_pool2d(x.float() / 127.5 - 1, (4, 4)).flatten(1)
        features = cells + self.mix(cells).tanh()
        return features, self.head(features)


class InceptionLike(nn.Module):
    """With the switches of NVIDIA's TorchScript of Inception."""

    def forward(self, x: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = x.float().mean((2, 3))
        if return_features:
            return features
        return (features / 10 + (0.0 if no_output_bias else 1.0) * torch.arange(3)).softmax(1)


class Faulty(nn.Module):
    """Answers wrongly, in the way that `fault` names."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        if self.fault == "raises":
            raise ValueError("no such thing")
        rows = x.float().mean((2, 3))
        if self.fault == "shape":
            return rows[:, :, None].expand(-1, -1, 2)
        if self.fault == "rows":
            return rows[:1]
        if self.fault == "integers":
            return rows.long()
        return rows / 0 * 0


def write_script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation
        torch.jit.script(module.eval()).save(str(path))
    return path


def write_exported(module: nn.Module, path: Path, shape: tuple[int, ...], free_batch: bool = True) -> Path:
    example = (torch.zeros(shape, dtype=torch.uint8),)
    options: dict[str, Any] = {"dynamic_shapes": {"x": {0: torch.export.Dim("n", min=1)}}} if free_batch else {}
    torch.export.save(torch.export.export(module.eval(), example, **options), path)
    return path
