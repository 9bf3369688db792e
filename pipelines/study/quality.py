"""How good drawn pictures are, against one reference that is read once: named features, with a floor beside them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm import metrics
from ldm.autoencoder import Autoencoder
from ldm.classifier import Classifier, train_classifier
from ldm.config import RequestError
from ldm.snapshot import Snapshot
from pipelines.evaluate.measures import Features, VaeFeatures
from pipelines.evaluate.reference import Reference, read_reference
from pipelines.progress import Progress, say
from pipelines.study.config import StudyConfig


@dataclass(frozen=True)
class Quality:
    """What pictures are measured with. train: mean (D,) and covariance (D, D) of the training pictures' features.

    floor: the Fréchet distance of `floor_pictures` held-out pictures, which is what a perfect model would have with as
    many; the distance falls as a set grows, so that floor and figure compare only roughly where the numbers differ.
    """

    features: Features
    train: tuple[Tensor, Tensor]
    floor: float
    floor_pictures: int
    seed: int

    @property
    def name(self) -> str:
        """Of the Fréchet distance: never FID."""
        return f"fd-{self.features.name}"

    @property
    def about(self) -> dict[str, Any]:
        """What stands beside a figure."""
        return {"features": self.name, "floor": self.floor, "floor_images": self.floor_pictures}

    def figures(self, pixels: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Pictures uint8 (N, 3, H, W), labels int64 (N,) => fd, of a classifier accuracy with its interval (95%)."""
        statistics = metrics.gaussian_statistics(self.features.features(pixels))
        figures = {"fd": metrics.frechet_distance_of_gaussians(*statistics, *self.train)}
        if isinstance(self.features, Classifier) and labels is not None:
            right = (self.features.predict(pixels) == labels).double()
            low, high = metrics.bootstrap_interval(right, seed=self.seed)
            figures |= {"accuracy": float(right.mean()), "accuracy_low": low, "accuracy_high": high}
        return figures


def make_quality(
    config: StudyConfig, urls: dict[str, str], snapshot: Snapshot, autoencoder: Callable[[], Autoencoder]
) -> Quality:
    """Reads shards (name => URL), prepared as the snapshot's own pictures were. autoencoder: of features=vae.

    Raises RequestError where the reference cannot give the figures.
    """
    reference = read_reference(urls, snapshot, config.holdout, config.max_reference)
    train, holdout = reference.train, reference.holdout
    if min(len(train), len(holdout)) < 2:
        raise RequestError(
            f"reference: gives {len(train)} training and {len(holdout)} held-out pictures; at least 2 of each are "
            "needed: give more pictures, or another holdout"
        )
    features = VaeFeatures(autoencoder()) if config.features == "vae" else _classifier(config, reference, snapshot)
    statistics = metrics.gaussian_statistics(features.features(train.pixels))
    of_holdout = metrics.gaussian_statistics(features.features(holdout.pixels))
    floor = metrics.frechet_distance_of_gaussians(*of_holdout, *statistics)
    return Quality(features, statistics, floor, len(holdout), config.seed)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _classifier(config: StudyConfig, reference: Reference, snapshot: Snapshot) -> Classifier:
    train, holdout = reference.train, reference.holdout
    if train.labels is None or holdout.labels is None:
        raise RequestError("features=classifier: the reference holds pictures without a label; give features=vae")
    with Progress("study: training the classifier", 100, "%") as progress:
        classifier = train_classifier(
            train.pixels,
            train.labels,
            snapshot.conditioning.num_classes,
            seed=config.seed,
            progress=lambda step, steps: progress.advance_to(100 * step // steps),
        )
    accuracy = classifier.accuracy(holdout.pixels, holdout.labels)
    say(f"study: the classifier reads {accuracy:.1%} of {len(holdout):,} held-out pictures right")
    return classifier
