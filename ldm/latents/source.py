"""One data set, one shape of record, one choice: what a stream is made of and what is read from."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ldm.latents.cache import RemoteFile
from ldm.latents.choice import Chosen
from ldm.latents.manifest import Manifest
from ldm.latents.order import Integers
from ldm.latents.writer import columns_url, index_url, latents_url


@dataclass
class Source:
    """The shards of one data set that hold one shape, and which of their records are chosen.

    numbers: of the shards in the manifest, (S,). chosen: over all shards of the manifest.
    """

    manifest: Manifest
    numbers: Integers
    chosen: Chosen

    @cached_property
    def counts(self) -> Integers:
        """Chosen records of each shard (S,)."""
        return self.chosen.counts[self.numbers]

    def records(self, shard: int, indices: Integers) -> Integers:
        """The numbers in its tar of chosen records of a shard (n,)."""
        numbers = self._chosen_numbers(shard)
        return indices if numbers is None else numbers[indices]

    def lacks(self, shard: int, records: Integers) -> npt.NDArray[np.bool_]:
        """Which records of a shard are not chosen (n,)."""
        numbers = self._chosen_numbers(shard)
        return np.zeros(len(records), bool) if numbers is None else ~np.isin(records, numbers)

    def _chosen_numbers(self, shard: int) -> Integers | None:
        number = int(self.numbers[shard])
        return self.chosen.numbers(number, int(self.manifest.counts[number]))

    def files(self, shard: int) -> list[RemoteFile]:
        """The index, the columns and the tar of shard number `shard` of this source."""
        url, row = self.manifest.url, self.manifest.shard(int(self.numbers[shard]))
        return [
            RemoteFile(index_url(url, row["name"]), row["index_sha256"], row["index_bytes"]),
            RemoteFile(columns_url(url, row["columns"]), row["columns_sha256"], row["columns_bytes"]),
            RemoteFile(latents_url(url, row["name"]), row["sha256"], row["bytes"]),
        ]
