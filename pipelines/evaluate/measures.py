"""What is measured, as functions of pictures. Every figure of the samples stands beside a floor: the same of pictures
that the model never saw. A floor is no bound, but what a perfect model would give about.

    N  samples      M  held-out pictures
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import metrics
from ldm.autoencoder import Autoencoder
from ldm.classifier import Classifier
from pipelines.evaluate.reference import Pictures, Reference

NEIGHBOURS = 5
COMPARED_SIZE = 32
"""Side, in pixels, to which pictures are reduced before they are compared pixel by pixel."""
_LATENT_SIDE = 8
_BATCH = 32


class Features(Protocol):
    """A network from pictures to features; `name` carries the hash of its weights."""

    name: str

    def features(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) => float32 (N, D)"""


class VaeFeatures:
    """Mean latents, averaged to at most 8 x 8 cells: blind to what the decoder does, and to fine detail."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.name = f"vae-{autoencoder.weights_sha256[:12]}"

    def features(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) => float32 (N, D), on the CPU."""
        return torch.cat([self._batch(batch) for batch in pictures.split(_BATCH)])

    def _batch(self, pictures: Tensor) -> Tensor:
        latents = self.autoencoder.encode(pictures)[:, : self.autoencoder.latent_channels]
        height, width = (min(side, _LATENT_SIDE) for side in latents.shape[2:])
        return F.adaptive_avg_pool2d(latents, (height, width)).flatten(1).cpu()


@dataclass(frozen=True)
class Figures:
    """metrics: name => figure. by_class: rows of class number and figures; empty where there are no labels."""

    metrics: dict[str, float]
    by_class: list[dict[str, Any]]


def frechet_distances(samples: Pictures, reference: Reference, features: Features, seed: int) -> dict[str, float]:
    """`fd-NAME`: samples against training pictures, in the named features. Never called FID.

    The distance falls as a set grows. `fd-NAME_floor` is that of the M held-out pictures, and `fd-NAME_equal_n` that
    of equally many samples, of the same classes: these two compare.
    """
    name = f"fd-{features.name}"
    train, drawn = features.features(reference.train.pixels), features.features(samples.pixels)
    figures = {name: metrics.frechet_distance(drawn, train)}
    sample_rows, holdout_rows = equal_rows(samples, reference.holdout, seed)
    if len(holdout_rows) > 1:
        floor = features.features(reference.holdout.pixels[holdout_rows])
        figures[f"{name}_equal_n"] = metrics.frechet_distance(drawn[sample_rows], train)
        figures[f"{name}_floor"] = metrics.frechet_distance(floor, train)
    return figures


def nearest_distances(samples: Pictures, reference: Reference) -> dict[str, float]:
    """Mean distance to the nearest training picture. Far below the floor: the model recites what it was trained on."""
    train = compared(reference.train.pixels)
    figures = {"nearest_train": float(metrics.nearest_distance(compared(samples.pixels), train).mean())}
    if len(reference.holdout):
        held_out = compared(reference.holdout.pixels)
        figures["nearest_train_floor"] = float(metrics.nearest_distance(held_out, train).mean())
    return figures


def conditional_accuracy(samples: Pictures, reference: Reference, classifier: Classifier, seed: int) -> Figures:
    """Share of the samples that the classifier reads as the class asked for, beside its own held-out accuracy."""
    assert samples.labels is not None and reference.holdout.labels is not None
    right = (classifier.predict(samples.pixels) == samples.labels).double()
    low, high = metrics.bootstrap_interval(right, seed=seed)
    rows = [
        {"class": label, "accuracy": float(right[samples.labels == label].mean())}
        for label in torch.unique(samples.labels).tolist()
    ]
    figures = {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_worst_class": min(row["accuracy"] for row in rows),
        "classifier_accuracy": classifier.accuracy(reference.holdout.pixels, reference.holdout.labels),
    }
    return Figures(figures, rows)


def class_recall(samples: Pictures, reference: Reference, seed: int) -> Figures:
    """Within-class recall (k = 5, pixels) of samples, and of equally many held-out pictures as the floor.

    recall_ratio is the mean recall over the mean floor; recall_ratio_worst_class the least of one class. Classes
    with too few pictures to span a manifold are left out; nothing is said where none is left.
    """
    train = reference.train
    sample_rows, holdout_rows = equal_rows(samples, reference.holdout, seed)
    drawn, held_out = samples.take(sample_rows), reference.holdout.take(holdout_rows)
    assert train.labels is not None and drawn.labels is not None and held_out.labels is not None
    numbers, counts = torch.unique(held_out.labels, return_counts=True)
    measured = numbers[counts > NEIGHBOURS]
    real = train.take(torch.isin(train.labels, measured))
    if not len(real):
        return Figures({}, [])
    assert real.labels is not None
    pixels = compared(real.pixels)
    recalls, floors = (
        metrics.within_class_recall(pixels, real.labels, compared(a.pixels), b, NEIGHBOURS)
        for a, b in ((drawn, drawn.labels), (held_out, held_out.labels))
    )
    labels = torch.unique(real.labels).tolist()
    rows = [
        {"class": label, "recall": recall, "recall_floor": floor}
        for label, recall, floor in zip(labels, recalls.tolist(), floors.tolist(), strict=True)
    ]
    figures = {"recall": float(recalls.mean()), "recall_floor": float(floors.mean())}
    if bool((floors > 0).all()):
        figures["recall_ratio"] = figures["recall"] / figures["recall_floor"]
        figures["recall_ratio_worst_class"] = float((recalls / floors).min())
    return Figures(figures, rows)


def equal_rows(samples: Pictures, holdout: Pictures, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of both sets, as many of one as of the other: of each class where there are labels."""
    if samples.labels is not None and holdout.labels is not None:
        return metrics.equal_class_counts(samples.labels, holdout.labels, seed)
    rows = torch.arange(min(len(samples), len(holdout)))
    return rows, rows


def compared(pixels: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) => float32 (N, D) of 0 to 1, reduced to at most 32 x 32 pixels."""
    scaled = pixels.float() / 255
    if max(scaled.shape[2:]) > COMPARED_SIZE:
        size = (COMPARED_SIZE, COMPARED_SIZE)
        scaled = torch.cat([F.interpolate(x, size, mode="bilinear", antialias=True) for x in scaled.split(_BATCH)])
    return scaled.flatten(1)
