"""A look into some samples of image shards, spread over all of them: what encode would meet there.

Pictures are decoded in processes of their own, so that one that hangs or crashes costs itself alone.
"""

import io
import math
import os
import random
import re
import tarfile
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm.decoding import Decoded, DecoderPool
from ldm.images import BadPicture, PictureRules
from ldm.shards import RawSample, bytes_per_sample
from ldm.sources import InputShard

THUMBNAIL = 128
_LEAST = 200
_SHARE = 100  # one of so many samples
_LEAST_SHARDS = 20
_FROM_EACH = 100  # samples from the head of one shard: opening one in an object store costs as much as reading some
_DECODE_LIMIT_S = 20.0
_KEPT_BYTES = 128 << 20

Picture = npt.NDArray[np.uint8]


@dataclass
class Probe:
    """What was found. broken: reasons, with digits as N, of samples that encode would quarantine, with their counts.

    sizes: (width, height) of the original, the right way up. kept: encoded pictures that can be decoded, some of them.
    thumbnails: uint8 (3, THUMBNAIL, THUMBNAIL), `count` of them at random. total: samples in all shards, an estimate
    unless `exact`. problems: shards that cannot be read to the end of what was to be read.
    """

    samples: int = 0
    shards: int = 0
    labelled: int = 0
    captioned: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    kept: list[bytes] = field(default_factory=list)
    thumbnails: list[Picture] = field(default_factory=list)
    total: int = 0
    exact: bool = True
    problems: list[str] = field(default_factory=list)

    @property
    def broken_share(self) -> float:
        return self.broken.total() / self.samples if self.samples else 0.0


@dataclass(frozen=True)
class _Extent:
    """How much of the probed shards was looked at, for an estimate of the whole."""

    samples: int
    bytes: int
    whole: bool


class Prober:
    """Looks into shards, one after the other. label, caption: as encode's keys; count: of the thumbnails."""

    def __init__(self, label: str, caption: str, count: int, seed: int) -> None:
        self.label, self.caption, self.count = label, caption, count
        self.found = Probe()
        self._draw = random.Random(seed)
        self._waiting: deque[tuple[bytes, Future[Decoded]]] = deque()
        self._good = self._kept_bytes = 0

    def look(
        self, shards: Sequence[InputShard], wanted: int | None, progress: Callable[[int, int], None] | None = None
    ) -> Probe:
        """About `wanted` samples (None: 1 %, at least 200); all of them where there are not many more."""
        guess = _guess(shards)
        wanted = wanted or max(_LEAST, math.ceil(guess / _SHARE))
        chosen, limit = _spread(shards, wanted, everything=guess <= 2 * wanted)
        processes = len(os.sched_getaffinity(0))
        extents = []
        with DecoderPool(processes, PictureRules((THUMBNAIL,)), _DECODE_LIMIT_S) as decoders:
            for shard in chosen:
                if limit is not None and self.found.samples >= wanted:
                    break
                extents.append(self._look_into(shard, limit, decoders, 4 * processes))
                if progress is not None:
                    progress(min(self.found.samples, wanted), wanted)
            while self._waiting:
                self._finish_one()
        self._estimate(shards, extents)
        return self.found

    def _look_into(self, shard: InputShard, limit: int | None, decoders: DecoderPool, most_waiting: int) -> _Extent:
        """The first `limit` samples of one shard, or all."""
        count = offset = 0
        seen: set[str] = set()
        self.found.shards += 1
        with closing(_iterate(shard)) as samples:
            while True:
                try:
                    sample = next(samples, None)
                # What tarfile raises of damage; of the storage, an OSError.
                except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, IndexError, KeyError) as error:
                    text = " ".join(str(error).split())
                    self.found.problems.append(f"{shard.url}: after {count:,} samples: {text}")
                    return _Extent(max(0, count - 1), offset, whole=False)
                if sample is None:
                    return _Extent(count, shard.bytes, whole=True)
                if count == limit:
                    return _Extent(count, sample.offset, whole=False)
                count, offset = count + 1, sample.offset
                self._begin(sample, sample.key in seen, decoders)
                seen.add(sample.key)
                while len(self._waiting) > most_waiting:
                    self._finish_one()

    def _begin(self, sample: RawSample, twice: bool, decoders: DecoderPool) -> None:
        """Counts what is broken without a look at the picture, as encode does; else sends that to be decoded."""
        self.found.samples += 1
        picture = sample.picture
        try:
            if twice:
                raise ValueError("its key stands twice in the shard")
            if sample.problem:
                raise ValueError(sample.problem)
            if picture is None:
                raise ValueError("holds no picture")
            self.found.labelled += sample.label_from(self.label) is not None
            self.found.captioned += sample.caption_from(self.caption) is not None
        except ValueError as error:
            self._count_broken(str(error))
            return
        self._waiting.append((picture, decoders.submit(picture)))

    def _finish_one(self) -> None:
        data, future = self._waiting.popleft()
        try:
            (view,), size = future.result()
        except BadPicture as error:
            self._count_broken(str(error))
            return
        self.found.sizes.append(size)
        self.found.formats[format_of(data)] += 1  # it was read to the end before: its header is safe to read here
        self._good += 1
        place = len(self.found.thumbnails) if self._good <= self.count else self._draw.randrange(self._good)
        if place < self.count:  # reservoir sampling
            self.found.thumbnails[place : place + 1] = [view.pixels]
        if self._kept_bytes + len(data) <= _KEPT_BYTES:
            self.found.kept.append(data)
            self._kept_bytes += len(data)

    def _count_broken(self, reason: str) -> None:
        self.found.broken[re.sub(r"\d[\d,.]*", "N", reason)] += 1

    def _estimate(self, shards: Sequence[InputShard], extents: list[_Extent]) -> None:
        """Samples in all shards, from how many there are in so many bytes."""
        if all(shard.files for shard in shards):
            self.found.total = sum(_files_in(shard) for shard in shards)
            return
        looked = sum(extent.bytes for extent in extents)
        count = sum(extent.samples for extent in extents)
        self.found.exact = len(extents) == len(shards) and all(extent.whole for extent in extents)
        whole = sum(shard.bytes for shard in shards)
        self.found.total = count if self.found.exact else round(whole / looked * count) if looked else 0


def format_of(data: bytes) -> str:
    """Pillow's name of a picture's format, from its header; `unknown` where Pillow cannot say."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data)).format or "unknown"
    except Exception:  # a malformed header makes Pillow raise nearly anything
        return "unknown"


def _iterate(shard: InputShard) -> Generator[RawSample, None, None]:
    yield from shard.reader()


def _guess(shards: Sequence[InputShard]) -> int:
    """How many samples there may be, before the probe; 0 where the first shards cannot be read."""
    if all(shard.files for shard in shards):
        return sum(_files_in(shard) for shard in shards)
    per_sample = next((size for shard in shards[:3] if (size := bytes_per_sample(shard.url))), None)
    return round(sum(shard.bytes for shard in shards) / per_sample) if per_sample else 0


def _spread(shards: Sequence[InputShard], wanted: int, *, everything: bool) -> tuple[list[InputShard], int | None]:
    """(shards in the order in which to look, samples from the head of each; None: all)

    The first ones are spread evenly; as many again stand by, for what cannot be read or is shorter than its like.
    """
    if everything:
        return [*shards], None
    number = min(len(shards), max(_LEAST_SHARDS, math.ceil(wanted / _FROM_EACH)))
    places = [place * len(shards) // number for place in range(number)]
    others = sorted(set(range(len(shards))) - set(places))
    step = max(1, len(others) // number)
    return [shards[place] for place in [*places, *others[::step][:number]]], math.ceil(wanted / number)


def _files_in(shard: InputShard) -> int:
    return len({name.rpartition(".")[0] for name in shard.files})
