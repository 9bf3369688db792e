"""Does the model recite? The training pictures nearest to samples, beside those nearest to held-out pictures."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ldm import images, metrics
from pipelines.evaluate.measures import FLOOR, SAMPLES, Figure, Sides, figure
from pipelines.evaluate.reference import Pictures, Reference

_PAIRS = 10
_BAND = 8
_RARE = 0.01
"""Share of the held-out pictures that are at least as close to a training picture as what counts as memorised."""


@dataclass(frozen=True)
class Nearest:
    """figures: `nearest_train` and `memorised`. neighbours: of the samples and, where there are, of held-out ones."""

    figures: list[Figure]
    neighbours: dict[str, metrics.Neighbours]


def nearest(sides: Sides, train: Tensor, seed: int) -> Nearest:
    """In pixels. sides: rows of the samples and of all held-out pictures (FLOOR).

    nearest_train: mean distance to the nearest training picture; far below the floor the model recites what it was
    trained on. memorised: share of the samples that are closer to a training picture, by `Neighbours.closeness`, than
    all but 1% of the held-out pictures are; the floor is thus about 0.01.
    """
    together = metrics.nearest_neighbours(torch.cat([*sides.values()]), train)  # train is large: one way through it
    counts = [len(rows) for rows in sides.values()]
    parts = zip(*(each.split(counts) for each in (together.distance, together.row, together.closeness)), strict=True)
    found = {side: metrics.Neighbours(*part) for side, part in zip(sides, parts, strict=True)}
    figures = [figure("nearest_train", {side: near.distance for side, near in found.items()}, seed)]
    if FLOOR in found:
        rare = found[FLOOR].closeness.quantile(_RARE)
        close = {side: (near.closeness <= rare).double() for side, near in found.items()}
        figures.append(figure("memorised", close, seed))
    return Nearest(figures, found)


def pairs(near: Nearest, reference: Reference) -> dict[str, list[dict[str, Any]]]:
    """For report.json: the ten closest pairs of each side: the picture's number, the training picture's name."""
    return {
        side: [
            {
                "picture": row,
                "training_picture": reference.train_names[int(found.row[row])],
                "distance": float(found.distance[row]),
                "closeness": float(found.closeness[row]),
            }
            for row in _closest(found).tolist()
        ]
        for side, found in near.neighbours.items()
    }


def pairs_grid(near: Nearest, samples: Pictures, reference: Reference) -> npt.NDArray[np.uint8]:
    """uint8 (3, H, W): the ten closest samples, each above its training picture; below, held-out ones likewise."""
    blocks: list[npt.NDArray[np.uint8]] = []
    for side, pictures in ((SAMPLES, samples), (FLOOR, reference.holdout)):
        if side not in near.neighbours:
            continue
        found = near.neighbours[side]
        rows = _closest(found)
        both = torch.full((2 * _PAIRS, *samples.pixels.shape[1:]), 255, dtype=torch.uint8)
        both[: len(rows)] = pictures.pixels[rows]
        both[_PAIRS : _PAIRS + len(rows)] = reference.train.pixels[found.row[rows]]
        blocks += [images.grid(both.numpy(), _PAIRS)]
    band = np.full((3, _BAND, blocks[0].shape[2]), 255, np.uint8)
    return np.concatenate([blocks[0], *(part for block in blocks[1:] for part in (band, block))], axis=1)


def _closest(found: metrics.Neighbours) -> Tensor:
    return found.closeness.argsort(stable=True)[:_PAIRS]
