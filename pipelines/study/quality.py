"""How good drawn pictures are, against one reference that is read once: named features, with a floor beside them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm import metrics
from ldm.autoencoder import Autoencoder
from ldm.classifier import Classifier
from ldm.config import RequestError
from ldm.features import Features, VaeFeatures, load_extractor
from ldm.snapshot import Snapshot
from ldm.sources import InputShard
from pipelines.evaluate.networks import CLASSIFIER, VAE, trained_classifier
from pipelines.evaluate.reference import read_reference
from pipelines.study.config import StudyConfig


@dataclass(frozen=True)
class Quality:
    """What pictures are measured with. train: of the training pictures' features.

    floor: the Fréchet distance of `floor_pictures` held-out pictures, which is what a perfect model would have with as
    many; the distance falls as a set grows, so that floor and figure compare only roughly where the numbers differ.
    """

    features: Features
    train: metrics.Gaussian
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
        """Pictures uint8 (N, 3, H, W), labels int64 (N,) => fd, of a classifier accuracy too, with intervals (95%)."""
        fd = metrics.frechet_contributions(self.features.features(pixels), self.train)
        low, high = metrics.mean_interval(fd, seed=self.seed)
        figures = {"fd": float(fd.mean()), "fd_low": low, "fd_high": high}
        if isinstance(self.features, Classifier) and labels is not None:
            right = (self.features.predict(pixels) == labels).double()
            low, high = metrics.bootstrap_interval(right, seed=self.seed)
            figures |= {"accuracy": float(right.mean()), "accuracy_low": low, "accuracy_high": high}
        return figures


def make_quality(
    config: StudyConfig, inputs: Mapping[str, InputShard], snapshot: Snapshot, autoencoder: Callable[[str], Autoencoder]
) -> Quality:
    """Reads shards (by name), prepared as the snapshot's own pictures were. autoencoder: of features=vae, on a device;
    a network of the user's own is run.

    Raises RequestError where the reference cannot give the figures.
    """
    reference = read_reference(inputs, snapshot, config.holdout, config.max_reference)
    train, holdout = reference.train, reference.holdout
    if min(len(train), len(holdout)) < 2:
        raise RequestError(
            f"reference: gives {len(train)} training and {len(holdout)} held-out pictures; at least 2 of each are "
            "needed: give more pictures, or another holdout"
        )
    if config.features == CLASSIFIER and (train.labels is None or holdout.labels is None):
        raise RequestError("features=classifier: the reference holds pictures without a label; give features=vae")
    features: Features
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"  # of this process
    if config.features == VAE:
        features = VaeFeatures(autoencoder(device))
    elif config.features == CLASSIFIER:
        features = trained_classifier(reference, snapshot.conditioning.num_classes, config.seed, "study")
    else:
        features = load_extractor(config.features, snapshot.picture_shape(), device=device)
    gaussian = metrics.fit_gaussian(features.features(train.pixels))
    floor = float(metrics.frechet_contributions(features.features(holdout.pixels), gaussian).mean())
    return Quality(features, gaussian, floor, len(holdout), config.seed)


def stands(row: Mapping[str, Any] | None, quality: Quality | None) -> bool:
    """Whether an arm is done, and measured in these features, where it is known already which."""
    return row is not None and (quality is None or row["features"] == quality.name)
