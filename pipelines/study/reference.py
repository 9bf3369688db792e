"""The image shards that a study measures against, checked before any work."""

import tarfile
from collections.abc import Sequence

from ldm import shards, storage
from ldm.config import RequestError
from pipelines.study.config import StudyConfig


def find_reference(reference: str | Sequence[str], key: str = "reference") -> tuple[dict[str, str], dict[str, int]]:
    """(names and URLs of its shards, their bytes by URL). Raises RequestError."""
    urls = shards.shard_names(storage.expand(reference, key))
    return urls, {url: storage.size(url) for url in urls.values()}


def check_classes(config: StudyConfig, num_classes: int) -> None:
    """Raises RequestError for a classifier where there are no classes."""
    if config.features == "classifier" and num_classes == 0:
        raise RequestError("features=classifier: the model is unconditional; give features=vae")


def check_labels(config: StudyConfig, urls: dict[str, str], key: str) -> None:
    """Raises RequestError for a classifier where the first picture has no label, or its shard is no tar."""
    url = next(iter(urls.values()))
    try:
        first = next(iter(shards.ShardReader(url)), None)
    except tarfile.TarError as error:
        raise RequestError(f"{key}={url}: is no whole tar ({error}); give image shards") from None
    if config.features == "classifier" and (first is None or "cls" not in first.members):
        raise RequestError(f"features=classifier: {key}={url} has pictures without a label; give features=vae")
