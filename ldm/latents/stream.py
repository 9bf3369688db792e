"""Which sample stands at which position: data sets of one fingerprint mixed by weights, one shape in a batch, samples
left out from some step on.

A **source** is one data set, one shape and one choice. Sources of one data set and shape follow one another in a
`Stream`: each takes over where an epoch of the one before ends. What is excluded in the middle of an epoch is replaced
at once, by other samples of the new source, and is gone from the order when the next epoch begins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm.latents.order import FullOrder, Integers, LaneOrder, derive, stream_key
from ldm.latents.source import Source

_WEIGHT_BITS = 20


@dataclass(frozen=True)
class Placed:
    """Samples by position: source, shard and index among the chosen of that shard, and epoch, int64 (n,) each."""

    source: Integers
    shards: Integers
    indices: Integers
    epochs: Integers

    def __getitem__(self, rows: slice) -> "Placed":
        return Placed(self.source[rows], self.shards[rows], self.indices[rows], self.epochs[rows])

    def __setitem__(self, rows: Integers, values: "Placed") -> None:
        self.source[rows], self.shards[rows] = values.source, values.shards
        self.indices[rows], self.epochs[rows] = values.indices, values.epochs


def apportion(numbers: Integers, weights: Sequence[int], phases: Integers) -> tuple[Integers, Integers]:
    """Deals numbers 0, 1, 2 … out to parts in the proportion of integer weights, each part's evenly spaced.

    phases: int64 (n,) in [0, sum of weights), which shift where a part's turns fall.
    Returns (the part of each, how many of that part came before it), int64 (n,). Any number costs the same.
    """
    part, left = np.full_like(numbers, len(weights) - 1), sum(weights)
    within, undecided = numbers.copy(), np.ones(len(numbers), bool)
    for number, weight in enumerate(weights[:-1]):
        shift = phases % left
        before = _multiple(within, weight, left, shift)
        its = undecided & (_multiple(within + 1, weight, left, shift) > before)
        part[its] = number
        undecided &= ~its
        within = np.where(its, before, np.where(undecided, within - before, within))
        left -= weight
    return part, within


def _multiple(numbers: Integers, weight: int, whole: int, shift: Integers) -> Integers:
    """floor((n * weight + shift) / whole) without overflow, and 0 at n = 0."""
    rounds, rest = np.divmod(numbers, whole)
    return rounds * weight + (rest * weight + shift) // whole


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Weights as integers of a common scale, each at least 1."""
    total = math.fsum(weights)
    return [max(1, round(weight / total * 2**_WEIGHT_BITS)) for weight in weights]


def most_before(number: int, weights: Sequence[int], part: int) -> int:
    """How many of the numbers below `number` go to a part, at most; exact where there is one."""
    return number if len(weights) == 1 else number * weights[part] // sum(weights) + len(weights) + 1


@dataclass(frozen=True)
class _Segment:
    """A source from the epoch on that begins at `position`. step: from which it is in force."""

    number: int
    source: Source
    step: int
    position: int
    order: FullOrder | LaneOrder


class Stream:
    """The samples of one data set that have one shape, in their order, endlessly.

    sources: the first is in force from step 0 on; each later one holds a part of the one before. first_number: of the
    first among the sources of all streams.
    """

    def __init__(self, sources: Sequence[Source], first_number: int, seed: int, lanes: int, full: bool) -> None:
        self.sources, self._first, self._seed, self._lanes, self._full = sources, first_number, seed, lanes, full
        self._replacements = stream_key(seed, "replacement")
        self._segments = [self._segment(0, 0, 0, 0)]

    def take_over(self, number: int, step: int, position: int) -> None:
        """Puts source `number` in force from `step` on, before which no position from `position` on was read."""
        last = self._segments[-1]
        epochs = -(-max(0, position - last.position) // last.order.num_samples)
        start = last.position + epochs * last.order.num_samples
        self._segments.append(self._segment(number, step, start, last.order.epoch + epochs))

    def _segment(self, number: int, step: int, position: int, epoch: int) -> _Segment:
        counts = self.sources[number].counts
        if self._full:
            order: FullOrder | LaneOrder = FullOrder(counts, self._seed, position, epoch)
        else:
            order = LaneOrder(counts, self._seed, self._lanes, position, epoch)
        return _Segment(number, self.sources[number], step, position, order)

    def locate(self, positions: Integers, steps: Integers) -> Placed:
        """positions, steps: int64 (n,)."""
        if len(self._segments) == 1:
            return self._placed(self._segments[0], positions)
        found = Placed(*(np.empty_like(positions) for _ in range(4)))
        by_position, by_step = (
            np.searchsorted([getattr(s, name) for s in self._segments], values, side="right") - 1
            for name, values in (("position", positions), ("step", steps))
        )
        for number in np.unique(by_position):
            here = np.flatnonzero(by_position == number)
            found[here] = self._placed(self._segments[number], positions[here])
        stale = np.flatnonzero(by_step > by_position)
        for old, new, shard in np.unique(np.stack((by_position, by_step, found.shards), 1)[stale], axis=0).tolist():
            here = stale[(by_position[stale] == old) & (by_step[stale] == new) & (found.shards[stale] == shard)]
            before, after = self._segments[old].source, self._segments[new].source
            gone = after.lacks(shard, before.records(shard, found.indices[here]))
            for row in here[gone].tolist():
                self._replace(found, row, self._segments[new], positions[row : row + 1])
        return found

    def shards_ahead(self, position: int, lanes: Sequence[int]) -> tuple[list[tuple[int, int, int]], int]:
        """((positions until it may be read, source, shard) of what the lanes read from `position` on, the position up
        to which this list stands)"""
        segment = [segment for segment in self._segments if segment.position <= position][-1]
        assert isinstance(segment.order, LaneOrder)
        shards, until = segment.order.shards_ahead(position, lanes)
        return [(wait, self._first + segment.number, shard) for wait, shard in shards], until

    def _placed(self, segment: _Segment, positions: Integers) -> Placed:
        source = np.full_like(positions, self._first + segment.number)
        return Placed(source, *segment.order.locate(positions))

    def _replace(self, found: Placed, row: int, segment: _Segment, position: Integers) -> None:
        """Puts another sample, drawn by its position, in the place of an excluded one."""
        counts = segment.source.counts
        draw = (derive(self._replacements, position) % np.uint64(counts.sum())).astype(np.int64)
        ends = np.cumsum(counts)
        shard = np.searchsorted(ends, draw, side="right")
        found.source[row], found.shards[row] = self._first + segment.number, shard[0]
        found.indices[row] = (draw - (ends - counts)[shard])[0]


class Mixture:
    """The streams of all data sets that hold one shape, mixed by integer weights within each batch."""

    def __init__(self, streams: Sequence[Stream], weights: Sequence[int], lanes: int) -> None:
        self.streams, self.weights, self._lanes = streams, weights, lanes

    def locate(self, positions: Integers, steps: Integers) -> Placed:
        """positions: of the mixture, int64 (n,)."""
        if len(self.streams) == 1:
            return self.streams[0].locate(positions, steps)
        rows, lanes = np.divmod(positions, self._lanes)
        parts, within = apportion(rows, self.weights, lanes * sum(self.weights) // self._lanes)
        found = Placed(*(np.empty_like(positions) for _ in range(4)))
        for number, stream in enumerate(self.streams):
            here = np.flatnonzero(parts == number)
            found[here] = stream.locate(within[here] * self._lanes + lanes[here], steps[here])
        return found

    def take_over(self, number: int, step: int, position: int) -> None:
        """As `Stream.take_over`, for all streams. position: of the mixture, a multiple of the lanes."""
        for part, stream in enumerate(self.streams):
            stream.take_over(number, step, self._of(part, position))

    def shards_ahead(self, position: int, lanes: Sequence[int]) -> tuple[list[tuple[int, int, int]], int]:
        """As `Stream.shards_ahead`, over all streams. position: of the mixture."""
        found, until, whole = list[tuple[int, int, int]](), position + 2**62, sum(self.weights)
        for weight, stream in zip(self.weights, self.streams, strict=True):
            here = position * weight // whole
            shards, end = stream.shards_ahead(here, lanes)
            found += [(wait * whole // weight, source, shard) for wait, source, shard in shards]
            until = min(until, position + (end - here) * whole // weight)
        return found, until

    def _of(self, part: int, position: int) -> int:
        """The position of a stream from which on it was not read before `position` of the mixture."""
        return most_before(position // self._lanes, self.weights, part) * self._lanes
