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
from typing import Any, Literal

import numpy as np
import torch

from ldm import storage
from ldm.config import RequestError
from ldm.latents.batch import LatentBatch
from ldm.latents.cache import Cache
from ldm.latents.choice import Choice, Chosen, Split, choose, exclusions_by_step
from ldm.latents.manifest import Manifest, check_alike, read_manifest
from ldm.latents.order import LANES, Integers
from ldm.latents.receipt import Statistics
from ldm.latents.records import Records
from ldm.latents.source import Source
from ldm.latents.stream import Mixture, Placed, Stream, apportion, integer_weights, most_before

Shuffle = Literal["lanes", "full"]
_LOCATED_AT_ONCE = 4096
_CHUNKS_KEPT = 8


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
        pinned = [generation] if isinstance(generation, str) else generation
        generations: Sequence[str | None] = pinned or [None] * len(urls)
        if not urls or len(urls) != len(generations):
            raise RequestError(f"latents={urls}: the run began with {len(generations)} data sets; give these, in order")
        if global_batch_size < 1:
            raise RequestError(f"global_batch_size={global_batch_size}: give at least 1")
        self.manifests = tuple(read_manifest(*pair) for pair in zip(urls, generations, strict=True))
        check_alike(self.manifests)
        self.url, self.seed, self.global_batch_size = ",".join(urls), seed, global_batch_size
        self.lanes, self.cache = math.gcd(LANES, global_batch_size), cache or Cache()
        self._is_local = all(map(storage.is_local, urls))
        if shuffle == "full" and not self._is_local:
            raise RequestError(f"shuffle=full: reads everywhere at once, but latents={self.url} is remote; give lanes")
        self._exclusions = exclusions_by_step(exclude)
        choices = [Choice(where, ids, holdout, split) for ids in self._exclusions.values()]
        chosen = [choose(manifest, choices) for manifest in self.manifests]
        self._chosen = [each[-1] for each in chosen]
        for manifest, each in zip(self.manifests, self._chosen, strict=True):
            if not each.counts.sum():
                raise RequestError(f"latents={manifest.url}: the {split} split holds no sample ({choices[-1]})")
        # Of what was there at first: what is excluded later must not move the rest of the stream.
        self._weights = _integer_weights(weights, [each[0] for each in chosen])
        self._open_shapes(list(self._exclusions), chosen, shuffle, captions)
        self._located: collections.OrderedDict[tuple[int, int, int], list[tuple[int, Placed]]]
        self._located, self._lock = collections.OrderedDict(), threading.Lock()
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
        with ThreadPoolExecutor(max(1, workers), "latents") as pool:
            waiting: collections.deque[Future[LatentBatch]] = collections.deque()
            fetched_until = first_step
            try:
                for step in itertools.count(first_step):
                    if step >= fetched_until and not self._is_local:
                        fetched_until = self._fetch(step, rank, world)
                    if workers == 0:
                        yield self.batch(step, rank, world, pin=pin)
                        continue
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
        if world < 1 or self.global_batch_size % world or not 0 <= rank < world:
            size = self.global_batch_size
            raise RequestError(
                f"rank={rank}, world={world}: give the ranks of a world that divides the batch of {size}"
            )
        # A few samples cost as much as some thousands.
        chunk = max(1, _LOCATED_AT_ONCE * world // self.global_batch_size)
        key = (step // chunk, rank, world)
        with self._lock:
            known = self._located.get(key)
        if known is None:
            known = self._locate(np.arange(key[0] * chunk, (key[0] + 1) * chunk), self.slots(rank, world))
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

    def slots(self, rank: int, world: int) -> Integers:
        """The rank's places in a global batch: those of whole lanes, where the lanes can be shared out so."""
        slots = np.arange(self.global_batch_size)
        by_lane = slots[np.argsort(slots % self.lanes, kind="stable")]
        share = self.global_batch_size // world
        return np.sort(by_lane[rank * share : (rank + 1) * share])

    def _fetch(self, step: int, rank: int, world: int) -> int:
        """Has what the rank's lanes will read fetched, in the order of use. Returns the step at which to ask again."""
        lanes = np.unique(self.slots(rank, world) % self.lanes).tolist()
        ahead, ends, whole = list[tuple[float, int, int, int]](), list[float](), sum(self._shape_weights)
        for shape, mixture in enumerate(self._mixtures):
            share = self._shape_weights[shape] / whole * self.global_batch_size  # positions of it in a step, on average
            position = step * self._shape_weights[shape] // whole * self.global_batch_size
            shards, until = mixture.shards_ahead(position, lanes)
            ahead += [(wait / share, shape, number, shard) for wait, number, shard in shards]
            ends.append(step + (until - position) / share)
        ahead.sort(key=lambda entry: entry[0])
        sources = [(self._records[shape].sources[number], shard) for _, shape, number, shard in ahead]
        self.cache.prefetch([file for source, shard in sources for file in source.files(shard)])
        return max(step + 1, math.ceil(min(ends)))

    def _open_shapes(self, steps: list[int], chosen: list[list[Chosen]], shuffle: Shuffle, captions: bool) -> None:
        """Builds a mixture of streams and a reader of records for each shape."""
        self._mixtures, self._records = list[Mixture](), list[Records]()
        shapes = sorted({shape for manifest in self.manifests for shape in manifest.shapes})
        for shape in shapes:
            sources, streams, weights = list[Source](), list[Stream](), list[int]()
            for manifest, each, weight in zip(self.manifests, chosen, self._weights, strict=True):
                numbers = manifest.shapes.get(shape, np.empty(0, np.int64))
                its = [Source(manifest, numbers, one) for one in each]
                if not its[0].counts.sum():
                    continue
                if not its[-1].counts.sum():
                    raise RequestError(f"exclude: leaves no record of the shape {shape} in {manifest.url}")
                streams.append(Stream(its, len(sources), self.seed, self.lanes, shuffle == "full"))
                weights.append(max(1, weight * int(its[0].counts.sum()) // int(each[0].counts.sum())))
                sources += its
            if streams:
                self._mixtures.append(Mixture(streams, weights, self.lanes))
                self._records.append(
                    Records(sources, shape, self.num_classes, self.cache, captions=captions, shapes=len(shapes))
                )
        self._shape_weights = [sum(mixture.weights) for mixture in self._mixtures]
        for number, step in enumerate(steps[1:], start=1):
            for place, mixture in enumerate(self._mixtures):
                batches = most_before(step, self._shape_weights, place)
                mixture.take_over(number, step, batches * self.global_batch_size)

    def _in_force(self, shape: int) -> list[tuple[int, Source]]:
        """(number, source) of each data set with what is excluded last left out."""
        sources, per = self._records[shape].sources, len(self._exclusions)
        return [(number, sources[number]) for number in range(per - 1, len(sources), per)]


def _integer_weights(weights: Sequence[float] | None, chosen: Sequence[Chosen]) -> list[int]:
    """Of each data set: the numbers of their samples, or what was asked for."""
    if weights is None:
        return [int(each.counts.sum()) for each in chosen]
    if len(weights) != len(chosen) or not all(0 < weight < math.inf for weight in weights):
        raise RequestError(f"weights={list(weights)}: give one above 0 for each of the {len(chosen)} data sets")
    return integer_weights(weights)
