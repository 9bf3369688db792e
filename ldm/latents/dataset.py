"""Reads a latent dataset by position: `batch(step, rank, world)` is a pure function of (seed, manifest, batch size).

    dataset = LatentDataset("latents/", global_batch_size=256)
    batch = dataset.batch(step=1000)
    latents = draw_latents(batch, dataset.statistics, seed=0)

Position g of the global stream is step * global_batch_size + i; epochs follow one another without padding or dropping.
Shards are mapped, not read: a batch is gathered straight from the tars.
"""

import mmap
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ldm import random
from ldm.config import DamagedError, RequestError
from ldm.latents.cache import hash_file, local_copy
from ldm.latents.manifest import read_manifest
from ldm.latents.order import permute
from ldm.latents.receipt import Statistics
from ldm.latents.writer import columns_url, index_url, latents_url

Split = Literal["train", "holdout"]
_OPEN_SHARDS = 256
"""Shards mapped at a time: each holds a file descriptor, of which a process has 1,024 by default."""


@dataclass(frozen=True)
class LatentBatch:
    """moments: fp16 (B, 2C or C, h, w), raw. labels: int64 (B,), the null class where there is none.
    ids, epochs: int64 (B,): what the random numbers of a sample are keyed by."""

    moments: Tensor
    labels: Tensor
    ids: Tensor
    epochs: Tensor


class LatentDataset:
    """A latent dataset at a path or URL.

    Args:
        url: what `ldm encode` wrote.
        seed: of the order.
        global_batch_size: samples in one optimizer step over all ranks.
        holdout: share of the samples, chosen by a hash of the id, that `split="train"` leaves out.
        generation: of the manifest, for a run that goes on; the newest by default.
    Raises RequestError where there is no data set, or it holds fewer samples than it takes to train.
    """

    def __init__(
        self,
        url: str,
        *,
        global_batch_size: int,
        seed: int = 0,
        holdout: float = 0.0,
        split: Split = "train",
        generation: str | None = None,
    ) -> None:
        self.manifest = read_manifest(url, generation)
        self.url, self.seed, self.global_batch_size = url, seed, global_batch_size
        self.holdout, self.split = holdout, split
        shapes = {tuple(row["shape"]) for row in self.manifest.shards}
        if len(shapes) != 1:
            raise RequestError(f"latents={url}: holds the shapes {sorted(shapes)}; one shape is needed")
        self.record_shape: tuple[int, ...] = next(iter(shapes))
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        if self.num_samples == 0:
            raise RequestError(f"latents={url}: the {split} split holds no sample (holdout={holdout})")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)"""
        return (self.manifest.channels, self.record_shape[1], self.record_shape[2])

    @property
    def num_samples(self) -> int:
        return len(self._chosen)

    @property
    def num_classes(self) -> int:
        return self.manifest.conditioning.num_classes

    @property
    def statistics(self) -> Statistics:
        return self.manifest.statistics

    def batch(self, step: int, rank: int = 0, world: int = 1) -> LatentBatch:
        """The rank's equal part of global batch number `step`."""
        assert self.global_batch_size % world == 0
        share = self.global_batch_size // world
        first = step * self.global_batch_size + rank * share
        return self._gather(*self._samples_at(np.arange(first, first + share)))

    def all(self) -> LatentBatch:
        """Every sample of the split once, in the order of the shards."""
        return self._gather(self._chosen, np.zeros(self.num_samples, np.int64))

    def _samples_at(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Global positions => (numbers in the whole data set, epochs)."""
        epochs, within = np.divmod(positions, self.num_samples)
        chosen = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = permute(within[here], self.num_samples, self.seed, int(epoch))
        return self._chosen[chosen], epochs

    def _gather(self, numbers: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> LatentBatch:
        moments = np.empty((len(numbers), *self.record_shape), np.float16)
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            self._shard(int(shard)).gather(numbers[here] - self._starts[shard], moments, here)
        ids, labels = self._ids[numbers], self._labels[numbers]
        return LatentBatch(*(torch.from_numpy(array) for array in (moments, labels, ids, epochs)))

    def _shard(self, number: int) -> "_Shard":
        if number not in self._shards:
            if len(self._shards) >= _OPEN_SHARDS:
                self._shards.popitem(last=False)
            self._shards[number] = _Shard(self.url, self.manifest.shards[number], self.record_shape)
        self._shards.move_to_end(number)
        return self._shards[number]

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """Number of the first sample of each shard (shards,)."""
        counts = [row["count"] for row in self.manifest.shards]
        return np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.int64)

    @cached_property
    def _columns(self) -> tuple[npt.NDArray[np.int64], ...]:
        """(ids, labels, pictures) of all samples; a sample without a label gets the null class."""
        ids, labels, pictures = [], [], []
        for row in self.manifest.shards:
            path = _verified(columns_url(self.url, row["columns"]), row["columns_sha256"])
            table = pq.read_table(path, columns=["id", "label", "picture"])
            ids.append(table["id"].to_numpy())
            labels.append(table["label"].fill_null(self.num_classes).to_numpy())
            pictures.append(table["picture"].to_numpy())
        return np.concatenate(ids), np.concatenate(labels), np.concatenate(pictures)

    @property
    def _ids(self) -> npt.NDArray[np.int64]:
        return self._columns[0]

    @property
    def _labels(self) -> npt.NDArray[np.int64]:
        return self._columns[1]

    @cached_property
    def _chosen(self) -> npt.NDArray[np.int64]:
        """Numbers of the samples of this split, in the order of the shards; all records of a picture go together."""
        held_out = is_held_out(self._columns[2], self.holdout)
        return np.flatnonzero(held_out if self.split == "holdout" else ~held_out)


def is_held_out(ids: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """Whether each id (n,) belongs to the held-out share: a function of the id alone, so that adding shards
    moves no sample from one split to the other."""
    return random.uniform(0, "holdout", torch.from_numpy(ids), 0).numpy() < share


def draw_latents(batch: LatentBatch, statistics: Statistics, seed: int, device: str | torch.device = "cpu") -> Tensor:
    """Raw moments => normalised latents float32 (B, C, h, w): a posterior sample, keyed by (seed, epoch, id)."""
    moments = batch.moments.to(device, non_blocking=True).float()
    mean, std = channels(statistics.mean, device), channels(statistics.std, device)
    num_channels = len(statistics.mean)
    latents = moments[:, :num_channels]
    if moments.shape[1] == 2 * num_channels:
        ids, epochs = batch.ids.to(device), batch.epochs.to(device)
        noise = random.normal(seed, "posterior", ids, epochs, tuple(latents.shape[1:]))
        latents = latents + (0.5 * moments[:, num_channels:]).exp() * noise
    return (latents - mean) / std


def channels(values: tuple[float, ...], device: str | torch.device = "cpu") -> Tensor:
    """(C,) => float32 (1, C, 1, 1)"""
    return torch.tensor(values, dtype=torch.float32, device=device)[None, :, None, None]


def _verified(url: str, sha256: str) -> Path:
    """A local path of `url`. Raises DamagedError where the file is not the one that the manifest names."""
    path = local_copy(url, sha256)
    if hash_file(path) != sha256:
        raise DamagedError(f"{path}: does not have the hash that its manifest names; it is damaged")
    return path


class _Shard:
    """One mapped tar: its records, gathered without a copy of the rest."""

    def __init__(self, url: str, row: dict[str, object], shape: tuple[int, ...]) -> None:
        name = str(row["name"])
        path = local_copy(latents_url(url, name), str(row["sha256"]))
        index_path = _verified(index_url(url, name), str(row["index_sha256"]))
        found = path.stat().st_size
        if found != row["bytes"]:  # a map of a truncated file would end in SIGBUS
            raise DamagedError(f"{path}: has {found} bytes, its manifest says {row['bytes']}; it is damaged")
        index = pq.read_table(index_path, columns=["offset", "crc32"])
        self._path, self._offsets, self._crcs = path, index["offset"].to_numpy(), index["crc32"].to_numpy()
        self._checked = np.zeros(len(index), dtype=bool)
        with path.open("rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        strides = np.diff(self._offsets)
        # Records lie at equal distances unless a key is over 100 bytes: then one view of all gathers at once.
        stride = int(strides[0]) if len(strides) else 0
        self._view: npt.NDArray[np.float16] | None = None
        self._shape = shape
        if (strides == stride).all():
            inner = np.empty(shape, np.float16).strides
            full = (len(self._offsets), *shape)
            self._view = np.ndarray(full, np.float16, self._map, int(self._offsets[0]), (stride, *inner))

    def gather(self, numbers: npt.NDArray[np.int64], out: npt.NDArray[np.float16], rows: npt.NDArray[np.int64]) -> None:
        """Copies records `numbers` to `out[rows]`. Raises DamagedError where one is not what was written."""
        if self._view is not None:
            out[rows] = self._view[numbers]
        else:
            count = int(np.prod(self._shape))
            for row, number in zip(rows, numbers, strict=True):
                record = np.frombuffer(self._map, np.float16, count, int(self._offsets[number]))
                out[row] = record.reshape(self._shape)
        # Once for each record: a check at each read would halve the speed.
        for fresh in np.flatnonzero(~self._checked[numbers]):
            if zlib.crc32(out[rows[fresh]]) != self._crcs[numbers[fresh]]:
                raise DamagedError(f"{self._path}: record {numbers[fresh]} does not have its crc32; it is damaged")
        self._checked[numbers] = True
