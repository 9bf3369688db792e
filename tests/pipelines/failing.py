"""Denoisers that can be built, and fail when they are used, or come to a halt."""

import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Failing(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        raise ValueError("this very denoiser")


class Halting(nn.Module):
    """Stands still for an hour as soon as there is a file `halt`."""

    def __init__(self, *, in_channels: int, halt: str, **options: Any) -> None:
        super().__init__()
        self.halt = Path(halt)
        self.conv = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        if self.halt.exists():
            time.sleep(3600)
        return self.conv(x)
