"""A drawn picture, and what it says of itself: one JSON object in the text chunk `ldm` of its PNG.

json.loads(PIL.Image.open("picture.png").text["ldm"])

weights_sha256, step   of the snapshot
seed, label            of the picture; label null where it was drawn without a class
settings               all else that it depends on: the sampler's, the batch size, the precision, the device
version                of this program
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm import __version__, images
from ldm.config import canonical_json
from ldm.shards import RawSample
from ldm.snapshot import Snapshot

KEYWORD = "ldm"
"""Of the PNG's tEXt chunk."""


@dataclass(frozen=True, eq=False)
class DrawnPicture:
    """number: its place in the request, from 0. pixels: uint8 (3, H, W). label: None for none."""

    number: int
    seed: int
    label: int | None
    pixels: npt.NDArray[np.uint8]
    provenance: Mapping[str, Any]

    def to_png(self) -> bytes:
        """The same bytes for the same picture and provenance."""
        return images.to_png(self.pixels, to_text(self.provenance))

    def to_sample(self) -> RawSample:
        """A sample of a WebDataset tar: the PNG, its class where it has one, and its provenance as JSON."""
        members = {"png": self.to_png()}
        if self.label is not None:
            members["cls"] = str(self.label).encode()
        members["json"] = canonical_json(self.provenance).encode()
        return RawSample(key_of(self.seed), members)


def make_provenance(snapshot: Snapshot, settings: Mapping[str, Any], seed: int, label: int | None) -> dict[str, Any]:
    """settings: JSON values. A label that is the null class counts as none."""
    return {
        "weights_sha256": snapshot.weights_sha256,
        "step": snapshot.step,
        "seed": seed,
        "label": known_label(label, snapshot),
        "settings": dict(settings),
        "version": __version__,
    }


def known_label(label: int | None, snapshot: Snapshot) -> int | None:
    """None for the null class, which the model alone knows."""
    return None if label is None or label >= snapshot.conditioning.num_classes else label


def to_text(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The text chunks of a PNG."""
    return {KEYWORD: canonical_json(provenance)}


def key_of(seed: int) -> str:
    """A sample's key, and what the name of its shard is made of: sorts as the seeds do, up to 10^10."""
    return f"{seed:010d}"
