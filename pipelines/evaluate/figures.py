"""All figures that a request and its reference allow, put together."""

from dataclasses import dataclass
from typing import Any

from ldm import metrics
from ldm.autoencoder import Autoencoder
from ldm.classifier import Classifier
from ldm.features import Features
from ldm.metrics import Gaussian
from pipelines.evaluate import classes, measures
from pipelines.evaluate.kept import NOTHING_KEPT, Kept
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
    kept: Kept = NOTHING_KEPT,
) -> Measured:
    """samples beside the reference. names: of the classes. kept: what was computed of the reference before."""
    sets = measures.make_sets(samples, reference, autoencoder, seed, kept)
    of_reference = kept.rows("features", features.name, features.features)
    described, train = sets.describe(features.features, of_reference), of_reference(reference.train.pixels)
    gaussian = metrics.fit_gaussian(train)
    influence = {side: metrics.frechet_contributions(rows, gaussian) for side, rows in described.items()}
    held_out = measures.compared(reference.holdout.pixels) if len(reference.holdout) else None
    pixels = sets.describe(measures.compared, held_out=held_out)
    train_pixels = measures.compared(reference.train.pixels)
    near_floor = {} if held_out is None else {FLOOR: held_out}  # all of them: the distance does not depend on N
    near = nearest({SAMPLES: pixels[SAMPLES], **near_floor}, train_pixels, seed)
    figures = [
        measures.frechet(influence, features, seed),
        measures.kernel(described, train, features, seed),
        *measures.manifolds(described, train, features, seed),
        *measures.inception_score(sets, features, seed),
        measures.sliced(pixels, train_pixels, seed),
        *near.figures,
    ]
    flat = {name: value for figure in figures for name, value in figure.flat().items()}
    rows, parts = [], []
    if samples.labels is not None:
        rows.append(classes.class_means("fd_part", influence[SAMPLES], samples.labels))
        rows.append(classes.class_means("nearest_train", near.neighbours[SAMPLES].distance, samples.labels))
    if isinstance(features, Classifier):
        predicted = features.classify(described[SAMPLES])
        parts.append(classes.conditional_accuracy(samples, predicted, reference, features, seed))
    if samples.labels is not None and reference.train.labels is not None and FLOOR in pixels:
        parts.append(classes.class_recall(sets, pixels, train_pixels, reference.train.labels))
    for part in parts:
        flat |= part.metrics
        rows.append(part.by_class)
    return Measured(figures, flat, classes.joined(rows, names), gaussian, near)


def measure_by_statistics(samples: Pictures, gaussian: metrics.Gaussian, features: Features, seed: int = 0) -> Measured:
    """What a mean and a covariance allow: the Fréchet distance, and what needs no reference; no floors."""
    influence = {SAMPLES: metrics.frechet_contributions(features.features(samples.pixels), gaussian)}
    figures = [
        measures.frechet(influence, features, seed),
        *measures.inception_score(measures.Sets({SAMPLES: samples}), features, seed),
    ]
    flat = {name: value for figure in figures for name, value in figure.flat().items()}
    return Measured(figures, flat, [], gaussian, None)
