"""What is in image shards or a folder of pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from ldm import images, storage
from ldm.autoencoder import Autoencoder
from ldm.inspection.config import InspectConfig
from ldm.inspection.forecast import Forecast, forecast
from ldm.inspection.probe import Probe, Prober
from ldm.sources import InputShard

_REASONS = 20
_COLUMNS = 8


@dataclass(frozen=True)
class PicturesReport:
    """samples: in all shards, an estimate unless `exact`; the other figures are of the `probed` ones.

    encodable: samples less the share that is broken. broken: reason => count. width, height: least, median, greatest,
    pixels. labelled, captioned, broken_share: 0 to 1. problems: shards that cannot be read.
    """

    kind: str
    shards: int
    bytes: int
    samples: int
    exact: bool
    encodable: int
    probed: int
    probed_shards: int
    formats: dict[str, int]
    width: list[float]
    height: list[float]
    broken_share: float
    broken: dict[str, int]
    labelled: float
    captioned: float
    class_names: list[str]
    forecast: Forecast | None
    preview: str | None
    problems: list[str]


def inspect_pictures(
    config: InspectConfig,
    shards: dict[str, InputShard],
    class_names: tuple[str, ...],
    autoencoder: Autoencoder | None,
    progress: Callable[[int, int], None] | None = None,
) -> PicturesReport:
    """Probes the shards, and measures what an encode would take where there is an autoencoder."""
    prober = Prober(config.label, config.caption, config.count, config.seed)
    found = prober.look([*shards.values()], config.probe, progress)
    encodable = round(found.total * (1 - found.broken_share))
    if config.preview is not None and found.thumbnails:
        columns = min(_COLUMNS, len(found.thumbnails))
        storage.write_bytes(config.preview, images.to_png(images.grid(np.stack(found.thumbnails), columns)))
    return PicturesReport(
        kind="pictures",
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards.values()),
        samples=found.total,
        exact=found.exact,
        encodable=encodable,
        probed=found.samples,
        probed_shards=found.shards,
        formats=dict(found.formats.most_common()),
        width=_range([width for width, _ in found.sizes]),
        height=_range([height for _, height in found.sizes]),
        broken_share=round(found.broken_share, 6),
        broken=_reasons(found),
        labelled=_share(found.labelled, found),
        captioned=_share(found.captioned, found),
        class_names=[*class_names],
        forecast=forecast(config, autoencoder, found.kept, encodable) if autoencoder and found.kept else None,
        preview=config.preview if found.thumbnails else None,
        problems=found.problems,
    )


def _range(values: list[int]) -> list[float]:
    return [min(values), median(values), max(values)] if values else []


def _share(count: int, found: Probe) -> float:
    return round(count / found.samples, 6) if found.samples else 0.0


def _reasons(found: Probe) -> dict[str, int]:
    """The most frequent ones; the others in one count."""
    reasons = dict(found.broken.most_common(_REASONS))
    left = found.broken.total() - sum(reasons.values())
    return reasons | ({"others": left} if left else {})
