"""The features that a request asks for: checked before anything starts, and made when the pictures are there."""

from torch import Tensor

from ldm.autoencoder import Autoencoder
from ldm.classifier import Classifier, load_classifier, train_classifier
from ldm.config import RequestError
from ldm.features import Features, VaeFeatures, check_extractor, load_extractor
from ldm.snapshot import Snapshot
from pipelines.evaluate.kept import NOTHING_KEPT, Kept
from pipelines.evaluate.reference import Pictures, Reference
from pipelines.progress import Progress, say

CLASSIFIER, VAE = "classifier", "vae"


def choose(features: str | None, snapshot: Snapshot, holdout: float, *, by_statistics: bool) -> str:
    """classifier, vae, or the place of a network. Raises RequestError for what cannot be had."""
    unconditional = snapshot.conditioning.type == "none"
    chosen = features or (VAE if unconditional or by_statistics else CLASSIFIER)
    if chosen not in (CLASSIFIER, VAE):
        check_extractor(chosen)
    if chosen != CLASSIFIER:
        return chosen
    if unconditional:
        raise RequestError("features=classifier: the model is unconditional; give features=vae")
    if by_statistics:
        raise RequestError("features=classifier: statistics have no pictures to train it on; give their own features")
    if holdout == 0:
        raise RequestError(
            "holdout=0.0: the classifier's own accuracy needs pictures that it never saw; give 0.1, or features=vae"
        )
    return chosen


def make(
    chosen: str, snapshot: Snapshot, reference: Reference, autoencoder: Autoencoder, seed: int, kept: Kept
) -> Features:
    """What `choose` chose; the VAE in place of a classifier where pictures have no label. Raises RequestError."""
    if chosen not in (CLASSIFIER, VAE):
        say(f"evaluate: runs the network {chosen}")
        return load_extractor(chosen, snapshot.picture_shape(), device=str(autoencoder.device))
    if chosen == VAE or reference.train.labels is None:
        return VaeFeatures(autoencoder)
    return trained_classifier(reference, snapshot.conditioning.num_classes, seed, kept=kept)


def trained_classifier(
    reference: Reference, num_classes: int, seed: int, stage: str = "evaluate", kept: Kept = NOTHING_KEPT
) -> Classifier:
    """On the training pictures of a labelled reference; says how much of the held-out ones it reads."""
    train, holdout = reference.train, reference.holdout
    assert train.labels is not None and holdout.labels is not None
    of: list[str | Tensor] = [str(num_classes), str(seed), train.pixels, train.labels]
    weights = kept.tensors("classifier", of, lambda: _train(train, num_classes, seed, stage))
    classifier = load_classifier(weights, num_classes)
    accuracy = classifier.accuracy(holdout.pixels, holdout.labels)
    say(f"{stage}: the classifier reads {accuracy:.1%} of {len(holdout):,} held-out pictures right")
    return classifier


def _train(train: Pictures, num_classes: int, seed: int, stage: str) -> dict[str, Tensor]:
    """Weights of a classifier."""
    assert train.labels is not None
    with Progress(f"{stage}: training the classifier", 100, "%") as progress:
        return train_classifier(
            train.pixels,
            train.labels,
            num_classes,
            seed=seed,
            progress=lambda step, steps: progress.advance_to(100 * step // steps),
        ).network.state_dict()
