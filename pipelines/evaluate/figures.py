"""All figures that a request and its reference allow, put together."""

from dataclasses import dataclass
from typing import Any

from ldm import metrics
from ldm.autoencoder import Autoencoder
from ldm.classifier import Classifier
from ldm.features import Features
from ldm.metrics import Gaussian
from pipelines.evaluate import classes, measures
from pipelines.evaluate.measures import FLOOR, SAMPLES, Figure
from pipelines.evaluate.memory import Nearest, nearest
from pipelines.evaluate.reference import Pictures, Reference


@dataclass(frozen=True)
class Measured:
    """metrics: name => figure, flat. by_class: a row for each class; empty where there are no labels.

    gaussian: of the features of the training pictures. nearest: None where there are only statistics of these.
    """

    figures: list[Figure]
    metrics: dict[str, float]
    by_class: list[dict[str, Any]]
    gaussian: Gaussian
    nearest: Nearest | None


def measure(
    samples: Pictures,
    reference: Reference,
    features: Features,
    autoencoder: Autoencoder,
    *,
    names: tuple[str, ...] = (),
    seed: int = 0,
) -> Measured:
    """samples beside the reference. names: of the classes."""
    sets = measures.make_sets(samples, reference, autoencoder, seed)
    described, pixels = sets.describe(features.features), sets.describe(measures.compared)
    train, train_pixels = features.features(reference.train.pixels), measures.compared(reference.train.pixels)
    gaussian = metrics.fit_gaussian(train)
    near_sides = {SAMPLES: pixels[SAMPLES]}
    if len(reference.holdout):
        near_sides[FLOOR] = measures.compared(reference.holdout.pixels)
    near = nearest(near_sides, train_pixels, seed)
    figures = [
        *measures.frechet(described, gaussian, features, seed),
        *measures.kernel(described, train, features, seed),
        *measures.manifolds(described, train, features, seed),
        *measures.inception_score(sets, features, seed),
        *measures.sliced(pixels, train_pixels, seed),
        *near.figures,
    ]
    flat = {name: value for figure in figures for name, value in figure.flat().items()}
    rows = []
    if samples.labels is not None:
        influence = metrics.frechet_contributions(described[SAMPLES], gaussian)
        rows += [classes.class_means("fd_part", influence, samples.labels)]
        rows += [classes.class_means("nearest_train", near.neighbours[SAMPLES].distance, samples.labels)]
    for part in _by_class(samples, reference, features, seed):
        flat |= part.metrics
        rows.append(part.by_class)
    return Measured(figures, flat, classes.joined(rows, names), gaussian, near)


def measure_by_statistics(samples: Pictures, gaussian: metrics.Gaussian, features: Features, seed: int = 0) -> Measured:
    """What a mean and a covariance allow: the Fréchet distance, and what needs no reference; no floors."""
    sets = measures.Sets({SAMPLES: samples}, None)
    figures = [
        *measures.frechet(sets.describe(features.features), gaussian, features, seed),
        *measures.inception_score(sets, features, seed),
    ]
    flat = {name: value for figure in figures for name, value in figure.flat().items()}
    return Measured(figures, flat, [], gaussian, None)


def _by_class(samples: Pictures, reference: Reference, features: Features, seed: int) -> list[classes.ClassFigures]:
    parts = []
    if isinstance(features, Classifier):
        parts.append(classes.conditional_accuracy(samples, reference, features, seed))
    if samples.labels is not None and reference.train.labels is not None and len(reference.holdout):
        parts.append(classes.class_recall(samples, reference, seed))
    return parts
