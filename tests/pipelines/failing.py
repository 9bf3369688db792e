"""A denoiser that can be built, and fails when it is used."""

from typing import Any

from torch import Tensor, nn


class Failing(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        raise ValueError("this very denoiser")
