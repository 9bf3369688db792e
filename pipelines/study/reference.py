"""The image shards that a study measures against, checked before any work."""

import tarfile
from collections.abc import Mapping

from ldm.config import RequestError
from ldm.features import check_extractor
from ldm.sources import InputShard
from pipelines.evaluate.networks import CLASSIFIER, VAE
from pipelines.study.config import StudyConfig


def check_features(config: StudyConfig, num_classes: int | None = None) -> None:
    """Raises RequestError for features that cannot be had, as a classifier where there are no classes.

    num_classes: of the model; None where the pictures will say.
    """
    if config.features not in (CLASSIFIER, VAE):
        check_extractor(config.features)
    if config.features == CLASSIFIER and num_classes == 0:
        raise RequestError("features=classifier: the model is unconditional; give features=vae")


def check_labels(config: StudyConfig, inputs: Mapping[str, InputShard], key: str) -> None:
    """Raises RequestError for a classifier where the first picture has no label, or its shard is no tar."""
    shard = next(iter(inputs.values()))
    try:
        first = next(iter(shard.reader()), None)
    except tarfile.TarError as error:
        raise RequestError(f"{key}={shard.url}: is no whole tar ({error}); give image shards") from None
    if config.features == CLASSIFIER and (first is None or "cls" not in first.members):
        raise RequestError(f"features=classifier: {key}={shard.url} has pictures without a label; give features=vae")
