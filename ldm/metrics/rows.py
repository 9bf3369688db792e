"""What a row is, and distances between rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ROWS = 256  # of the smaller side of a distance matrix: 256 x 50,000 float64 distances take 100 MB
_EQUAL = 1e-12  # of the squared lengths: far below what float32 rows can differ by, far above the rounding of float64


def as_rows(features: Tensor) -> Tensor:
    """Any (N, ...) tensor => float64 (N, D)."""
    if features.ndim < 2:
        raise ValueError(f"features must be one row for each sample, (N, D), not {tuple(features.shape)}")
    return features.flatten(1).to(torch.float64)


def distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Euclidean distances of float64 rows (N, D) and (M, D), in blocks of rows of a: yields (CHUNK_ROWS, M).

    |a|² - 2ab + |b|², many times as fast as differences, leaves about 1e-8 between equal rows, which a ball of radius
    0 (repeated samples) must not lose: what is nearer than rounding can tell is 0.
    """
    centre = b.mean(0)  # short rows round less
    a, b = a - centre, b - centre
    lengths = b.square().sum(1)
    for block in a.split(CHUNK_ROWS):
        scale = block.square().sum(1, keepdim=True) + lengths
        squared = torch.addmm(scale, block, b.T, alpha=-2)
        yield torch.where(squared > _EQUAL * scale, squared, 0.0).sqrt()
