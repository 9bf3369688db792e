"""Reads latent datasets by position: `batch(step, rank, world)` is a pure function of (seed, manifest, batch size).

    dataset = LatentDataset("latents/", global_batch_size=256)
    for batch in dataset.batches(first_step=1000):
        latents = draw_latents(batch, dataset.statistics, seed=0)

The stream of a data set is endless: epochs follow one another without padding, dropping or duplicates, and every rank
takes the same number of steps. Any step costs the same; to go on needs nothing but its number.
"""

import collections
import functools
import itertools
import math
import threading
from collections.abc import Collection, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm import random, storage
from ldm.config import RequestError, differences
from ldm.latents.cache import Cache, RemoteFile
from ldm.latents.choice import Choice, Chosen, Split, choose, read_ids
from ldm.latents.manifest import Manifest, read_manifest
from ldm.latents.order import LANES, Integers
from ldm.latents.receipt import Statistics
from ldm.latents.records import Records, Source
from ldm.latents.stream import Mixture, Placed, Stream, apportion, integer_weights, most_before

Shuffle = Literal["lanes", "full"]
_LOCATED_AT_ONCE = 4096
_CHUNKS_KEPT = 8


@dataclass(frozen=True)
class LatentBatch:
    """moments: fp16 (B, 2C or C, h, w), raw. labels: int64 (B,), the null class where there is none.
    ids, epochs: int64 (B,): what the random numbers of a sample are keyed by. captions: (B,) texts, where asked for."""

    moments: Tensor
    labels: Tensor
    ids: Tensor
    epochs: Tensor
    captions: tuple[str | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def pinned(self) -> "LatentBatch":
        """The same in page-locked memory."""
        each = (self.moments, self.labels, self.ids, self.epochs)
        moments, labels, ids, epochs = (part if part.is_pinned() else part.pin_memory() for part in each)
        return LatentBatch(moments, labels, ids, epochs, self.captions)

    def __getitem__(self, part: slice) -> "LatentBatch":
        captions = None if self.captions is None else self.captions[part]
        return LatentBatch(self.moments[part], self.labels[part], self.ids[part], self.epochs[part], captions)


class LatentDataset:
    """One latent dataset, or several of one fingerprint, at paths or URLs.

    Args:
        url: what `ldm encode` wrote; a list of them is mixed.
        global_batch_size: samples in one optimizer step over all ranks; multiples of 64 let up to 64 nodes share reads.
        seed: of the order.
        weights: shares of the data sets in each batch; by their sizes unless given.
        where: a condition on the columns, such as `aesthetic > 5 and width >= 512`.
        exclude: ids to leave out (of records, or of pictures), or the URL of a list; or several, by the step from which
            each is in force. What is excluded once stays so.
        holdout: share of the pictures, chosen by a hash of the id, that `split="train"` leaves out.
        shuffle: lanes reads shards in bounded windows, from anywhere; full permutes all samples of local data.
        captions: reads them too.
        generation: of each manifest, for a run that goes on; the newest by default.
        cache: of remote files on this node.
    Raises RequestError where there is no data set, or the request does not fit it.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        global_batch_size: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        where: str = "",
        exclude: str | Collection[int] | Mapping[int, str | Collection[int]] = (),
        holdout: float = 0.0,
        split: Split = "train",
        shuffle: Shuffle = "lanes",
        captions: bool = False,
        generation: str | Sequence[str] | None = None,
        cache: Cache | None = None,
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        generations = [generation] if isinstance(generation, str | None) else list(generation)
        if generation is None:
            generations *= len(urls)
        self.manifests = tuple(read_manifest(*pair) for pair in zip(urls, generations, strict=True))
        _check_alike(self.manifests)
        self.url, self.seed, self.global_batch_size = ",".join(urls), seed, global_batch_size
        self.lanes, self.cache = math.gcd(LANES, global_batch_size), cache or Cache()
        self._is_local = all(map(storage.is_local, urls))
        if shuffle == "full" and not self._is_local:
            raise RequestError(f"shuffle=full: reads everywhere at once, but latents={self.url} is remote; give lanes")
        self._exclusions = _exclusions(exclude)
        choices = [Choice(where, ids, holdout, split) for ids in self._exclusions.values()]
        chosen = [[choose(manifest, choice) for choice in choices] for manifest in self.manifests]
        self._chosen = [each[-1] for each in chosen]
        for manifest, each in zip(self.manifests, self._chosen, strict=True):
            if not each.counts.sum():
                raise RequestError(f"latents={manifest.url}: the {split} split holds no sample ({choices[-1]})")
        self._weights = _integer_weights(weights, self.manifests, self._chosen)
        self._open_shapes(list(self._exclusions), chosen, shuffle, captions)
        self._located: collections.OrderedDict[tuple[int, int, int], list[tuple[int, Placed]]]
        self._located, self._lock = collections.OrderedDict(), threading.Lock()
        self._fetched_until = 0
        self._arguments = {
            "url": urls,
            "generation": [manifest.generation for manifest in self.manifests],
            "exclude": {step: sorted(ids) for step, ids in self._exclusions.items()},
            **{"global_batch_size": global_batch_size, "seed": seed, "weights": weights, "where": where},
            **{"holdout": holdout, "split": split, "shuffle": shuffle, "captions": captions, "cache": self.cache},
        }

    def __reduce__(self) -> tuple[Any, ...]:
        # Mappings and connections stay in their process: another one opens its own.
        return functools.partial(LatentDataset, **self._arguments), ()  # type: ignore[arg-type]

    @property
    def manifest(self) -> Manifest:
        """Of the first data set."""
        return self.manifests[0]

    @property
    def num_samples(self) -> int:
        return sum(int(chosen.counts.sum()) for chosen in self._chosen)

    @property
    def num_classes(self) -> int:
        return self.manifest.conditioning.num_classes

    @property
    def record_shapes(self) -> list[tuple[int, ...]]:
        """(2C or C, h, w) of each shape."""
        return [records.shape for records in self._records]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w). Raises RequestError where there are several."""
        if len(self.record_shapes) != 1:
            raise RequestError(f"latents={self.url}: holds the shapes {self.record_shapes}; one shape is needed")
        _, height, width = self.record_shapes[0]
        return self.manifest.channels, height, width

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Per channel, of all samples; of the mixture where several data sets are mixed."""
        parts = [manifest.statistics for manifest in self.manifests]
        if len(parts) == 1:
            return parts[0]
        share = np.array(self._weights, np.float64) / sum(self._weights)
        means, stds = (np.array([getattr(part, name) for part in parts]) for name in ("mean", "std"))
        mean = share @ means
        return Statistics(tuple(mean.tolist()), tuple(np.sqrt(share @ (stds**2 + means**2) - mean**2).tolist()))

    @property
    def chosen(self) -> dict[str, Any]:
        """What a run writes down: the count and the hash of the samples, and how many were left out by what."""
        left_out: collections.Counter[str] = collections.Counter()
        for chosen in self._chosen:
            left_out.update(chosen.left_out)
        hashes = [chosen.hash(manifest) for chosen, manifest in zip(self._chosen, self.manifests, strict=True)]
        return {"samples": self.num_samples, "hash": "+".join(hashes), "left_out": dict(left_out)}

    def batch(self, step: int, rank: int = 0, world: int = 1, *, pin: bool = False) -> LatentBatch:
        """The rank's equal part of global batch number `step`. pin: in page-locked memory.

        Raises DamagedError where a file is not what was written.
        """
        shape, placed = self.locate(step, rank, world)
        found = self._records[shape].gather(placed.source, placed.shards, placed.indices)
        batch = LatentBatch(found.moments, found.labels, found.ids, torch.from_numpy(placed.epochs), found.captions)
        return batch.pinned() if pin else batch

    def batches(
        self, first_step: int = 0, *, rank: int = 0, world: int = 1, workers: int = 2, ahead: int = 4, pin: bool = False
    ) -> Generator[LatentBatch, None, None]:
        """The rank's batches from `first_step` on, endlessly, read in the background.

        workers: threads; 0 reads when asked. ahead: batches that wait to be taken, at most.
        """
        if workers == 0:
            for step in itertools.count(first_step):
                self._fetch(step, rank, world)
                yield self.batch(step, rank, world, pin=pin)
        self._fetched_until = 0
        with ThreadPoolExecutor(workers, "latents") as pool:
            waiting: collections.deque[Future[LatentBatch]] = collections.deque()
            try:
                for step in itertools.count(first_step):
                    self._fetch(step, rank, world)
                    waiting.append(pool.submit(self.batch, step, rank, world, pin=pin))
                    if len(waiting) > ahead:
                        yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def all(self) -> LatentBatch:
        """Every sample once, in the order of the shards. Raises RequestError where there are several shapes."""
        assert self.latent_shape
        parts: list[tuple[Integers, Integers, Integers]] = []
        for number, source in self._in_force(0):
            shards = np.repeat(np.arange(len(source.counts)), source.counts)
            indices = np.arange(len(shards)) - np.repeat(np.cumsum(source.counts) - source.counts, source.counts)
            parts.append((np.full_like(shards, number), shards, indices))
        source_of, shards, indices = (np.concatenate(column) for column in zip(*parts, strict=True))
        found = self._records[0].gather(source_of, shards, indices)
        return LatentBatch(found.moments, found.labels, found.ids, torch.zeros_like(found.ids), found.captions)

    def locate(self, step: int, rank: int = 0, world: int = 1) -> tuple[int, Placed]:
        """(number of the shape, where the rank's samples lie) of a step, without reading them."""
        assert self.global_batch_size % world == 0
        # A few samples cost as much as some thousands.
        chunk = max(1, _LOCATED_AT_ONCE * world // self.global_batch_size)
        key = (step // chunk, rank, world)
        with self._lock:
            known = self._located.get(key)
        if known is None:
            known = self._locate(np.arange(key[0] * chunk, (key[0] + 1) * chunk), self._slots(rank, world))
            with self._lock:
                self._located[key] = known
                while len(self._located) > _CHUNKS_KEPT:
                    self._located.popitem(last=False)
        return known[step % chunk]

    def _locate(self, steps: Integers, slots: Integers) -> list[tuple[int, Placed]]:
        shapes, within = apportion(steps, self._shape_weights, np.zeros_like(steps))
        found: dict[int, tuple[int, Placed]] = {}
        for shape in np.unique(shapes):
            here = np.flatnonzero(shapes == shape)
            positions = within[here, None] * self.global_batch_size + slots
            rows = self._mixtures[shape].locate(positions.ravel(), np.repeat(steps[here], len(slots)))
            for number, place in enumerate(here):
                found[int(place)] = int(shape), rows[number * len(slots) : (number + 1) * len(slots)]
        return [found[number] for number in range(len(steps))]

    def _slots(self, rank: int, world: int) -> Integers:
        """The rank's places in a global batch: those of whole lanes, where the lanes can be shared out so."""
        slots = np.arange(self.global_batch_size)
        by_lane = slots[np.argsort(slots % self.lanes, kind="stable")]
        share = self.global_batch_size // world
        return np.sort(by_lane[rank * share : (rank + 1) * share])

    def _fetch(self, step: int, rank: int, world: int) -> None:
        """Has what the rank's lanes will read fetched, in the order of use."""
        if self._is_local or step < self._fetched_until:
            return
        lanes = np.unique(self._slots(rank, world) % self.lanes).tolist()
        files, ends = list[RemoteFile](), list[int]()
        for shape, (mixture, records) in enumerate(zip(self._mixtures, self._records, strict=True)):
            position = step * self._shape_weights[shape] // sum(self._shape_weights) * self.global_batch_size
            shards, until = mixture.shards_ahead(position, lanes)
            files += [file for number, shard in shards for file in records.sources[number].files(shard)]
            share = sum(self._shape_weights) / self._shape_weights[shape]
            ends.append(step + math.ceil((until - position) * share / self.global_batch_size))
        self.cache.prefetch(files)
        self._fetched_until = max(step + 1, min(ends))

    def _open_shapes(self, steps: list[int], chosen: list[list[Chosen]], shuffle: Shuffle, captions: bool) -> None:
        """Builds a mixture of streams and a reader of records for each shape."""
        self._mixtures, self._records = list[Mixture](), list[Records]()
        for shape in sorted({shape for manifest in self.manifests for shape in manifest.shapes}):
            sources, streams, weights = list[Source](), list[Stream](), list[int]()
            for manifest, each, weight in zip(self.manifests, chosen, self._weights, strict=True):
                numbers = manifest.shapes.get(shape, np.empty(0, np.int64))
                its = [Source(manifest, numbers, one) for one in each]
                if not its[-1].counts.sum():
                    continue
                streams.append(Stream(its, len(sources), self.seed, self.lanes, shuffle == "full"))
                weights.append(max(1, weight * int(its[0].counts.sum()) // int(each[0].counts.sum())))
                sources += its
            if streams:
                self._mixtures.append(Mixture(streams, weights, self.lanes))
                self._records.append(Records(sources, shape, self.num_classes, self.cache, captions))
        self._shape_weights = [sum(mixture.weights) for mixture in self._mixtures]
        for number, step in enumerate(steps[1:], start=1):
            for place, mixture in enumerate(self._mixtures):
                batches = most_before(step, self._shape_weights, place)
                mixture.take_over(number, step, batches * self.global_batch_size)

    def _in_force(self, shape: int) -> list[tuple[int, Source]]:
        """(number, source) of each data set with what is excluded last left out."""
        sources, per = self._records[shape].sources, len(self._exclusions)
        return [(number, sources[number]) for number in range(per - 1, len(sources), per)]


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


def _exclusions(given: str | Collection[int] | Mapping[int, str | Collection[int]]) -> dict[int, frozenset[int]]:
    """All that is excluded from each step on, step 0 first."""
    by_step = given if isinstance(given, Mapping) else {0: given}
    found, so_far = {0: frozenset[int]()}, frozenset[int]()
    for step, ids in sorted(by_step.items()):
        so_far |= read_ids(ids) if isinstance(ids, str) else frozenset(map(int, ids))
        found[step] = so_far
    return found


def _integer_weights(
    weights: Sequence[float] | None, manifests: Sequence[Manifest], chosen: Sequence[Chosen]
) -> list[int]:
    """Of each data set: the numbers of their samples, or what was asked for."""
    if weights is None or len(manifests) == 1:
        return [int(each.counts.sum()) for each in chosen]
    if len(weights) != len(manifests) or not all(weight > 0 for weight in weights):
        raise RequestError(f"weights={list(weights)}: give one above 0 for each of the {len(manifests)} data sets")
    return integer_weights(weights)


def _check_alike(manifests: Sequence[Manifest]) -> None:
    """Raises RequestError where data sets cannot be mixed."""
    first = manifests[0]
    for other in manifests[1:]:
        lines = differences(
            {"fingerprint": first.fingerprint, "conditioning": asdict(first.conditioning)},
            {"fingerprint": other.fingerprint, "conditioning": asdict(other.conditioning)},
        )
        if lines:
            raise RequestError(f"latents={other.url}: does not go with {first.url} ({'; '.join(lines)})")
