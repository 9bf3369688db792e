"""What an evaluation leaves: report.json, with all that its figures depend on, and the grid of real and drawn."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ldm import images
from ldm.classifier import PICTURE_SIZE, Classifier
from ldm.features import LATENT_SIDE, Extractor, Features
from ldm.snapshot import Snapshot
from pipelines.evaluate import classes, measures
from pipelines.evaluate.figures import Measured
from pipelines.evaluate.memory import pairs
from pipelines.evaluate.reference import Pictures, Reference

_GRID_COLUMNS, _GRID_ROWS, _GRID_BAND = 10, 4, 8


def document(
    settings: dict[str, Any], snapshot: Snapshot, reference: Reference, features: Features, measured: Measured
) -> dict[str, Any]:
    """report.json. settings: those of the request that decide figures."""
    return {
        "format": "ldm-evaluation",
        "version": 1,
        "snapshot": {
            "url": snapshot.url,
            "step": snapshot.step,
            "images_seen": snapshot.images_seen,
            "weights_sha256": snapshot.weights_sha256,
        },
        "settings": settings,
        "reference": {
            "train": len(reference.train) or measured.gaussian.count,
            "holdout": len(reference.holdout),
            "skipped": reference.skipped,
            "pictures": snapshot.fingerprint["pictures"],
        },
        "features": features.name,
        "resize": resize_modes(snapshot, features),
        "recall": {"neighbours": measures.NEIGHBOURS, "pixels": measures.COMPARED_SIZE},
        "metrics": measured.metrics,
        "figures": {figure.name: figure.document() for figure in measured.figures},
        "by_class": measured.by_class,
        "worst_class": classes.worst_classes(measured.by_class),
        "nearest": pairs(measured.nearest, reference) if measured.nearest else {},
    }


def table(measured: Measured) -> str:
    """The figures for a person: of the samples with the interval, then what they are read beside."""
    sides = (measures.EQUAL, measures.FLOOR, measures.RECONSTRUCTION)
    width = max(len(figure.name) for figure in measured.figures)
    head = f"{'':<{width}} {'samples':>10} {'(95% interval)':>21}" + "".join(f"{side:>16}" for side in sides)
    lines = [head.rstrip()]
    for figure in measured.figures:
        drawn = figure.sides[measures.SAMPLES]
        interval = f"({drawn.low:.4g} to {drawn.high:.4g})"
        others = (f"{figure.sides[side].value:.4g}" if side in figure.sides else "-" for side in sides)
        beside = "".join(f"{text:>16}" for text in others)
        lines.append(f"{figure.name:<{width}} {drawn.value:>10.4g} {interval:>21}{beside}")
    return "\n".join(lines)


def resize_modes(snapshot: Snapshot, features: Features) -> dict[str, str]:
    """How pictures come to the sizes in which they are measured; a Fréchet distance moves with it."""
    rules, (height, width) = snapshot.fingerprint["pictures"], snapshot.picture_shape()
    if isinstance(features, Classifier):
        inside = f"bilinear, antialiased, to {PICTURE_SIZE}x{PICTURE_SIZE}"
    elif isinstance(features, Extractor):
        inside = "none here; what the network itself does"
    else:
        inside = f"none; latents averaged to at most {LATENT_SIDE}x{LATENT_SIDE}"
    return {
        "reference": f"{rules.get('resize')}, {rules.get('crop')}, to {width}x{height}",
        "features": inside,
        "pixels": f"bilinear, antialiased, to {measures.COMPARED_SIZE}x{measures.COMPARED_SIZE} where larger",
    }


def grid(samples: Pictures, reference: Reference, snapshot: Snapshot) -> npt.NDArray[np.uint8]:
    """uint8 (3, H, W): real pictures on top, held out where there are enough, and sampled ones below."""
    real = reference.holdout if len(reference.holdout) >= _GRID_COLUMNS * _GRID_ROWS else reference.train
    columns = min(snapshot.conditioning.num_classes or _GRID_COLUMNS, _GRID_COLUMNS)
    top, below = (images.grid(_rows(pictures, columns).numpy(), columns) for pictures in (real, samples))
    band = np.full((3, _GRID_BAND, top.shape[2]), 255, np.uint8)
    return np.concatenate([top, band, below], axis=1)


def _rows(pictures: Pictures, columns: int) -> torch.Tensor:
    """uint8 (rows * columns, 3, H, W): a class in each column where there are labels; white where one has no more."""
    chosen = torch.full((_GRID_ROWS * columns, *pictures.pixels.shape[1:]), 255, dtype=torch.uint8)
    if pictures.labels is None:
        first = pictures.pixels[: len(chosen)]
        chosen[: len(first)] = first
        return chosen
    for label in range(columns):
        found = pictures.pixels[pictures.labels == label][:_GRID_ROWS]
        chosen[label : len(found) * columns : columns] = found
    return chosen
