"""Your own denoiser, trained, sampled and served like the built-in one:

    PYTHONPATH=examples ldm train ... denoiser.type=custom_denoiser:MyDenoiser denoiser.options.width=64

It is any torch module whose forward(x (N, C, H, W), t (N,), labels (N,)) answers in the shape of x. The label
num_classes is the null class; where num_classes is None, labels are None. Here: residual convolutions.
"""

import torch
from torch import Tensor, nn


class MyDenoiser(nn.Module):
    def __init__(self, *, in_channels: int, sample_size: tuple[int, int], num_classes: int | None, width: int = 64):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2 * 16, width), nn.SiLU(), nn.Linear(width, width))
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(4)
        )
        self.last = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        angles = t.float()[:, None] * torch.logspace(0, -4, 16, device=t.device)  # (N, 16)
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if self.label is not None:
            condition = condition + self.label(labels)
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h + condition[:, :, None, None])
        return self.last(h)
