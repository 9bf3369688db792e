"""Drawn pictures as WebDataset shards in a directory, which an interrupted run fills up.

URL/samples.json              what was asked for: claims the directory, so that two requests never mix
    FIRST-LAST.tar            SEED.png, SEED.cls where there are classes, SEED.json; FIRST and LAST are seeds
"""

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

from ldm import images, storage
from ldm.config import DamagedError, RequestError, differences
from ldm.provenance import DrawnPicture, key_of
from ldm.shards import RawSample, ShardReader, write_shard
from ldm.threads import ahead

RECORD = "samples.json"
_FORMAT = {"format": "ldm-samples", "version": 1}


@dataclass(frozen=True)
class SampleShards:
    """Pictures `seed` to `seed + num_images - 1`, `samples_per_shard` in a shard, the rest in the last one.

    labels: as they were asked for. settings: those of the pictures' provenance, JSON values. stage: on record alone.
    """

    url: str
    weights_sha256: str
    seed: int
    num_images: int
    samples_per_shard: int
    labels: list[str] | None
    settings: Mapping[str, Any]
    stage: str = "sample"

    @cached_property
    def parts(self) -> list[range]:
        """Numbers of the pictures of each shard: the same partition whoever draws."""
        step = self.samples_per_shard
        return [range(first, min(first + step, self.num_images)) for first in range(0, self.num_images, step)]

    def place(self, part: range) -> str:
        """The URL of a shard."""
        first, last = (key_of(self.seed + number) for number in (part[0], part[-1]))
        return storage.join(self.url, f"{first}-{last}.tar")

    def other(self) -> dict[str, Any] | None:
        """The record of the directory, where it is one of another request. Raises DamagedError."""
        try:
            record = storage.read_json(self._record_url)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DamagedError(str(error)) from None
        known = isinstance(record, dict) and {key: record.get(key) for key in _FORMAT} == _FORMAT
        if not known or not isinstance(record.get("request"), dict):
            raise DamagedError(f"{self._record_url}: is no record of drawn pictures, or damaged")
        return None if record["request"] == self._request else record

    def difference(self, other: Mapping[str, Any]) -> str:
        """The first one to that record, as `key: theirs != ours`."""
        return differences(other["request"], self._request)[0]

    def check(self) -> None:
        """Raises RequestError where the directory holds pictures of another request, naming the first difference."""
        if (other := self.other()) is not None:
            raise RequestError(
                f"output={self.url}: holds pictures of another request ({self.difference(other)}); give another output"
            )

    def claim(self) -> None:
        """Writes down what the directory is for, and clears away what killed processes left. Raises RequestError."""
        record = {**_FORMAT, "stage": self.stage, "request": self._request}
        storage.create(self._record_url, storage.to_json(record))
        self.check()  # another run may have come first
        storage.sweep(self.url)

    def missing(self) -> list[range]:
        """The parts that are not there yet; a shard that is there is whole."""
        there = storage.list_files(self.url)
        return [part for part in self.parts if storage.name(self.place(part)) not in there]

    def write(self, part: range, batches: Iterable[Iterable[DrawnPicture]]) -> None:
        """Commits one shard, whole. PNGs are made while the next batch is drawn."""
        write_shard(self.place(part), ahead(DrawnPicture.to_sample, batches))

    def read(self, part: range, shape: tuple[int, int]) -> Iterator[DrawnPicture]:
        """The pictures of a shard, in order, each of `shape` (H, W). Raises DamagedError where they are others."""
        url, left = self.place(part), iter(part)
        try:
            for sample in ShardReader(url):
                yield self._picture(sample, next(left, None), shape)
            if (number := next(left, None)) is not None:
                raise ValueError(f"it ends before {key_of(self.seed + number)}")
        except (tarfile.TarError, images.BadPicture, ValueError) as error:
            raise DamagedError(f"{url}: is damaged ({error}); remove it, and the same command draws it again") from None

    def first(self, count: int, shape: tuple[int, int]) -> Iterator[DrawnPicture]:
        """The first pictures of all, as `read` does."""
        return islice(chain.from_iterable(self.read(part, shape) for part in self.parts), count)

    def _picture(self, sample: RawSample, number: int | None, shape: tuple[int, int]) -> DrawnPicture:
        """Raises ValueError or BadPicture where it is not picture `number` of this request."""
        if number is None or sample.key != key_of(self.seed + number):
            raise ValueError(f"{sample.key} is none of its pictures")
        about = sample.fields()
        wanted = {"weights_sha256": self.weights_sha256, "settings": self.settings}
        if {key: about.get(key) for key in wanted} != wanted:
            raise ValueError(f"{sample.key} is a picture of another request")
        pixels, (width, height) = images.decode(sample.picture or b"", shape)
        if (height, width) != shape:
            raise ValueError(f"{sample.key} has {width}x{height} pixels")
        return DrawnPicture(number, self.seed + number, sample.label, pixels, about)

    @property
    def _record_url(self) -> str:
        return storage.join(self.url, RECORD)

    @property
    def _request(self) -> dict[str, Any]:
        keys = ("weights_sha256", "seed", "num_images", "samples_per_shard", "labels")
        return {**{key: getattr(self, key) for key in keys}, **self.settings}
