"""Statistics of a reference as one safetensors file: what a Fréchet distance needs of 20,000 pictures in a few MB.

mean (D,), covariance (D, D)   float64
metadata                       format, version, count, features (name with hash), pictures (the rules, as JSON),
                               reference (a hash)
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from ldm import storage
from ldm.config import RequestError, canonical_json, differences
from ldm.metrics.gaussian import Gaussian

FORMAT, VERSION = "ldm-statistics", "1"


@dataclass(frozen=True)
class SavedStatistics:
    """gaussian: of the features. features: their name. pictures: how the pictures were prepared, a fingerprint.
    reference: a hash of which pictures these are, empty where that is not known."""

    gaussian: Gaussian
    features: str
    pictures: dict[str, Any]
    reference: str = ""

    def check(self, key: str, features: str, pictures: dict[str, Any]) -> None:
        """Raises RequestError where they are of another extractor, or of pictures prepared in another way."""
        if self.features != features:
            raise RequestError(f"{key}: holds statistics of {self.features}, not of {features}; give the same features")
        if found := differences(self.pictures, pictures):
            raise RequestError(f"{key}: its pictures were prepared in another way ({'; '.join(found)})")


def write_statistics(url: str, statistics: SavedStatistics) -> None:
    """Writes the file at a path or URL, whole or not at all."""
    gaussian = statistics.gaussian
    tensors = {"mean": gaussian.mean.cpu().contiguous(), "covariance": gaussian.covariance.cpu().contiguous()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "count": str(gaussian.count),
        "features": statistics.features,
        "pictures": canonical_json(statistics.pictures),
        "reference": statistics.reference,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "statistics", metadata)
        storage.commit_file(Path(folder) / "statistics", url)


def read_statistics(key: str, url: str) -> SavedStatistics:
    """Reads what `write_statistics` wrote. Raises RequestError, which begins with `key`, where it is something else."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "statistics"
        try:
            storage.fetch(url, copy)
            return _read(copy)
        except FileNotFoundError:
            raise RequestError(f"{key}: is not there; give what `save_statistics=` wrote") from None
        except (safetensors.SafetensorError, LookupError, ValueError, TypeError) as error:
            text = " ".join(str(error).split())[:160]
            raise RequestError(f"{key}: holds no statistics of ldm evaluate ({text})") from None


def _read(file: Path) -> SavedStatistics:
    with safetensors.safe_open(file, "pt") as opened:
        about = opened.metadata() or {}
        if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"its format is {about.get('format')} {about.get('version')}, not {FORMAT} {VERSION}")
        mean, covariance = opened.get_tensor("mean"), opened.get_tensor("covariance")
    pictures, count = json.loads(about["pictures"]), int(about["count"])
    size = len(mean)
    if mean.ndim != 1 or covariance.shape != (size, size) or {mean.dtype, covariance.dtype} != {torch.float64}:
        raise ValueError(f"mean {tuple(mean.shape)} and covariance {tuple(covariance.shape)} do not fit in float64")
    if not (mean.isfinite().all() and covariance.isfinite().all() and isinstance(pictures, dict)):
        raise ValueError("its numbers are not all finite")
    return SavedStatistics(Gaussian(mean, covariance, count), about["features"], pictures, about.get("reference", ""))
