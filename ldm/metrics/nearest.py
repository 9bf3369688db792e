"""Nearest rows of another set: what is drawn beside what was trained on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.metrics.rows import as_rows, distances

AROUND = 50


@dataclass(frozen=True)
class Neighbours:
    """Of each row of a, in b: the Euclidean distance to the nearest row, float64 (N,), and its number, int64 (N,).

    closeness: that distance over the mean one to the 50 nearest rows, float64 (N,) from 0 (a copy) to 1 (a row like any
    other of its surroundings). The measure of Carlini et al. 2023 ("Extracting training data from diffusion models",
    section 4): a plain distance calls every smooth picture a copy.
    """

    distance: Tensor
    row: Tensor
    closeness: Tensor


def nearest_neighbours(a: Tensor, b: Tensor) -> Neighbours:
    """The nearest rows of b (M, D), M at least 1, to each row of a (N, D)."""
    a, b = as_rows(a), as_rows(b)
    if len(b) == 0:
        raise ValueError("no rows to be near to: b is empty")
    found = [block.topk(min(AROUND, len(b)), dim=1, largest=False) for block in distances(a, b)]
    near, rows = torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
    around = near.mean(1)
    return Neighbours(near[:, 0], rows[:, 0], torch.where(around > 0, near[:, 0] / around, 0.0))


def nearest_distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance from each row of a (N, D) to the nearest row of b (M, D): float64 (N,).

    With a the samples and b the training set it shows memorising, read beside the same for held-out rows.
    """
    return nearest_neighbours(a, b).distance
